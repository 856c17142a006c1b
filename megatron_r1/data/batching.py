"""Samples -> packed or padded micro-batches for every data-parallel rank, and values of tokens back.

Between the algorithms (which give each `Sample` its advantage) and the optimizer step. What the model reads is a grid
of rows; what the loss reads is one entry per learned token, by sequence, with the place in the grid that predicts it.
So the loss is the same code, and the same number, however the sequences share rows, micro-batches and ranks.

Letters: B rows, T tokens of a row, N sequences of the micro-batch, L learned tokens of the sequence that has most,
D look-ahead depths (multi-token prediction), K mixture layers, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_r1.data.packing import Rows, cut, pack, round_up
from megatron_r1.parallel.context import zigzag
from megatron_r1.types import Sample

LOG_PROB_FIELDS = ("old_log_probs", "reference_log_probs", "rollout_log_probs")
"""Lists of a `Sample` over its response tokens; each becomes the tensor `<name>_NL`."""


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """Sequences that go through the model together; a filler is one row of padding alone, N = L = 0.

    Example: tokens [5, 6, 7] with P = 1 and [8, 9] with P = 1, packed: tokens_BT [[5, 6, 7, 8, 9]], positions_BT
    [[0, 1, 2, 0, 1]], bounds [0, 3, 5], where_NL [[0, 1], [3, -1]], targets_NL [[6, 7], [9, 0]], last_N [2, 4].
    """

    tokens_BT: Tensor  # int64; pad_id where valid_BT is False
    positions_BT: Tensor  # int64; 0, 1, 2, ... within each sequence; padding continues its segment's count
    valid_BT: Tensor  # bool; False at padding
    # Packed only (B = 1): ends of the row's segments, [0, e1, e2, ..., T]. Padding is the tail of a sequence's segment
    # or a last segment of its own. Always of the whole row, also in a context slice. None: each row is one sequence.
    bounds: list[int] | None

    # Entries stand at the left, in the order of the tokens
    where_NL: Tensor  # int64; b * T + t of the token that predicts the learned one; -1: no entry, or not in this slice
    targets_NL: Tensor  # int64; the learned token, 0 where there is no entry
    # int64 [D, N, L]; b * T + t from which depth d + 1 of multi-token prediction predicts the same target: d + 1 tokens
    # before where_NL in the same sequence; -1: there is none, or not in this slice
    ahead_DNL: Tensor
    last_N: Tensor  # int64; b * T + t of the sequence's last token; -1: not in this slice
    advantages_N: Tensor  # float32; one advantage a sequence
    learned_N: Tensor  # int64; learned tokens of the full sequence
    sample_indices: list[int]  # [N], of each sequence in the list that was batched

    # float32, each: 0 where there is no entry or the token is none of the response; None: the samples have none
    old_log_probs_NL: Tensor | None = None
    reference_log_probs_NL: Tensor | None = None
    rollout_log_probs_NL: Tensor | None = None
    experts_BTKk: Tensor | None = None  # int16; the experts to replay, -1: not known; None: no sample has any

    @property
    def mask_NL(self) -> Tensor:
        """[N, L] bool; True where this micro-batch, or this slice of it, holds a learned token."""
        return self.where_NL >= 0

    @property
    def padded_tokens(self) -> int:
        """B * T, what this micro-batch costs."""
        return self.tokens_BT.numel()

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with its tensors on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def context_slice(self, size: int, rank: int) -> MicroBatch:
        """What context-parallel rank `rank` of `size` holds; itself when size is 1.

        The model's side is cut along T, zig-zag within each segment (padded: within each row). `where_NL`,
        `ahead_DNL` and `last_N` become flat positions of the local [B, T / size] grid, -1 where another rank holds the
        token; the other entries of the loss stay whole.

        Raises:
            ValueError: a segment that does not divide by 2 * size.
        """
        if size == 1:
            return self
        length = self.tokens_BT.shape[1]
        device = self.tokens_BT.device
        held = torch.from_numpy(zigzag(self.bounds or [0, length], size, rank)).to(device)
        local_T = torch.full((length,), -1, device=device)
        local_T[held] = torch.arange(len(held), device=device)

        def localized(flat: Tensor) -> Tensor:
            local = local_T[flat % length]
            return torch.where((flat >= 0) & (local >= 0), flat // length * len(held) + local, -1)

        return replace(
            self,
            tokens_BT=self.tokens_BT[:, held],
            positions_BT=self.positions_BT[:, held],
            valid_BT=self.valid_BT[:, held],
            where_NL=localized(self.where_NL),
            ahead_DNL=localized(self.ahead_DNL),
            last_N=localized(self.last_N),
            experts_BTKk=None if self.experts_BTKk is None else self.experts_BTKk[:, held],
        )


def make_micro_batches(
    samples: Sequence[Sample],
    max_tokens: int,
    pad_id: int,
    *,
    packed: bool,
    multiple_of: int = 1,
    sequence_multiple_of: int = 1,
    fixed_length: bool = False,
    shards: int = 1,
    count_multiple_of: int = 1,
    mtp_depths: int = 0,
    together: int = 1,
    only_shard: int | None = None,
) -> list[list[MicroBatch]]:
    """Cut samples into micro-batches and deal them to data-parallel ranks.

    Every sample comes exactly once. All shards get the same number of micro-batches, fillers included, each list
    longest first, so the i-th ones, which run at the same time, are alike in size. Deterministic.

    Args:
        samples: optional log-prob lists must be present in all or in none; routed experts may be present in some.
        max_tokens: most tokens B * T of a micro-batch, padding included; a longer sample gets one of its own.
        pad_id: the token of padding.
        packed: sequences behind one another in one row (B = 1), else one row a sequence.
        multiple_of: T is rounded up to this (what tensor and context parallelism can split).
        sequence_multiple_of: segments (padded: rows) are rounded up to this: 2 x the context size.
        fixed_length: T is the same in all micro-batches of all shards, that of the longest row. Packed only.
        shards: data-parallel ranks.
        count_multiple_of: the number of micro-batches of a shard is a multiple of this.
        mtp_depths: D of `ahead_DNL`.
        together: each so many samples in a row (2: pairs) come in one micro-batch, next to one another.
        only_shard: build the tensors of this shard alone; the other lists stay empty.

    Returns:
        [shards] lists of micro-batches; all empty where there are no samples.

    Raises:
        ValueError: a sample whose lists do not fit its tokens, a list present in some samples only, fixed_length with
        padded rows.
    """
    for index, sample in enumerate(samples):
        _check_sample(sample, index)
    units = _unit_lengths(samples, together, sequence_multiple_of, packed=packed)
    row_multiple = lcm(multiple_of, sequence_multiple_of)
    if fixed_length and not packed:
        raise ValueError("fixed_length needs packed micro-batches, got packed = False")
    if packed:
        plan = pack(
            units,
            max_tokens,
            shards,
            sequence_multiple_of=sequence_multiple_of,
            multiple_of=multiple_of,
            count_multiple_of=count_multiple_of,
        )
    else:
        plan = cut(units, max_tokens // together, shards, multiple_of=row_multiple, count_multiple_of=count_multiple_of)
    longest = max(
        (sum(round_up(units[i], sequence_multiple_of) for i in row) for shard in plan for row in shard), default=0
    )
    collate = _Collate(
        pad_id=pad_id,
        packed=packed,
        sequence_multiple_of=sequence_multiple_of,
        row_multiple=row_multiple,
        least_length=round_up(max(1, longest), row_multiple) if fixed_length else row_multiple,
        mtp_depths=mtp_depths,
        log_prob_fields=_present_fields(samples),
        experts_shape=_experts_shape(samples),
    )
    return [
        [collate([unit * together + i for unit in units for i in range(together)], samples) for units in shard]
        if only_shard in (None, number)
        else []
        for number, shard in enumerate(plan)
    ]


def _unit_lengths(samples: Sequence[Sample], together: int, multiple_of: int, *, packed: bool) -> list[int]:
    """Tokens that samples which come together take of a packed row; padded: the longest, which they are padded to."""
    if len(samples) % together:
        raise ValueError(f"{len(samples)} samples do not divide into units of {together}")
    lengths = [len(sample.token_ids) for sample in samples]
    units = [lengths[i : i + together] for i in range(0, len(lengths), together)]
    if together == 1 or not packed:
        return [max(unit) for unit in units]
    return [sum(round_up(length, multiple_of) for length in unit) for unit in units]


def unpad(values_NL: Tensor, micro_batch: MicroBatch, samples: Sequence[Sample]) -> dict[int, list[float]]:
    """Values of learned tokens back as lists that fit `Sample.old_log_probs` and its like; a filler gives none.

    Args:
        values_NL: aligned with the micro-batch's own entries; under context parallelism summed over the slices.
        samples: the list that was batched.

    Returns:
        Index of the sample -> [R] values of its response tokens, rounded to float32; 0 at one that is not learned.
        Without a loss mask these are exactly the learned tokens.
    """
    if values_NL.shape != micro_batch.targets_NL.shape:
        raise ValueError(
            f"values of shape {tuple(values_NL.shape)} do not fit entries of {tuple(micro_batch.targets_NL.shape)}"
        )
    rows = values_NL.detach().to("cpu", torch.float32).numpy()
    found = {}
    for row, index in zip(rows, micro_batch.sample_indices, strict=True):
        sample = samples[index]
        learned = _learned(sample)
        response = np.zeros(len(sample.token_ids), dtype=np.float32)
        response[learned] = row[: len(learned)]
        found[index] = response[sample.prompt_length :].tolist()
    return found


def _learned(sample: Sample) -> np.ndarray:
    """Places of the learned tokens in the sequence, ascending; never 0, which nothing predicts."""
    if sample.loss_mask is None:
        return np.arange(sample.prompt_length, len(sample.token_ids))
    return np.flatnonzero(sample.loss_mask[1:]) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Collate:
    """Rows of a plan -> tensors; holds what all micro-batches of one call share."""

    pad_id: int
    packed: bool
    sequence_multiple_of: int
    row_multiple: int  # T is a multiple of this
    least_length: int  # T is at least this, a multiple of row_multiple too
    mtp_depths: int
    log_prob_fields: list[str]
    experts_shape: tuple[int, int] | None  # (MoE layers, top-k)

    def __call__(self, rows: Rows, samples: Sequence[Sample]) -> MicroBatch:
        chosen = [samples[index] for index in rows]
        sizes = [len(sample.token_ids) for sample in chosen]
        if self.packed:
            bounds = [0]
            for size in sizes:
                bounds.append(bounds[-1] + round_up(size, self.sequence_multiple_of))
            starts = bounds[:-1]  # flat position of each sequence's first token
            count, length = 1, max(self.least_length, round_up(bounds[-1], self.row_multiple))
            bounds += [length] if length > bounds[-1] else []
            positions_BT = np.concatenate([np.arange(end - start) for start, end in pairwise(bounds)]).reshape(
                1, length
            )
        else:
            count, length = max(1, len(rows)), round_up(max(sizes, default=1), self.row_multiple)
            starts = [row * length for row in range(len(rows))]
            positions_BT = np.tile(np.arange(length), (count, 1))
        tokens = np.full(count * length, self.pad_id, dtype=np.int64)
        valid = np.zeros(count * length, dtype=bool)
        for sample, start, size in zip(chosen, starts, sizes, strict=True):
            tokens[start : start + size] = sample.token_ids
            valid[start : start + size] = True
        return MicroBatch(
            tokens_BT=torch.from_numpy(tokens.reshape(count, length)),
            positions_BT=torch.from_numpy(positions_BT),
            valid_BT=torch.from_numpy(valid.reshape(count, length)),
            bounds=bounds if self.packed else None,
            advantages_N=torch.tensor([sample.advantage for sample in chosen], dtype=torch.float32),
            last_N=torch.tensor(
                [start + size - 1 for start, size in zip(starts, sizes, strict=True)], dtype=torch.int64
            ),
            sample_indices=list(rows),
            experts_BTKk=self._experts(chosen, starts, (count, length)),
            **self._entries(chosen, starts),
        )

    def _entries(self, chosen: Sequence[Sample], starts: Sequence[int]) -> dict[str, Tensor]:
        """The loss side: one entry per learned token."""
        learned = [_learned(sample) for sample in chosen]
        shape = len(chosen), max(map(len, learned), default=0)
        where = np.full(shape, -1)
        targets = np.zeros(shape, dtype=np.int64)
        ahead = np.full((self.mtp_depths, *shape), -1)
        log_probs = {name: np.zeros(shape, dtype=np.float32) for name in self.log_prob_fields}
        for n, (sample, start, places) in enumerate(zip(chosen, starts, learned, strict=True)):
            size = len(places)
            where[n, :size] = start + places - 1
            targets[n, :size] = np.asarray(sample.token_ids, dtype=np.int64)[places]
            for depth in range(self.mtp_depths):
                first = places - depth - 2  # within the sequence, like `places`
                ahead[depth, n, :size] = np.where(first >= 0, start + first, -1)
            inside = np.flatnonzero(places >= sample.prompt_length)
            for name, values in log_probs.items():
                response = np.asarray(getattr(sample, name), dtype=np.float32)
                values[n, inside] = response[places[inside] - sample.prompt_length]
        return {
            "where_NL": torch.from_numpy(where),
            "targets_NL": torch.from_numpy(targets),
            "ahead_DNL": torch.from_numpy(ahead),
            "learned_N": torch.tensor([len(places) for places in learned], dtype=torch.int64),
            **{f"{name}_NL": torch.from_numpy(values) for name, values in log_probs.items()},
        }

    def _experts(self, chosen: Sequence[Sample], starts: Sequence[int], shape: tuple[int, int]) -> Tensor | None:
        """[B, T, K, k] int16, -1 where no choice is known."""
        if self.experts_shape is None:
            return None
        experts = np.full((shape[0] * shape[1], *self.experts_shape), -1, dtype=np.int16)
        for sample, start in zip(chosen, starts, strict=True):
            if sample.routed_experts is not None:
                experts[start : start + len(sample.token_ids)] = sample.routed_experts
        return torch.from_numpy(experts.reshape(*shape, *self.experts_shape))


def _present_fields(samples: Sequence[Sample]) -> list[str]:
    """Log-prob fields that the samples carry: all of them or none."""
    present = []
    for name in LOG_PROB_FIELDS:
        have = sum(getattr(sample, name) is not None for sample in samples)
        if have not in (0, len(samples)):
            raise ValueError(f"{have} of {len(samples)} samples carry {name}; all or none must")
        if have:
            present.append(name)
    return present


def _experts_shape(samples: Sequence[Sample]) -> tuple[int, int] | None:
    """(MoE layers, top-k) of the routed experts; None where no sample has any."""
    shapes = {sample.routed_experts.shape[1:] for sample in samples if sample.routed_experts is not None}
    if len(shapes) > 1:
        raise ValueError(f"routed_experts have different layers or top-k: {sorted(shapes)}")
    return shapes.pop() if shapes else None


def _check_sample(sample: Sample, index: int) -> None:
    """The alignment that `Sample` promises."""
    size = len(sample.token_ids)
    if not 1 <= sample.prompt_length <= size:
        raise ValueError(f"sample {index}: prompt_length {sample.prompt_length} is not in 1..{size}, its tokens")
    if sample.loss_mask is not None and len(sample.loss_mask) != size:
        raise ValueError(f"sample {index}: loss_mask has {len(sample.loss_mask)} entries for {size} tokens")
    for name in LOG_PROB_FIELDS:
        values = getattr(sample, name)
        if values is not None and len(values) != sample.response_length:
            raise ValueError(
                f"sample {index}: {name} has {len(values)} entries for {sample.response_length} response tokens"
            )
    experts = sample.routed_experts
    if experts is not None and (experts.ndim != 3 or len(experts) != size):
        raise ValueError(f"sample {index}: routed_experts of shape {experts.shape} for {size} tokens")
