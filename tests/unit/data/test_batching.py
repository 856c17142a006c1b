"""Every tensor by hand, every sample once, every shard alike, and back again."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_r1.data.batching import MicroBatch, make_micro_batches, unpad
from megatron_r1.types import Sample


def sample(length: int, prompt: int = 1, base: int = 0, **keys: Any) -> Sample:
    """Tokens base + 10, base + 11, ..."""
    tokens = [base + 10 + i for i in range(length)]
    return Sample(token_ids=tokens, prompt_length=prompt, **keys)


def tensors(batch: MicroBatch) -> dict[str, Tensor]:
    values = {name: getattr(batch, name) for name in MicroBatch.__slots__}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def test_tensors_by_hand() -> None:
    long = Sample(
        token_ids=[5, 6, 7, 8],
        prompt_length=2,
        advantage=-1.5,
        rollout_log_probs=[-0.1, -0.2],
        old_log_probs=[-0.3, -0.4],
        reference_log_probs=[-0.5, -0.6],
    )
    short = Sample(
        token_ids=[9, 3],
        prompt_length=1,
        advantage=2.0,
        rollout_log_probs=[-0.7],
        old_log_probs=[-0.8],
        reference_log_probs=[-0.9],
    )
    ((batch,),) = make_micro_batches([short, long], max_tokens=12, pad_id=0, multiple_of=3)
    expected = {
        "tokens_BT": torch.tensor([[5, 6, 7, 8, 0, 0], [9, 3, 0, 0, 0, 0]]),
        "positions_BT": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
        "labels_BT": torch.tensor([[6, 7, 8, 0, 0, 0], [3, 0, 0, 0, 0, 0]]),
        "loss_mask_BT": torch.tensor([[0.0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]),
        "rollout_log_probs_BT": torch.tensor([[0, -0.1, -0.2, 0, 0, 0], [-0.7, 0, 0, 0, 0, 0]]),
        "old_log_probs_BT": torch.tensor([[0, -0.3, -0.4, 0, 0, 0], [-0.8, 0, 0, 0, 0, 0]]),
        "reference_log_probs_BT": torch.tensor([[0, -0.5, -0.6, 0, 0, 0], [-0.9, 0, 0, 0, 0, 0]]),
        "advantages_B": torch.tensor([-1.5, 2.0]),
        "lengths_B": torch.tensor([4, 2]),
        "response_lengths_B": torch.tensor([2, 1]),
    }
    found = tensors(batch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    assert batch.sample_indices == [1, 0]
    assert batch.padded_tokens == 12


def test_pad_id_fills_tokens_and_last_labels() -> None:
    ((batch,),) = make_micro_batches([sample(3), sample(2)], max_tokens=8, pad_id=77, multiple_of=4)
    assert batch.tokens_BT.tolist() == [[10, 11, 12, 77], [10, 11, 77, 77]]
    assert batch.labels_BT.tolist() == [[11, 12, 77, 77], [11, 77, 77, 77]]


def test_own_loss_mask_is_shifted_and_first_entry_ignored() -> None:
    masked = sample(5, prompt=2, loss_mask=[1, 1, 0, 0, 1])
    ((batch,),) = make_micro_batches([masked], max_tokens=8, pad_id=0)
    assert batch.loss_mask_BT.tolist() == [[1, 0, 0, 1, 0]]


def test_empty_response_is_kept_and_learns_nothing() -> None:
    ((batch,),) = make_micro_batches([sample(3, prompt=3, old_log_probs=[])], 8, 0)
    assert batch.loss_mask_BT.sum() == 0
    assert batch.response_lengths_B.tolist() == [0]
    assert unpad(batch.loss_mask_BT, batch, [sample(3, prompt=3)]) == {0: []}


def test_absent_log_probs_are_none() -> None:
    ((batch,),) = make_micro_batches([sample(3, rollout_log_probs=[-1.0, -2.0])], 8, 0)
    assert batch.rollout_log_probs_BT is not None
    assert batch.old_log_probs_BT is None and batch.reference_log_probs_BT is None


def random_samples(count: int, longest: int, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        length = rng.randint(2, longest)
        prompt = rng.randint(1, length - 1)
        values = [-rng.random() for _ in range(length - prompt)]
        tokens = [rng.randint(2, 90) for _ in range(length)]
        samples.append(
            Sample(
                token_ids=tokens,
                prompt_length=prompt,
                advantage=rng.gauss(0, 1),
                old_log_probs=values,
            )
        )
    return samples


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 64, 200])
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("max_tokens", "multiple_of"), [(1, 1), (64, 1), (64, 8), (512, 4)])
def test_properties(count: int, shards: int, max_tokens: int, multiple_of: int) -> None:
    samples = random_samples(count, longest=60, seed=count)
    plan = make_micro_batches(samples, max_tokens, 0, multiple_of, shards)
    assert len(plan) == shards
    assert len({len(shard) for shard in plan}) == 1  # all ranks step together
    seen: list[int] = []
    gathered: dict[int, list[float]] = {}
    for shard in plan:
        assert [b.padded_tokens for b in shard] == sorted((b.padded_tokens for b in shard), reverse=True)
        for batch in shard:
            rows, length = batch.tokens_BT.shape
            assert length % multiple_of == 0
            assert rows * length <= max_tokens or rows == 1
            assert rows == max(1, len(batch.sample_indices))
            if not batch.sample_indices:  # a filler
                assert batch.loss_mask_BT.sum() == 0 and batch.lengths_B.tolist() == [0]
                assert batch.old_log_probs_BT is not None
                continue
            longest = int(batch.lengths_B.max())
            assert length - longest < multiple_of  # no more padding than asked for
            seen += batch.sample_indices
            assert batch.old_log_probs_BT is not None
            gathered |= unpad(batch.old_log_probs_BT, batch, samples)
            for row, index in enumerate(batch.sample_indices):
                tokens = batch.tokens_BT[row, : batch.lengths_B[row]].tolist()
                assert tokens == samples[index].token_ids
                # The mask picks, among the labels, exactly the response.
                learned = batch.labels_BT[row][batch.loss_mask_BT[row] == 1].tolist()
                assert learned == tokens[samples[index].prompt_length :]
                assert batch.advantages_B[row] == torch.tensor(samples[index].advantage)
    assert sorted(seen) == list(range(count))
    for index, one in enumerate(samples):
        assert one.old_log_probs is not None
        assert gathered[index] == torch.tensor(one.old_log_probs).tolist()  # float32, bit for bit


def loads(plan: list[list[MicroBatch]]) -> list[int]:
    return [sum(batch.padded_tokens for batch in shard) for shard in plan]


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_balance(shards: int) -> None:
    plan = make_micro_batches(random_samples(256, 120, seed=4), 1024, 0, 1, shards)
    found = loads(plan)
    assert max(found) <= 1.1 * min(found)
    padding = sum(found) / sum(int(b.lengths_B.sum()) for shard in plan for b in shard)
    assert padding < 1.15


def test_even_work_is_dealt_evenly() -> None:
    """Nine rows of 10 fit in three micro-batches of 30; two ranks get 50 and 40, not 60 and 30."""
    plan = make_micro_batches([sample(10) for _ in range(9)], 30, 0, 1, shards=2)
    assert sorted(loads(plan)) == [40, 50]
    assert [len(shard) for shard in plan] == [2, 2]


def test_splits_before_it_fills() -> None:
    """Eight short rows would fit in one micro-batch; four ranks get two rows each, no filler."""
    plan = make_micro_batches([sample(4) for _ in range(8)], 64, 0, 1, shards=4)
    assert [[b.tokens_BT.shape[0] for b in shard] for shard in plan] == [[2]] * 4


def test_fillers_where_there_are_fewer_samples_than_shards() -> None:
    plan = make_micro_batches([sample(4), sample(7)], 64, 3, 4, shards=4)
    assert [shard[0].sample_indices for shard in plan] == [[1], [0], [], []]
    filler = plan[3][0]
    assert filler.tokens_BT.tolist() == [[3, 3, 3, 3]]
    assert filler.labels_BT.tolist() == [[3, 3, 3, 3]]
    assert filler.loss_mask_BT.tolist() == [[0, 0, 0, 0]]
    assert filler.positions_BT.tolist() == [[0, 1, 2, 3]]
    assert filler.response_lengths_B.tolist() == [0]
    assert unpad(torch.ones(1, 4), filler, []) == {}


def test_no_samples() -> None:
    assert make_micro_batches([], 64, 0, 1, shards=3) == [[], [], []]


def test_a_sample_longer_than_the_budget_goes_alone() -> None:
    plan = make_micro_batches([sample(100), sample(4), sample(4)], 16, 0)
    assert [batch.sample_indices for batch in plan[0]] == [[0], [1, 2]]


def test_deterministic() -> None:
    samples = random_samples(50, 40, seed=1)
    one, other = (make_micro_batches(samples, 256, 0, 4, 2) for _ in range(2))
    for a, b in zip(one[0] + one[1], other[0] + other[1], strict=True):
        assert a.sample_indices == b.sample_indices
        assert all(torch.equal(x, y) for x, y in zip(tensors(a).values(), tensors(b).values(), strict=True))


def test_unpad_takes_the_response_only() -> None:
    samples = [sample(3, prompt=2), sample(5, prompt=1)]
    ((batch,),) = make_micro_batches(samples, 64, 0)
    values = torch.arange(10, dtype=torch.float64).reshape(2, 5).requires_grad_()
    # Row 0 is sample 1 (positions 0..3), row 1 is sample 0 (position 1).
    assert unpad(values, batch, samples) == {1: [0.0, 1.0, 2.0, 3.0], 0: [6.0]}
    with pytest.raises(ValueError, match=r"values of shape \(2, 4\) do not fit"):
        unpad(torch.zeros(2, 4), batch, samples)


def test_to_moves_every_tensor() -> None:
    ((batch,),) = make_micro_batches([sample(3, old_log_probs=[-1.0, -2.0])], 8, 0)
    moved = batch.to("meta")
    assert all(value.device.type == "meta" for value in tensors(moved).values())
    assert set(tensors(moved)) == set(tensors(batch))
    assert moved.sample_indices == [0]


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
    ],
)
def test_misaligned_samples(samples: list[Sample], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_micro_batches(samples, 64, 0)


@pytest.mark.parametrize("multiple", [1, 2, 3, 4])
def test_fillers_round_the_number_of_micro_batches_up(multiple: int) -> None:
    samples = [Sample(token_ids=list(range(1, 2 + n)), prompt_length=1) for n in range(1, 12)]
    plain = make_micro_batches(samples, max_tokens=24, pad_id=0, shards=2)
    rounded = make_micro_batches(samples, max_tokens=24, pad_id=0, shards=2, count_multiple_of=multiple)
    assert len(rounded[0]) == len(rounded[1]) == -(-len(plain[0]) // multiple) * multiple
    for before, after in zip(plain, rounded, strict=True):
        assert [b.sample_indices for b in before] == [b.sample_indices for b in after[: len(before)]]
        assert all(b.sample_indices == [] and b.loss_mask_BT.sum() == 0 for b in after[len(before) :])
