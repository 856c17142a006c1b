"""Writes what a plan says: files in parallel, each whole or absent, checksums, and what is left to do after a kill."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_r1 import __version__
from megatron_r1.config.errors import UserError
from megatron_r1.convert.execute import BAND, Maker
from megatron_r1.convert.journal import Journal, finished_files, reopen
from megatron_r1.convert.manifest import (
    Blocks,
    FileRecord,
    atomic_write,
    check_free_space,
    make_folder,
    replacing,
    size_of,
    write_manifest,
    xxh3_128,
)
from megatron_r1.convert.plan import OutputFile, Part, Plan, Target
from megatron_r1.convert.storage import Stored

WRITE = 128 << 10
"""Most bytes of a write, and what its end is a multiple of. For larger ones the page cache takes its memory in larger
units; a virtual machine has to get those back from its host first, at several times the processor time.
"""
Progress = Callable[[int], None]
"""Called with bytes that are done, from any thread."""


def carry_out(
    plan: Plan,
    folder: Path,
    last: Mapping[str, bytes],
    *,
    workers: int,
    resume: bool,
    overwrite: bool,
    progress: Progress,
    about: Mapping[str, Any],
) -> bool:
    """Write a conversion into `folder`; False: it finished there before, every checksum is right, nothing is written.

    last: small files that make the folder loadable (config, index, metadata): written when all others are on disk, so
    an interrupted conversion never looks complete. about: facts for manifest.json, which is the very last.
    resume: files that a conversion finished, by the same plan from the same sources, stay if their checksums are right.

    Raises UserError for a disk that is full or cannot be written, a source that is damaged, copies that differ;
    RunFailed for a disk that breaks.
    """
    state = cache(_state)
    plans = {file.name: plan_hash(file, state) for file in plan.files}
    whole = combined_hash(plans, last)
    if resume and (files := finished_files(folder, whole)) is not None:
        if _unchanged(folder, files, workers, progress):
            return False
        reopen(folder, plans, files)
    if overwrite:
        check_free_space(folder, plan.bytes + sum(map(len, last.values())), size_of(folder))
    with closing(Journal.open(folder, resume, overwrite=overwrite, files=[*plans, *last])) as journal:
        records = _write_files(plan, folder, journal, plans, workers, progress)
        about = {**about, **_counted_blocks(records)}
        for name, content in last.items():
            make_folder((folder / name).parent)
            records[name] = atomic_write(folder / name, content)
        write_manifest(folder, records, {**about, "plan": whole})
        journal.finish()
    return True


def _counted_blocks(records: Mapping[str, FileRecord]) -> dict[str, Any]:
    """What manifest.json says of FP8 blocks, of whole runs and of those that were resumed; nothing without any."""
    files = {name: [record.blocks.kept, record.blocks.new] for name, record in records.items() if record.blocks}
    kept, new = (sum(counts[i] for counts in files.values()) for i in (0, 1))
    return {"fp8_blocks": {"kept": kept, "new": new, "files": files}} if files else {}


def _unchanged(folder: Path, files: Mapping[str, FileRecord], workers: int, progress: Progress) -> bool:
    """Whether all these files are what they were when they were written."""

    def same(name: str) -> bool:
        path = folder / name
        found = path.is_file() and path.stat().st_size == files[name].bytes
        return found and xxh3_128(path, progress) == files[name].xxh3_128

    with ThreadPoolExecutor(workers) as pool:
        return all(list(pool.map(same, files)))


def _write_files(
    plan: Plan, folder: Path, journal: Journal, plans: Mapping[str, str], workers: int, progress: Progress
) -> dict[str, FileRecord]:
    """Write the files that the journal does not have, and compare the copies."""
    with ThreadPoolExecutor(workers) as pool:
        done_before = pool.map(journal.done, plans.keys(), plans.values())
        records = {name: found for name, found in zip(plans, done_before, strict=True) if found is not None}
    todo = [file for file in plan.files if file.name not in records]
    check_free_space(folder, sum(file.size for file in todo))
    progress(sum(file.size for file in plan.files if file.name in records))
    stop, lock = threading.Event(), threading.Lock()

    def write(file: OutputFile) -> None:
        record = write_file(file, folder, progress, stop)
        with lock:
            journal.add(file.name, plans[file.name], record)
            records[file.name] = record

    def compare(pair: tuple[Stored, Stored]) -> None:
        check_equal(*pair)

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(compare, pair) for pair in plan.equal] + [pool.submit(write, file) for file in todo]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            for job in jobs:
                job.cancel()
    errors = [error for job in done if (error := job.exception()) is not None and not isinstance(error, _Stopped)]
    if errors:
        raise errors[0]
    return records


def write_file(file: OutputFile, folder: Path, progress: Progress, stop: threading.Event) -> FileRecord:
    """Write one file and return its size and checksum. Raises as `carry_out`."""
    path = folder / file.name
    make_folder(path.parent)
    # Scales are known after the tensor that they stand before, so such a file is read again for its checksum.
    in_order = all(part.scale_at is None for part in file.parts)
    digest, maker, blocks = xxhash.xxh3_128(), Maker(), Blocks()
    try:
        with replacing(path) as handle:
            for part in sorted(file.parts, key=lambda part: part.at):
                at = part.at
                for view in _views(part, maker):
                    if stop.is_set():
                        raise _Stopped
                    if in_order:
                        digest.update(view)
                    at = _write(handle, view, at)
                    progress(len(view))
                if isinstance(part.content, Target) and part.content.quantise is not None and not part.only_scales:
                    blocks += maker.blocks
                if part.scale_at is not None:
                    assert maker.scales is not None
                    scales = maker.scales.numpy().tobytes()
                    _write(handle, scales, part.scale_at)
                    progress(len(scales))
            if os.fstat(handle).st_size != file.size:
                raise RuntimeError(f"{path}: {os.fstat(handle).st_size} bytes written where the plan has {file.size}")
    finally:
        maker.close()
    return FileRecord(file.size, digest.hexdigest() if in_order else xxh3_128(path), blocks)


def _views(part: Part, maker: Maker) -> Iterator[bytes | memoryview]:
    """The bytes of a part in order; scales that go elsewhere in the file are then in `maker.scales`."""
    if isinstance(part.content, bytes):
        yield part.content
    elif part.only_scales:
        for _ in maker.stream(part.content):
            pass
        assert maker.scales is not None
        yield maker.scales.numpy().tobytes()
    else:
        yield from maker.stream(part.content)


def plan_hash(file: OutputFile, state: Callable[[str], str]) -> str:
    """What a file will hold: who makes it, its plan, and the state (size, time) of every file that it is made from."""
    digest = hashlib.blake2b(__version__.encode(), digest_size=16)
    sources: set[str] = set()
    for part in file.parts:
        digest.update(repr((part.at, part.scale_at, part.only_scales)).encode())
        if isinstance(part.content, bytes):
            digest.update(part.content)
        else:
            digest.update(repr(part.content).encode())
            sources |= _files_of(part.content)
    for source in sorted(sources):
        digest.update(f"{source} {state(source)}".encode())
    return digest.hexdigest()


def combined_hash(plans: Mapping[str, str], last: Mapping[str, bytes]) -> str:
    """What a whole conversion writes: the hashes of its files' plans, and the small files themselves."""
    digest = hashlib.blake2b(digest_size=16)
    for name, plan in sorted(plans.items()):
        digest.update(repr((name, plan)).encode())
    for name, content in sorted(last.items()):
        digest.update(repr((name, content)).encode())
    return digest.hexdigest()


