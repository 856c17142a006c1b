"""Every tensor by hand, packed and padded; every sample once; context slices; and values of tokens back again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_r1.data.batching import MicroBatch, make_micro_batches, unpad
from megatron_r1.types import Sample

PACKED = pytest.mark.parametrize("packed", [False, True])


def sample(length: int, prompt: int = 1, base: int = 0, **keys: Any) -> Sample:
    """Tokens base + 10, base + 11, ..."""
    tokens = [base + 10 + i for i in range(length)]
    return Sample(token_ids=tokens, prompt_length=prompt, **keys)


def tensors(batch: MicroBatch) -> dict[str, Tensor]:
    values = {name: getattr(batch, name) for name in MicroBatch.__slots__}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def check(batch: MicroBatch, expected: dict[str, Tensor]) -> None:
    """Exactly these tensors, values and dtypes."""
    found = tensors(batch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), (name, found[name])


def short_and_long() -> list[Sample]:
    short = Sample(
        token_ids=[9, 3],
        prompt_length=1,
        advantage=2.0,
        rollout_log_probs=[-0.7],
        old_log_probs=[-0.8],
        reference_log_probs=[-0.9],
    )
    long = Sample(
        token_ids=[5, 6, 7, 8],
        prompt_length=2,
        advantage=-1.5,
        rollout_log_probs=[-0.1, -0.2],
        old_log_probs=[-0.3, -0.4],
        reference_log_probs=[-0.5, -0.6],
    )
    return [short, long]


def entries() -> dict[str, Tensor]:
    """What does not depend on the layout, the long sample first."""
    return {
        "targets_NL": torch.tensor([[7, 8], [3, 0]]),
        "rollout_log_probs_NL": torch.tensor([[-0.1, -0.2], [-0.7, 0]]),
        "old_log_probs_NL": torch.tensor([[-0.3, -0.4], [-0.8, 0]]),
        "reference_log_probs_NL": torch.tensor([[-0.5, -0.6], [-0.9, 0]]),
        "advantages_N": torch.tensor([-1.5, 2.0]),
        "learned_N": torch.tensor([2, 1]),
    }


def test_padded_tensors_by_hand() -> None:
    ((batch,),) = make_micro_batches(short_and_long(), 12, 0, packed=False, multiple_of=3, mtp_depths=2)
    expected = {
        "tokens_BT": torch.tensor([[5, 6, 7, 8, 0, 0], [9, 3, 0, 0, 0, 0]]),
        "positions_BT": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
        "valid_BT": torch.tensor([[True] * 4 + [False] * 2, [True] * 2 + [False] * 4]),
        "last_N": torch.tensor([3, 7]),
        "where_NL": torch.tensor([[1, 2], [6, -1]]),
        "ahead_DNL": torch.tensor([[[0, 1], [-1, -1]], [[-1, 0], [-1, -1]]]),
    }
    check(batch, entries() | expected)
    assert batch.sample_indices == [1, 0]
    assert batch.bounds is None
    assert batch.padded_tokens == 12
    assert batch.mask_NL.tolist() == [[True, True], [True, False]]


def test_packed_tensors_by_hand() -> None:
    """Segments of 6 (two of them padding) and 3, and a last one of 3: the row is a multiple of 4 and of 3."""
    keys = dict(packed=True, sequence_multiple_of=3, multiple_of=4, mtp_depths=2)
    ((batch,),) = make_micro_batches(short_and_long(), 12, 77, **keys)
    expected = {
        "tokens_BT": torch.tensor([[5, 6, 7, 8, 77, 77, 9, 3, 77, 77, 77, 77]]),
        "positions_BT": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2]]),
        "valid_BT": torch.tensor([[True] * 4 + [False] * 2 + [True] * 2 + [False] * 4]),
        "last_N": torch.tensor([3, 7]),
        "where_NL": torch.tensor([[1, 2], [6, -1]]),
        "ahead_DNL": torch.tensor([[[0, 1], [-1, -1]], [[-1, 0], [-1, -1]]]),
    }
    check(batch, entries() | expected)
    assert batch.sample_indices == [1, 0]
    assert batch.bounds == [0, 6, 9, 12]
    assert batch.padded_tokens == 12


def test_packed_without_padding_has_no_segment_of_it() -> None:
    ((batch,),) = make_micro_batches(short_and_long(), 12, 0, packed=True)
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 8, 9, 3]]
    assert batch.bounds == [0, 4, 6]
    assert batch.valid_BT.all()
    assert batch.where_NL.tolist() == [[1, 2], [4, -1]]


def test_fixed_length_makes_every_row_as_long_as_the_longest() -> None:
    keys = {"packed": True, "fixed_length": True, "multiple_of": 4, "shards": 3}
    plan = make_micro_batches(short_and_long(), 7, 0, **keys)
    assert [[batch.tokens_BT.shape for batch in shard] for shard in plan] == [[(1, 4)]] * 3
    assert [shard[0].bounds for shard in plan] == [[0, 4], [0, 2, 4], [0, 4]]
    plan = make_micro_batches([sample(4), sample(2), sample(9)], 7, 0, **keys)  # longer than the budget
    assert {batch.tokens_BT.shape for shard in plan for batch in shard} == {(1, 12)}
    with pytest.raises(ValueError, match="fixed_length needs packed micro-batches"):
        make_micro_batches(short_and_long(), 7, 0, packed=False, fixed_length=True)


@PACKED
def test_own_loss_mask_rules_and_its_first_entry_counts_for_nothing(packed: bool) -> None:
    """Tokens 10 .. 14, response 12, 13, 14; learned are 11 (of the prompt) and 14."""
    masked = sample(5, prompt=2, loss_mask=[1, 1, 0, 0, 1], old_log_probs=[-2.0, -3.0, -4.0])
    ((batch,),) = make_micro_batches([masked], 8, 0, packed=packed)
    assert batch.where_NL.tolist() == [[0, 3]]
    assert batch.targets_NL.tolist() == [[11, 14]]
    assert batch.learned_N.tolist() == [2]
    assert batch.old_log_probs_NL is not None
    assert batch.old_log_probs_NL.tolist() == [[0.0, -4.0]]
    # Back in the form of the sample's own lists: the response, 0 where it is not learned.
    assert unpad(torch.tensor([[-8.0, -9.0]]), batch, [masked]) == {0: [0.0, 0.0, -9.0]}


@PACKED
def test_empty_response_is_kept_and_learns_nothing(packed: bool) -> None:
    one = sample(3, prompt=3, old_log_probs=[])
    ((batch,),) = make_micro_batches([one], 8, 0, packed=packed)
    assert batch.tokens_BT.tolist() == [[10, 11, 12]]
    assert batch.where_NL.shape == (1, 0)
    assert batch.learned_N.tolist() == [0]
    assert unpad(batch.targets_NL, batch, [one]) == {0: []}


def test_absent_log_probs_are_none() -> None:
    ((batch,),) = make_micro_batches([sample(3, rollout_log_probs=[-1.0, -2.0])], 8, 0, packed=True)
    assert batch.rollout_log_probs_NL is not None
    assert batch.old_log_probs_NL is None and batch.reference_log_probs_NL is None and batch.experts_BTKk is None


def experts(length: int, base: int) -> np.ndarray:
    """[length, 2 layers, 1 choice], all different."""
    return np.arange(base, base + 2 * length, dtype=np.int16).reshape(length, 2, 1)


@pytest.mark.parametrize(
    ("packed", "rows"),
    [
        (True, [[[0, 1], [2, 3], [4, 5], [-1, -1], [-1, -1], [-1, -1]]]),
        (False, [[[0, 1], [2, 3], [4, 5], [-1, -1]], [[-1, -1], [-1, -1], [-1, -1], [-1, -1]]]),
    ],
)
def test_experts_follow_their_tokens_and_are_unknown_elsewhere(packed: bool, rows: list[Any]) -> None:
    """Also the last token's, which predicts nothing; a sample without any, padding and fillers give -1."""
    samples = [sample(3, routed_experts=experts(3, 0)), sample(2)]
    ((batch,),) = make_micro_batches(samples, 8, 0, packed=packed, multiple_of=2)
    assert batch.experts_BTKk is not None and batch.experts_BTKk.dtype == torch.int16
    assert batch.experts_BTKk.squeeze(-1).tolist() == rows
    plan = make_micro_batches(samples, 8, 0, packed=packed, multiple_of=2, shards=3)
    filler = plan[2][0].experts_BTKk
    assert filler is not None
    assert filler.tolist() == [[[[-1], [-1]]] * 2]


