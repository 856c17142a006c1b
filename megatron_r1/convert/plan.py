"""A conversion as byte ranges: which bytes of which files make each tensor of each file to be written.

Readers give an `Archive`, the table a `Correspondence`; here the two become `Target`s, tensors to write with the
`Piece`s they are made of. Nothing reads a tensor's bytes before the whole plan stands, so that every mistake in names,
shapes or coverage is found first. `execute.py` carries a plan out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Literal

from megatron_r1.config.errors import UserError
from megatron_r1.convert.correspondence import SCALE, Correspondence, Entry
from megatron_r1.convert.formats.names import MODEL, Place, places
from megatron_r1.convert.storage import FP8, ITEMSIZE, Archive, Chunk, Stored
from megatron_r1.model.precision import BLOCK

WEIGHTS = ("BF16", "F16", "F32")
"""Dtypes of weights that are not quantised."""
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
"""Dtypes of block scales."""
_SHOWN = 6  # names that a message lists


@dataclass(frozen=True, slots=True)
class Scale:
    """Block scales of an FP8 matrix, and where in that matrix a piece begins."""

    stored: Stored  # float [ceil(rows / 128), ceil(columns / 128)], one chunk
    row: int
    col: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a target and the file that holds it; counted in elements, a vector is a matrix of one column."""

    row: int  # of its first element in the target
    col: int
    rows: int
    cols: int
    file: str
    start: int  # byte of its first element
    stride: int  # bytes from one row to the next
    dtype: str
    scale: Scale | None = None

    @property
    def bytes(self) -> int:
        """Bytes that are read for it."""
        return self.rows * self.cols * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Quantise:
    """How a target is quantised to block FP8. kept: the source's scales, which blocks that still fit them keep."""

    scales: Literal["fp32", "power-of-2"]
    kept: Stored | None


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    quantise: Quantise | None = None
    axes: int = 0  # leading ones of size 1, of a chunk of stacked tensors
    at: tuple[int, ...] = ()  # where the chunk begins in its tensor; empty: it is the whole tensor

    @property
    def rows(self) -> int:
        """Rows of the matrix that it is made as."""
        return _matrix(self.shape[self.axes :])[0]

    @property
    def cols(self) -> int:
        """Columns of that matrix."""
        return _matrix(self.shape[self.axes :])[1]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor as it is written."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for it."""
        return sum(piece.bytes for piece in self.pieces)

    @property
    def operation(self) -> Literal["copy", "cast", "dequantise", "quantise"]:
        """What happens on the way."""
        if self.quantise is not None:
            return "quantise"
        if any(piece.scale is not None for piece in self.pieces):
            return "dequantise"
        return "copy" if all(piece.dtype == self.dtype for piece in self.pieces) else "cast"

    def scale_shape(self) -> tuple[int, ...]:
        """Shape of its block scales."""
        return scale_shape((self.rows, self.cols))


