"""Reads a converted folder beside the folder that it was made from, and compares every tensor byte for byte.

What each tensor should be is planned again from the source and streamed by the executor, without writing. A Megatron
checkpoint is compared box by box, wherever its own metadata says that they lie, so any layout of it can be.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, Literal

import numpy as np
import torch

from megatron_r1.config.errors import UserError
from megatron_r1.convert.correspondence import SCALE
from megatron_r1.convert.execute import Buffer, Maker
from megatron_r1.convert.formats.names import parse
from megatron_r1.convert.origin import Origin
from megatron_r1.convert.plan import HfSource, MegatronSource, Quantise, Target, check_coverage
from megatron_r1.convert.storage import FP8, ITEMSIZE, TORCH_NAMES, Chunk, Stored
from megatron_r1.convert.write import check_equal

Opened = HfSource | MegatronSource
Scales = Literal["fp32", "power-of-2"]


@dataclass(frozen=True, slots=True)
class Job:
    """A tensor, or a box of one, as it should be, and where it is. name: what a report calls it."""

    name: str
    target: Target
    file: str
    start: int
    scale: Stored | None = None  # of a quantised one, as it is


@dataclass(slots=True)
class Difference:
    """How a tensor differs. largest: of the values; inf where one of the two is no number."""

    name: str
    elements: int = 0
    of: int = 0
    largest: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"{self.name}: {self.why}"
        return f"{self.name}: {self.elements:,} of {self.of:,} elements differ, the largest by {self.largest:.3g}"

    def as_dict(self) -> dict[str, Any]:
        """In types of JSON."""
        largest = self.largest if math.isfinite(self.largest) else None
        return {"tensor": self.name, "elements": self.elements, "of": self.of, "largest": largest, "why": self.why}


@dataclass
class Comparison:
    """tensors: how many there are; done: bytes by what a conversion does to them."""

    tensors: int
    done: Counter[str]
    differences: list[Difference]


def compare(
    tested: Opened,
    source: Opened,
    known: Origin,
    *,
    kept: dict[str, Stored] | None,
    scales: Scales,
    workers: int,
    progress: Callable[[int], None],
) -> Comparison:
    """Compare all tensors of `tested` with what conversion makes of `source`; both have equal tables.

    known: where the model came from, for the copies and FP8 scales that an export has. kept: block scales that a
    tested Megatron checkpoint keeps of an FP8 source; None: it keeps nothing. scales: which an FP8 folder has. workers:
    threads; progress gets bytes from them.
    """
    differences: list[Difference] = []
    if isinstance(tested, HfSource):
        jobs = list(_hf_jobs(tested, source, known, scales, differences))
    else:
        jobs = list(_megatron_jobs(tested, source, differences))
        if isinstance(source, HfSource):
            jobs += _scale_jobs(source, kept, differences)
            differences += _unequal_copies(source)
    done: Counter[str] = Counter()
    for job in jobs:
        done[job.target.operation] += job.target.bytes
    differences += _run(jobs, workers, progress)
    return Comparison(len({job.name for job in jobs}), done, differences)


def _hf_jobs(
    tested: HfSource, source: Opened, known: Origin, scales: Scales, problems: list[Difference]
) -> Iterator[Job]:
    tensors, table = tested.archive.tensors, tested.table
    for name in known.copies(table):
        if name not in tensors:
            why = f"missing, but the model came with this copy of {table.copies[name]}"
            problems.append(Difference(name, why=why))
    for name in table.names_in(tensors):
        stored = tensors[name]
        if isinstance(source, MegatronSource):
            pieces = source.hf_tensor(name)
        else:
            pieces = source.whole(name if name in source.archive.tensors else table.copies[name])
        if table.rule(name).fp32 and stored.dtype not in ("F32", known.dtypes.get(name)):
            problems.append(Difference(name, why=f"is {stored.dtype}; it has to be F32 whatever the rest is"))
        target, scale = Target(name, stored.dtype, stored.shape, pieces), tested.scale_of(name)
        if scale is not None and all(piece.dtype == FP8 for piece in pieces):
            target = replace(target, pieces=tuple(replace(piece, scale=None) for piece in pieces))
            assert isinstance(source, HfSource)
            yield _whole_job(source, name + SCALE, scale)
            scale = None
        elif scale is not None:
            target = replace(target, quantise=Quantise(scales, known.kept_scale(name, scales)))
        check_coverage(target)
        yield Job(name, target, stored.chunks[0].file, stored.chunks[0].start, scale)


def _whole_job(source: HfSource, name: str, found: Stored) -> Job:
    """A tensor of `source` that should be found elsewhere as it is."""
    due = source.archive.tensors[name]
    target = Target(name, found.dtype, due.shape, source.whole(name))
    check_coverage(target)
    return Job(name, target, found.chunks[0].file, found.chunks[0].start)


def _megatron_jobs(tested: MegatronSource, source: Opened, problems: list[Difference]) -> Iterator[Job]:
    for stored in tested.archive.tensors.values():
        if stored.name in tested.dropped:
            continue
        parsed = parse(stored.name)
        for chunk in stored.chunks:
            for lead, start in _leads(stored, chunk, parsed.axes):
                entry = source.table.entries[parsed.canonical(lead)]
                if entry.rule.fp32 and stored.dtype != "F32":
                    problems.append(Difference(entry.name, why=f"is {stored.dtype}; it has to be F32"))
                offset, size = chunk.offsets[parsed.axes :], chunk.sizes[parsed.axes :]
                first = offset[0] + (parsed.half or 0) * entry.rows[0]
                rows = range(first, min(first + size[0], entry.shape[0]))  # behind them the vocabulary may be padded
                cols = range(1) if entry.width is None else range(offset[1], offset[1] + size[1])
                if len(rows):
                    shape = (len(rows),) if entry.width is None else (len(rows), len(cols))
                    target = Target(entry.name, stored.dtype, shape, source.megatron_box(entry, rows, cols))
                    check_coverage(target)
                    yield Job(entry.name, target, chunk.file, start)


def _leads(stored: Stored, chunk: Chunk, axes: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(indices along the stacked axes, byte at which that element begins) of all that a chunk holds."""
    size = prod(chunk.sizes[axes:]) * ITEMSIZE[stored.dtype]
    spans = zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)
    for i, lead in enumerate(product(*(range(offset, offset + count) for offset, count in spans))):
        yield lead, chunk.start + i * size