def random_samples(count: int, longest: int, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        length = rng.randint(2, longest)
        prompt = rng.randint(1, length - 1)
        samples.append(
            Sample(
                token_ids=[rng.randint(2, 90) for _ in range(length)],
                prompt_length=prompt,
                advantage=rng.gauss(0, 1),
                old_log_probs=[-rng.random() for _ in range(length - prompt)],
            )
        )
    return samples


@PACKED
@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize(("max_tokens", "multiple_of", "sequence_multiple_of"), [(1, 1, 1), (64, 8, 4), (512, 3, 2)])
def test_properties(
    packed: bool, count: int, shards: int, max_tokens: int, multiple_of: int, sequence_multiple_of: int
) -> None:
    samples = random_samples(count, longest=60, seed=count)
    keys: dict[str, Any] = dict(multiple_of=multiple_of, sequence_multiple_of=sequence_multiple_of, shards=shards)
    plan = make_micro_batches(samples, max_tokens, 0, packed=packed, count_multiple_of=2, **keys)
    assert len(plan) == shards
    assert len({len(shard) for shard in plan}) == 1  # all ranks step together
    assert len(plan[0]) % 2 == 0
    seen: list[int] = []
    gathered: dict[int, list[float]] = {}
    for batch in (batch for shard in plan for batch in shard):
        rows, length = batch.tokens_BT.shape
        assert length % multiple_of == 0 and length % sequence_multiple_of == 0
        assert rows * length <= max_tokens or len(batch.sample_indices) <= 1
        assert rows == (1 if packed else max(1, len(batch.sample_indices)))
        assert bool(batch.valid_BT.any()) == bool(batch.sample_indices)
        assert (batch.tokens_BT[~batch.valid_BT] == 0).all()
        if batch.bounds is not None:
            assert batch.bounds == sorted(set(batch.bounds)) and batch.bounds[0] == 0 and batch.bounds[-1] == length
            assert all(bound % sequence_multiple_of == 0 for bound in batch.bounds)
            assert len(batch.bounds) - 1 - len(batch.sample_indices) in (0, 1)  # at most one segment of padding
        seen += batch.sample_indices
        assert batch.old_log_probs_NL is not None
        gathered |= unpad(batch.old_log_probs_NL, batch, samples)
        for n, index in enumerate(batch.sample_indices):
            one = samples[index]
            start = batch.bounds[n] if batch.bounds else n * length
            flat = slice(start, start + len(one.token_ids))
            assert batch.tokens_BT.flatten()[flat].tolist() == one.token_ids
            assert batch.valid_BT.flatten()[flat].all()
            assert batch.positions_BT.flatten()[flat].tolist() == list(range(len(one.token_ids)))
            held = batch.mask_NL[n]
            assert batch.targets_NL[n][held].tolist() == one.token_ids[one.prompt_length :]
            assert torch.equal(batch.tokens_BT.flatten()[batch.where_NL[n][held] + 1], batch.targets_NL[n][held])
            assert batch.advantages_N[n] == torch.tensor(one.advantage)
    assert sorted(seen) == list(range(count))
    assert sum(int(batch.valid_BT.sum()) for shard in plan for batch in shard) == sum(
        len(one.token_ids) for one in samples
    )
    for index, one in enumerate(samples):
        assert one.old_log_probs is not None
        assert gathered[index] == torch.tensor(one.old_log_probs).tolist()  # float32, bit for bit


@pytest.mark.parametrize(("packed", "bounds"), [(True, [0, 4]), (False, None)])
def test_fillers_where_there_are_fewer_samples_than_shards(packed: bool, bounds: list[int] | None) -> None:
    plan = make_micro_batches([sample(4), sample(7)], 64, 3, packed=packed, multiple_of=4, shards=4, mtp_depths=1)
    assert [shard[0].sample_indices for shard in plan] == [[1], [0], [], []]
    expected = {
        "tokens_BT": torch.tensor([[3, 3, 3, 3]]),
        "positions_BT": torch.tensor([[0, 1, 2, 3]]),
        "valid_BT": torch.zeros(1, 4, dtype=torch.bool),
        "where_NL": torch.zeros(0, 0, dtype=torch.int64),
        "targets_NL": torch.zeros(0, 0, dtype=torch.int64),
        "ahead_DNL": torch.zeros(1, 0, 0, dtype=torch.int64),
        "advantages_N": torch.zeros(0),
        "learned_N": torch.zeros(0, dtype=torch.int64),
        "last_N": torch.zeros(0, dtype=torch.int64),
    }
    check(plan[3][0], expected)
    assert plan[3][0].bounds == bounds
    assert unpad(torch.zeros(0, 0), plan[3][0], []) == {}


@PACKED
def test_no_samples(packed: bool) -> None:
    assert make_micro_batches([], 64, 0, packed=packed, shards=3) == [[], [], []]


@PACKED
def test_one_shard_alone_is_the_same_and_it_is_deterministic(packed: bool) -> None:
    samples = random_samples(50, 40, seed=1)
    keys: dict[str, Any] = dict(packed=packed, multiple_of=4, shards=2)
    whole = make_micro_batches(samples, 256, 0, **keys)
    alone = make_micro_batches(samples, 256, 0, **keys, only_shard=1)
    assert alone[0] == []
    for one, other in zip(whole[1], alone[1], strict=True):
        assert one.sample_indices == other.sample_indices
        assert one.bounds == other.bounds
        check(one, tensors(other))


def test_context_slices_by_hand() -> None:
    """Two ranks: of each segment of four tokens one holds 0 and 3, the other 1 and 2."""
    one = sample(4, prompt=1, routed_experts=experts(4, 0))  # 10 .. 13
    two = sample(2, prompt=1, base=50)  # 60, 61
    ((batch,),) = make_micro_batches([one, two], 8, 0, packed=True, sequence_multiple_of=4, mtp_depths=1)
    assert batch.where_NL.tolist() == [[0, 1, 2], [4, -1, -1]]
    first, second = (batch.context_slice(2, rank) for rank in range(2))
    assert first.tokens_BT.tolist() == [[10, 13, 60, 0]]
    assert second.tokens_BT.tolist() == [[11, 12, 61, 0]]
    assert first.positions_BT.tolist() == [[0, 3, 0, 3]]
    assert second.positions_BT.tolist() == [[1, 2, 1, 2]]
    assert second.valid_BT.tolist() == [[True, True, True, False]]
    assert first.where_NL.tolist() == [[0, -1, -1], [2, -1, -1]]  # 11 is predicted by 10, 61 by 60
    assert second.where_NL.tolist() == [[-1, 0, 1], [-1, -1, -1]]  # 12 by 11, 13 by 12
    assert first.ahead_DNL.tolist() == [[[-1, 0, -1], [-1, -1, -1]]]  # two before 12 stands 10
    assert second.ahead_DNL.tolist() == [[[-1, -1, 0], [-1, -1, -1]]]  # two before 13 stands 11
    assert first.experts_BTKk is not None
    assert first.experts_BTKk.squeeze(-1).tolist() == [[[0, 1], [6, 7], [-1, -1], [-1, -1]]]
    assert first.bounds == second.bounds == [0, 4, 8]
    for part in (first, second):
        assert torch.equal(part.targets_NL, batch.targets_NL) and torch.equal(part.learned_N, batch.learned_N)
    assert batch.context_slice(1, 0) is batch
    with pytest.raises(ValueError, match="a segment of 4 tokens does not divide by 2 x context size 3"):
        batch.context_slice(3, 0)


def test_context_slices_of_padded_rows_by_hand() -> None:
    ((batch,),) = make_micro_batches([sample(4), sample(2, base=50)], 8, 0, packed=False, sequence_multiple_of=4)
    first, second = (batch.context_slice(2, rank) for rank in range(2))
    assert first.tokens_BT.tolist() == [[10, 13], [60, 0]]
    assert second.tokens_BT.tolist() == [[11, 12], [61, 0]]
    assert first.where_NL.tolist() == [[0, -1, -1], [2, -1, -1]]
    assert second.where_NL.tolist() == [[-1, 0, 1], [-1, -1, -1]]
    assert first.bounds is None


def test_unpad_takes_each_samples_own_entries() -> None:
    samples = [sample(3, prompt=2), sample(5, prompt=1)]
    ((batch,),) = make_micro_batches(samples, 64, 0, packed=True)
    values = torch.arange(8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    assert unpad(values, batch, samples) == {1: [0.0, 1.0, 2.0, 3.0], 0: [4.0]}
    with pytest.raises(ValueError, match=r"values of shape \(2, 3\) do not fit entries of \(2, 4\)"):
        unpad(torch.zeros(2, 3), batch, samples)


def test_to_moves_every_tensor() -> None:
    one = sample(3, old_log_probs=[-1.0, -2.0], routed_experts=experts(3, 0))
    ((batch,),) = make_micro_batches([one], 8, 0, packed=True)
    moved = batch.to("meta")
    assert all(value.device.type == "meta" for value in tensors(moved).values())
    assert set(tensors(moved)) == set(tensors(batch))
    assert moved.sample_indices == [0] and moved.bounds == [0, 3]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([sample(3, prompt=0)], "sample 0: prompt_length 0 is not in 1..3"),
        ([sample(3), sample(3, prompt=4)], "sample 1: prompt_length 4 is not in 1..3"),
        ([sample(3, old_log_probs=[-1.0])], "old_log_probs has 1 entries for 2 response tokens"),
        ([sample(3, loss_mask=[1, 1])], "loss_mask has 2 entries for 3 tokens"),
        (
            [sample(3, rollout_log_probs=[-1.0, -2.0]), sample(3)],
            "1 of 2 samples carry rollout_log_probs; all or none must",
        ),
        ([sample(3, routed_experts=experts(2, 0))], r"routed_experts of shape \(2, 2, 1\) for 3 tokens"),
        (
            [sample(3, routed_experts=experts(3, 0)), sample(2, routed_experts=np.zeros((2, 2, 4), np.int16))],
            r"routed_experts have different layers or top-k: \[\(2, 1\), \(2, 4\)\]",
        ),
    ],
)
def test_misaligned_samples(samples: list[Sample], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_micro_batches(samples, 64, 0, packed=True)