@dataclass(frozen=True, slots=True)
class Part:
    """Something at a place of a file: bytes that the planner knows, or a tensor. scale_at: where its scales go.
    only_scales: the tensor's scales and not itself, which is in another file.
    """

    at: int
    content: bytes | Target
    scale_at: int | None = None
    only_scales: bool = False


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to write, part by part; parts do not overlap and leave no hole."""

    name: str
    size: int
    parts: tuple[Part, ...]

    @property
    def targets(self) -> Iterator[Target]:
        """Its tensors, without scales."""
        return (part.content for part in self.parts if isinstance(part.content, Target) and not part.only_scales)


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole conversion. dropped: source names that are not needed -> why. equal: pairs of source tensors of which
    only the first is used, because the second must be its copy.
    """

    files: tuple[OutputFile, ...]
    dropped: Mapping[str, str]
    equal: tuple[tuple[Stored, Stored], ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes to write."""
        return sum(file.size for file in self.files)


def _order(piece: Piece) -> tuple[int, int]:
    return piece.row, piece.col


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the block scales of a matrix; blocks at the lower and right edge may be partial."""
    return tuple(-(-size // BLOCK) for size in shape)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns); a vector is a matrix of one column."""
    return (shape[0] if shape else 1), (shape[1] if len(shape) > 1 else 1)


@dataclass
class Source:
    """The tensors of an archive, cut into pieces on demand; `used` counts the elements that pieces were made of."""

    archive: Archive
    used: Counter[str] = field(default_factory=Counter)
    _by_lead: dict[str, dict[tuple[int, ...], list[Chunk]]] = field(default_factory=dict)

    def box(
        self, stored: Stored, lead: tuple[int, ...], rows: range, cols: range, at: tuple[int, int], scale: Stored | None
    ) -> Iterator[Piece]:
        """Pieces of rows and columns of `stored[lead]`, placed from `at` = (row, column) on in a target."""
        axes, item = len(lead), ITEMSIZE[stored.dtype]
        for chunk in self._chunks(stored, axes).get(lead, ()):
            (row, col), (height, width) = _offsets(chunk, axes), _sizes(chunk, axes)
            row0, row1 = max(rows.start, row), min(rows.stop, row + height)
            col0, col1 = max(cols.start, col), min(cols.stop, col + width)
            if row0 < row1 and col0 < col1:
                index = 0
                for at_axis, offset, size in zip(lead, chunk.offsets, chunk.sizes, strict=False):
                    index = index * size + at_axis - offset
                start = chunk.start + ((index * height + row0 - row) * width + col0 - col) * item
                place = None if scale is None else Scale(scale, row0, col0)
                origin = at[0] + row0 - rows.start, at[1] + col0 - cols.start
                self.used[stored.name] += (row1 - row0) * (col1 - col0)
                yield Piece(*origin, row1 - row0, col1 - col0, chunk.file, start, width * item, stored.dtype, place)

    def _chunks(self, stored: Stored, axes: int) -> dict[tuple[int, ...], list[Chunk]]:
        found = self._by_lead.get(stored.name)
        if found is None:
            found = self._by_lead[stored.name] = {}
            for chunk in stored.chunks:
                spans = zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)
                for lead in product(*(range(offset, offset + size) for offset, size in spans)):
                    found.setdefault(lead, []).append(chunk)
        return found


def _offsets(chunk: Chunk, axes: int) -> tuple[int, int]:
    rest = chunk.offsets[axes:]
    return (rest[0] if rest else 0), (rest[1] if len(rest) > 1 else 0)


def _sizes(chunk: Chunk, axes: int) -> tuple[int, int]:
    rest = chunk.sizes[axes:]
    return (rest[0] if rest else 1), (rest[1] if len(rest) > 1 else 1)


class HfSource(Source):
    """The tensors of a Hugging Face checkpoint."""

    def __init__(self, archive: Archive, table: Correspondence) -> None:
        """Raises UserError for tensors that are missing, not of this model, or of another shape, and for scales
        without their tensor or the other way round.
        """
        super().__init__(archive)
        self.table = table
        tensors = archive.tensors
        scales = {name for name in tensors if name.endswith(SCALE)}
        missing = [name for name in table.hf_names if name not in tensors and not table.may_be_missing(name)]
        present = table.names_in(tensors)
        known = {*table.hf_names, *table.optional}
        self.dropped: dict[str, str] = {}
        extra = []
        for name in tensors:
            owner = name.removesuffix(SCALE)
            if owner in known and (name not in scales or tensors.get(owner, _NOTHING).dtype == FP8):
                continue
            why = table.drop_reason(owner)
            if why is None:
                extra.append(name)
            else:
                self.dropped[name] = why
        where = f"{archive.folder}"
        no_scale = [n for n in present if tensors[n].dtype == FP8 and n + SCALE not in tensors]
        _refuse_unannounced(where, table, extra)
        _refuse(where, table, missing, extra)
        if no_scale:
            raise UserError(
                f"{where}: {_some(no_scale)} are FP8 without their `*{SCALE}`; the checkpoint is incomplete"
            )
        used_scales = [n for n in tensors if n in scales and n not in self.dropped]
        _refuse_dtypes(where, (tensors[n] for n in present), (*WEIGHTS, FP8))
        _refuse_dtypes(where, (tensors[n] for n in used_scales), SCALES, "block scales")
        shapes = {n: (tensors[n].shape, table.hf_shape(n)) for n in present}
        for n in used_scales:
            matrix = table.hf_shape(n.removesuffix(SCALE))
            shapes[n] = tensors[n].shape, scale_shape(matrix)
        _refuse_shapes(where, shapes)

    @property
    def quantised(self) -> bool:
        """Whether any tensor is FP8."""
        return any(tensor.dtype == FP8 for tensor in self.archive.tensors.values())

    def scale_of(self, name: str) -> Stored | None:
        """The scales of an FP8 tensor; None for another."""
        return self.archive.tensors[name + SCALE] if self.archive.tensors[name].dtype == FP8 else None

    def whole(self, name: str) -> tuple[Piece, ...]:
        """All of one tensor."""
        stored = self.archive.tensors[name]
        rows, cols = _matrix(stored.shape)
        return tuple(sorted(self.box(stored, (), range(rows), range(cols), (0, 0), self.scale_of(name)), key=_order))

    def megatron_box(self, entry: Entry, rows: range, cols: range) -> tuple[Piece, ...]:
        """Rows and columns of a Megatron tensor."""
        pieces: list[Piece] = []
        for run in entry.runs:
            first = max(rows.start, run.megatron_row)
            last = min(rows.stop, run.megatron_row + run.rows)
            if first < last:
                name, shift = entry.hf[run.tensor], run.hf_row - run.megatron_row
                source = range(first + shift, last + shift)
                stored = self.archive.tensors[name]
                pieces += self.box(stored, (), source, cols, (first - rows.start, 0), self.scale_of(name))
        return tuple(sorted(pieces, key=_order))

    def equal(self) -> tuple[tuple[Stored, Stored], ...]:
        """(tensor, its copy) for every copy that is there."""
        tensors = self.archive.tensors
        return tuple((tensors[of], tensors[name]) for name, of in self.table.copies.items() if name in tensors)


class MegatronSource(Source):
    """The model's tensors in a Megatron checkpoint of any layout."""

    def __init__(self, archive: Archive, table: Correspondence) -> None:
        """Raises UserError for tensors that are missing, not of this model, or of another shape."""
        super().__init__(archive)
        self.table = table
        self.dropped: dict[str, str] = {}
        self.padding: dict[str, int] = {}  # stored name -> elements behind the vocabulary
        self.places: dict[str, list[Place]] = {}
        extra = []
        for stored in archive.tensors.values():
            if not stored.name.startswith(MODEL):
                why = next((why for pattern, why in _BESIDE if pattern.match(stored.name)), None)
                if why is None:
                    extra.append(stored.name)
                else:
                    self.dropped[stored.name] = why
                continue
            for name, place in places(stored):
                if name in table.entries:
                    self.places.setdefault(name, []).append(place)
                elif not table.predictions and name.startswith("mtp."):
                    self.dropped[stored.name] = "multi-token prediction is left out"
                else:
                    extra.append(name)
        where = f"{archive.folder}"
        used = {place.stored.name: place.stored for found in self.places.values() for place in found}
        _refuse_dtypes(where, used.values(), WEIGHTS)
        if any(name.startswith("scalar_head.") for name in archive.tensors):
            raise UserError(f"{where} holds a reward model: it has a scalar head where a language model has its output")
        missing = [name for name in table.entries if name not in self.places]
        _refuse(where, table, missing, extra)
        twice = [name for name, found in self.places.items() if len(found) > 1 and found[0].half is None]
        if twice:
            raise UserError(f"{where}: {_some(twice)} are there more than once, under several spellings")
        _refuse_shapes(where, {name: self._shapes(name) for name in table.entries})

    def hf_tensor(self, name: str) -> tuple[Piece, ...]:
        """All of one Hugging Face tensor."""
        original = self.table.copies.get(name, name)
        entry, which = self.table.hf[original]
        pieces: list[Piece] = []
        for run in entry.runs:
            if run.tensor == which:
                rows = range(run.megatron_row, run.megatron_row + run.rows)
                pieces += self._rows(entry, rows, run.hf_row, range(entry.width or 1))
        if name != original:
            self.used.subtract({place.stored.name: prod(entry.shape) for place in self.places[entry.name]})
        return tuple(sorted(pieces, key=_order))

    def megatron_box(self, entry: Entry, rows: range, cols: range) -> tuple[Piece, ...]:
        """Rows and columns of one of its own tensors."""
        return tuple(sorted(self._rows(entry, rows, 0, cols), key=_order))

    def dtype(self, name: str) -> str:
        """Stored dtype of a Hugging Face tensor. Raises UserError where its parts have several."""
        entry, _ = self.table.hf[self.table.copies.get(name, name)]
        stored = [place.stored for place in self.places[entry.name]]
        return one_dtype(f"{self.archive.folder}: {name}", {each.name: each.dtype for each in stored})

    def _rows(self, entry: Entry, rows: range, at: int, cols: range) -> Iterator[Piece]:
        """Pieces of a box, placed from row `at` on."""
        for place in self.places[entry.name]:
            base = (place.half or 0) * entry.rows[0]
            stop = base + entry.rows[0] if place.half is not None else rows.stop
            first, last = max(rows.start, base), min(rows.stop, stop)
            if first < last:
                mine, at_row = range(first - base, last - base), at + first - rows.start
                yield from self.box(place.stored, place.lead, mine, cols, (at_row, 0), None)

    def _shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(found, expected), equal also where the vocabulary is padded."""
        entry, found = self.table.entries[name], self.places[name]
        shapes = [place.stored.shape[len(place.lead) :] for place in found]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(found) > 1 else shapes[0]
        if entry.rule.vocabulary and len(shape) == 2 and shape[0] >= entry.shape[0] and shape[1:] == entry.shape[1:]:
            if shape[0] > entry.shape[0]:
                self.padding[found[0].stored.name] = prod(shape) - prod(entry.shape)
            return entry.shape, entry.shape
        return shape, entry.shape


_NOTHING = Stored("", "", (), ())
_BESIDE = (
    (re.compile(r"(chained_\d+\.)?optimizer\."), "optimizer state"),
    (re.compile(r"reference\."), "the KL reference"),
    (re.compile(r"rng(_state)?([./]|$)"), "random states"),
    (re.compile(r"(opt_param_scheduler|scheduler|schedule)([./]|$)"), "the schedule of the learning rate"),
    (re.compile(r"rerun_state_machine"), "state of Megatron-LM's fault detection"),
)
"""What a training checkpoint holds beside the model: how names begin -> what that is."""


def check_coverage(target: Target) -> None:
    """Raise UserError where the pieces leave a hole in the target."""
    found = sum(piece.rows * piece.cols for piece in target.pieces)
    if found != prod(target.shape):
        raise UserError(
            f"{target.name}: its source holds {found} of its {prod(target.shape)} elements; is a file of the "
            "checkpoint missing?"
        )


def check_used(source: HfSource | MegatronSource) -> None:
    """Raise UserError unless every source tensor was used exactly once or is dropped by a rule.

    A copy is used where it is compared with its original, and made from that original in the other direction.
    """
    table = source.table
    for name, stored in source.archive.tensors.items():
        if name in source.dropped or name in table.copies or name.endswith(SCALE):
            continue
        due = prod(stored.shape)
        if isinstance(source, MegatronSource):
            due -= source.padding.get(name, 0)
        if source.used[name] != due:
            raise UserError(f"{source.archive.folder}: {source.used[name]} of {due} elements of {name} are used")


def one_dtype(where: str, dtypes: Mapping[str, str]) -> str:
    """The dtype that tensors have, by name. Raises UserError where they have several."""
    first, *rest = dtypes
    for name in rest:
        if dtypes[name] != dtypes[first]:
            raise UserError(
                f"{where} is made of tensors of several dtypes: {first} is {dtypes[first]}, {name} is {dtypes[name]}. "
                "Choose one for all weights with --dtype"
            )
    return dtypes[first]


def _refuse_dtypes(where: str, tensors: Iterable[Stored], allowed: Sequence[str], what: str = "weights") -> None:
    wrong = [f"{stored.name} is {stored.dtype}" for stored in tensors if stored.dtype not in allowed]
    if wrong:
        raise UserError(
            f"{where}: {_some(wrong)}; {what} may be {', '.join(allowed)}. Cast them, or copy the folder again"
        )


def _refuse(where: str, table: Correspondence, missing: Sequence[str], extra: Sequence[str]) -> None:
    if not missing and not extra:
        return
    lines = []
    if missing:
        lines.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if extra:
        lines.append(f"{len(extra)} tensors are not of this model: {_some(extra)}")
    cure = "Is config.json the one of these weights?"
    if missing and all(table.of_prediction(name) for name in missing):
        cure = (
            "The multi-token-prediction layer is not in this checkpoint: convert without it (--no-mtp; model.mtp = "
            "false in a recipe)"
        )
    raise UserError(f"{where} does not fit the {table.family.name} architecture: {'; '.join(lines)}. {cure}")


def _refuse_unannounced(where: str, table: Correspondence, extra: Sequence[str]) -> None:
    """Raise UserError for layers behind the last one, which config.json should call multi-token prediction."""
    layers = table.dims["layers"]
    behind = {int(match[1]) for name in extra if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    behind = {layer for layer in behind if layer >= layers}
    if behind and table.family.prediction and not table.dims["predictions"]:
        raise UserError(
            f"{where} has {len(behind)} layer(s) behind the {layers} that config.json's num_hidden_layers says, as "
            f"multi-token prediction has them ({_some(extra)}), but config.json does not announce them: add "
            f'"num_nextn_predict_layers": {len(behind)} to it; --no-mtp then leaves them out'
        )


def _refuse_shapes(where: str, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    wrong = [f"{name} is {list(is_)} instead of {list(due)}" for name, (is_, due) in shapes.items() if is_ != due]
    if wrong:
        raise UserError(f"{where}: {_some(wrong)}. Is config.json the one of these weights?")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