def finished(plan: Plan, folder: Path, last: Mapping[str, bytes]) -> bool:
    """Whether this very conversion finished in `folder`; checksums are not looked at."""
    state = cache(_state)
    plans = {file.name: plan_hash(file, state) for file in plan.files}
    return finished_files(folder, combined_hash(plans, last)) is not None


def source_files(plan: Plan) -> set[str]:
    """Every file that a plan reads."""
    parts = (part.content for file in plan.files for part in file.parts)
    found = {name for content in parts if isinstance(content, Target) for name in _files_of(content)}
    return found | {stored.chunks[0].file for pair in plan.equal for stored in pair}


def _state(source: str) -> str:
    found = os.stat(source)
    return f"{found.st_size} {found.st_mtime_ns}"


def check_equal(first: Stored, second: Stored) -> None:
    """Raise UserError unless two tensors hold the same bytes."""
    one, two = first.chunks[0], second.chunks[0]
    maker, other = Maker(), Maker()
    left, right = bytearray(BAND), bytearray(BAND)
    try:
        for done in range(0, first.bytes, BAND):
            size = min(BAND, first.bytes - done)
            maker.reader.read(one.file, one.start + done, memoryview(left)[:size])
            other.reader.read(two.file, two.start + done, memoryview(right)[:size])
            if first.dtype != second.dtype or left[:size] != right[:size]:
                cure = "--no-mtp converts the model without its multi-token-prediction layer"
                if second.name == "lm_head.weight":
                    cure = "config.json ties them: set its tie_word_embeddings to false if the head is one of its own"
                raise UserError(
                    f"{second.name} differs from {first.name}, but Megatron has one tensor for both; {cure}"
                )
    finally:
        maker.close()
        other.close()


def _write(handle: int, data: bytes | memoryview, at: int) -> int:
    """Write all of it and return the place behind it."""
    view = memoryview(data)
    while len(view):
        count = os.pwrite(handle, view[: WRITE - at % WRITE], at)
        view, at = view[count:], at + count
    return at


def _files_of(target: Target) -> set[str]:
    files = {piece.file for piece in target.pieces}
    scales: Sequence[Stored | None] = [p.scale.stored for p in target.pieces if p.scale is not None]
    if target.quantise is not None:
        scales = [*scales, target.quantise.kept]
    return files | {stored.chunks[0].file for stored in scales if stored is not None}


class _Stopped(Exception):
    """Another file failed."""