def _scale_jobs(source: HfSource, kept: dict[str, Stored] | None, problems: list[Difference]) -> Iterator[Job]:
    """The block scales of an FP8 source that an import keeps."""
    if kept is None:
        return
    for name in source.archive.tensors:
        if name.endswith(SCALE) and name not in source.dropped:
            if name in kept and kept[name].shape == source.archive.tensors[name].shape:
                yield _whole_job(source, name, kept[name])
            else:
                problems.append(Difference(name, why="is not among the scales that the checkpoint keeps"))


def _unequal_copies(source: HfSource) -> Iterator[Difference]:
    for first, second in source.equal():
        try:
            check_equal(first, second)
        except UserError as error:
            yield Difference(second.name, why=str(error))


def _run(jobs: Sequence[Job], workers: int, progress: Callable[[int], None]) -> list[Difference]:
    """Differences of the jobs, those of one name together."""
    local, comparers = threading.local(), []
    before = torch.get_num_threads()

    def enter() -> None:
        local.comparer = _Comparer(progress)
        comparers.append(local.comparer)

    torch.set_num_threads(1)  # workers are the parallelism
    pool = ThreadPoolExecutor(workers, initializer=enter)
    found: dict[str, Difference] = {}
    try:
        for result in pool.map(lambda job: local.comparer.compare(job), jobs):
            for one in result:
                total = found.setdefault(one.name, Difference(one.name))
                total.elements += one.elements
                total.of += one.of
                total.largest = max(total.largest, one.largest)
                total.why = total.why or one.why
    finally:
        pool.shutdown(cancel_futures=True)
        for comparer in comparers:
            comparer.close()
        torch.set_num_threads(before)
    return [one for one in found.values() if one.elements or one.why]


class _Comparer:
    """One thread's executor and buffer."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.maker, self.buffer, self.progress = Maker(), Buffer(), progress

    def compare(self, job: Job) -> list[Difference]:
        """What there is to say of a job and of its scales; `of` counts elements that are equal, too."""
        result = Difference(job.name, of=prod(job.target.shape))
        try:
            at = job.start
            for view in self.maker.stream(job.target):
                self._tally(view, job.file, at, job.target.dtype, result)
                at += len(view)
            if job.scale is None:
                return [result]
            assert self.maker.scales is not None
            scales = Difference(job.name + SCALE, of=prod(job.scale.shape))
            due, found = self.maker.scales.contiguous(), self.maker.scale(job.scale)
            _count(due.view(torch.int32), found.view(torch.int32), due, found, scales)
            return [result, scales]
        except UserError as error:
            result.why = str(error)
            return [result]

    def close(self) -> None:
        """Close its files."""
        self.maker.close()

    def _tally(self, due: memoryview, file: str, at: int, dtype: str, result: Difference) -> None:
        found = self.buffer.take(len(due))
        self.maker.reader.read(file, at, found.data)
        self.progress(len(due))
        expected = np.frombuffer(due, np.uint8)
        wide = np.uint64 if len(due) % 8 == 0 else np.uint8
        if np.array_equal(expected.view(wide), found.view(wide)):
            return
        kind, bits = getattr(torch, TORCH_NAMES[dtype]), _BITS[ITEMSIZE[dtype]]
        left, right = torch.from_numpy(expected.copy()), torch.from_numpy(found)
        _count(left.view(bits), right.view(bits), left.view(kind), right.view(kind), result)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _count(
    left_bits: torch.Tensor, right_bits: torch.Tensor, left: torch.Tensor, right: torch.Tensor, result: Difference
) -> None:
    differs = left_bits != right_bits
    if bool(differs.any()):
        gap = (left[differs].double() - right[differs].double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        result.elements += gap.numel()
        result.largest = max(result.largest, float(gap.max()))
