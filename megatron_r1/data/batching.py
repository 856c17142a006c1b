"""Samples -> padded micro-batches for every data-parallel rank, and per-token results back.

Between the algorithms (which give each `Sample` its advantage) and the optimizer step. Every rank
gets the same number of micro-batches, because pipeline and expert parallelism need all ranks to
step together, and about the same number of padded tokens.

Letters: B rows of a micro-batch, T padded length, P prompt length, R response length. All [B, T]
tensors share one alignment: position t speaks of token t + 1, the one that the logits at t predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_r1.types import Sample

LOG_PROB_FIELDS = ("old_log_probs", "reference_log_probs", "rollout_log_probs")
"""Per-token lists of a `Sample`; each becomes the tensor `<name>_BT`."""

Rows = list[int]
"""Indices of the samples in one micro-batch, longest first."""


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """Padded rows that go through the model together; a filler is one row of padding alone.

    Example: tokens [5, 6, 7] with P = 1: labels_BT [6, 7, pad], loss_mask_BT [1, 1, 0],
    positions_BT [0, 1, 2].
    """

    tokens_BT: Tensor  # int64; padded on the right with pad_id
    positions_BT: Tensor  # int64; 0, 1, 2, ... in each row
    labels_BT: Tensor  # int64; token t + 1, pad_id where there is none
    loss_mask_BT: Tensor  # float32; 1 where token t + 1 is learned
    advantages_B: Tensor  # float32; one advantage per completion
    lengths_B: Tensor  # int64; P + R, 0 in a filler
    response_lengths_B: Tensor  # int64; R, 0 in a filler
    sample_indices: list[int]  # of each row in the list that was batched; empty in a filler
    # float32, each: of token t + 1 where that is a response token, else 0; None: samples have none
    old_log_probs_BT: Tensor | None = None
    reference_log_probs_BT: Tensor | None = None
    rollout_log_probs_BT: Tensor | None = None

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


def make_micro_batches(
    samples: Sequence[Sample],
    max_tokens: int,
    pad_id: int,
    multiple_of: int = 1,
    shards: int = 1,
    count_multiple_of: int = 1,
) -> list[list[MicroBatch]]:
    """Cut samples into micro-batches and deal them to data-parallel ranks.

    Every sample comes exactly once. All shards get the same number of micro-batches, each list
    longest first, so the i-th ones, which run at the same time, are alike in size. Deterministic.

    Args:
        samples: optional log-prob lists must be present in all or in none.
        max_tokens: most padded tokens B * T of a micro-batch; a longer sample gets one of its own.
        pad_id: written behind each row.
        multiple_of: T is rounded up to this (what tensor and context parallelism can split).
        shards: data-parallel ranks.
        count_multiple_of: fillers make the number of micro-batches a multiple of this.

    Returns:
        [shards] lists of micro-batches; all empty where there are no samples.

    Raises:
        ValueError: a sample whose lists do not fit its tokens, or a list present in some samples
        only.
    """
    for index, sample in enumerate(samples):
        _check_sample(sample, index)
    present = _present_fields(samples)
    lengths = [len(sample.token_ids) for sample in samples]
    plan = _deal(_cut_evenly(lengths, max_tokens, multiple_of, shards), lengths, multiple_of, shards)
    count = _round_up(max(map(len, plan)), count_multiple_of)
    return [
        [_collate(rows, samples, present, pad_id, multiple_of) for rows in shard]
        + [_filler(present, pad_id, multiple_of) for _ in range(count - len(shard))]
        for shard in plan
    ]


def unpad(values_BT: Tensor, micro_batch: MicroBatch, samples: Sequence[Sample]) -> dict[int, list[float]]:
    """Per-token values of a micro-batch back as lists; a filler gives none.

    Args:
        values_BT: aligned as the micro-batch's own tensors are.
        samples: the list that was batched.

    Returns:
        Index of the sample -> the [R] values of its response tokens.
    """
    if values_BT.shape != micro_batch.tokens_BT.shape:
        raise ValueError(
            f"values of shape {tuple(values_BT.shape)} do not fit a micro-batch of {tuple(micro_batch.tokens_BT.shape)}"
        )
    rows = values_BT.detach().to("cpu", torch.float32)
    return {
        index: rows[row, _response_slice(samples[index])].tolist()
        for row, index in enumerate(micro_batch.sample_indices)
    }


def _response_slice(sample: Sample) -> slice:
    """Positions whose next token is a response token: [P - 1, P + R - 1)."""
    return slice(sample.prompt_length - 1, len(sample.token_ids) - 1)


def _cut_evenly(lengths: Sequence[int], max_tokens: int, multiple_of: int, shards: int) -> list[Rows]:
    """As few as max_tokens allows, rounded up to a multiple of `shards`, as even as they come."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fewest = len(_cut(order, lengths, max_tokens, multiple_of))
    target = -(-fewest // shards) * shards
    # The smallest budget that still needs no more than `target` makes them all about as large.
    low, high = multiple_of, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(order, lengths, middle, multiple_of)) <= target:
            high = middle
        else:
            low = middle + 1
    batches = _cut(order, lengths, high, multiple_of)
    while batches and len(batches) % shards:
        largest = max(batches, key=lambda rows: (len(rows) > 1, _cost(rows, lengths, multiple_of)))
        if len(largest) == 1:
            break  # only single rows are left: fillers make up the number
        batches.remove(largest)
        half = (len(largest) + 1) // 2
        batches += [largest[:half], largest[half:]]
    return batches


def _cut(order: Sequence[int], lengths: Sequence[int], max_tokens: int, multiple_of: int) -> list[Rows]:
    """Greedy from the longest on: as many rows as fit at the first one's padded length."""
    batches: list[Rows] = []
    start = 0
    while start < len(order):
        padded = _round_up(lengths[order[start]], multiple_of)
        rows = max(1, max_tokens // padded)
        batches.append(list(order[start : start + rows]))
        start += rows
    return batches


def _deal(batches: Sequence[Rows], lengths: Sequence[int], multiple_of: int, shards: int) -> list[list[Rows]]:
    """Largest first to the shard with the fewest tokens so far among those that have room."""
    room = -(-len(batches) // shards)
    plan: list[list[Rows]] = [[] for _ in range(shards)]
    loads = [0] * shards
    for rows in sorted(batches, key=lambda rows: (-_cost(rows, lengths, multiple_of), rows[0])):
        shard = min((i for i in range(shards) if len(plan[i]) < room), key=lambda i: (loads[i], i))
        plan[shard].append(rows)
        loads[shard] += _cost(rows, lengths, multiple_of)
    return plan


def _cost(rows: Rows, lengths: Sequence[int], multiple_of: int) -> int:
    """Padded tokens of a micro-batch; its first row is the longest."""
    return len(rows) * _round_up(lengths[rows[0]], multiple_of)


def _round_up(length: int, multiple_of: int) -> int:
    return -(-length // multiple_of) * multiple_of


def _collate(
    rows: Rows, samples: Sequence[Sample], present: Sequence[str], pad_id: int, multiple_of: int
) -> MicroBatch:
    """The tensors of one micro-batch."""
    chosen = [samples[index] for index in rows]
    length = _round_up(max(len(sample.token_ids) for sample in chosen), multiple_of)
    tokens_BT = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    loss_mask_BT = torch.zeros(len(rows), length)
    log_probs = {name: torch.zeros(len(rows), length) for name in present}
    for row, sample in enumerate(chosen):
        size = len(sample.token_ids)
        tokens_BT[row, :size] = torch.tensor(sample.token_ids, dtype=torch.int64)
        if sample.loss_mask is None:
            loss_mask_BT[row, _response_slice(sample)] = 1.0
        else:  # the mask of token 0 has no place: nothing predicts it
            loss_mask_BT[row, : size - 1] = torch.tensor(sample.loss_mask[1:], dtype=torch.float32)
        for name, values_BT in log_probs.items():
            values_BT[row, _response_slice(sample)] = torch.tensor(getattr(sample, name), dtype=torch.float32)
    return _assemble(
        tokens_BT,
        loss_mask_BT,
        pad_id,
        log_probs,
        advantages=[sample.advantage for sample in chosen],
        lengths=[len(sample.token_ids) for sample in chosen],
        response_lengths=[sample.response_length for sample in chosen],
        sample_indices=list(rows),
    )


def _filler(present: Sequence[str], pad_id: int, multiple_of: int) -> MicroBatch:
    """One row of padding, so that a rank without samples steps with the others."""
    tokens_BT = torch.full((1, multiple_of), pad_id, dtype=torch.int64)
    nothing_BT = torch.zeros(1, multiple_of)
    log_probs = {name: nothing_BT.clone() for name in present}
    return _assemble(tokens_BT, nothing_BT, pad_id, log_probs, [0.0], [0], [0], [])


def _assemble(
    tokens_BT: Tensor,
    loss_mask_BT: Tensor,
    pad_id: int,
    log_probs: dict[str, Tensor],
    advantages: list[float],
    lengths: list[int],
    response_lengths: list[int],
    sample_indices: list[int],
) -> MicroBatch:
    """Adds what follows from the tokens: positions and labels."""
    labels_BT = torch.full_like(tokens_BT, pad_id)
    labels_BT[:, :-1] = tokens_BT[:, 1:]
    return MicroBatch(
        tokens_BT=tokens_BT,
        positions_BT=torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT).contiguous(),
        labels_BT=labels_BT,
        loss_mask_BT=loss_mask_BT,
        advantages_B=torch.tensor(advantages, dtype=torch.float32),
        lengths_B=torch.tensor(lengths, dtype=torch.int64),
        response_lengths_B=torch.tensor(response_lengths, dtype=torch.int64),
        sample_indices=sample_indices,
        old_log_probs_BT=log_probs.get("old_log_probs"),
        reference_log_probs_BT=log_probs.get("reference_log_probs"),
        rollout_log_probs_BT=log_probs.get("rollout_log_probs"),
    )


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
