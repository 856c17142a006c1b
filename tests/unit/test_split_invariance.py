"""However samples share rows, micro-batches, ranks and context slices: the same entries, loss and gradient.

The reference takes one sample at a time, without batching.py and without policy_loss: a toy causal model on its tokens
alone, and the loss written out for one token. Everything in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1.algorithms.policy_loss import policy_loss
from megatron_r1.algorithms.weights import count, learned_tokens, token_weights
from megatron_r1.config.grpo import LossConfig
from megatron_r1.data.batching import MicroBatch, make_micro_batches
from megatron_r1.parallel.context import zigzag
from megatron_r1.types import Sample

VOCABULARY, WIDTH = 13, 4
DEPTHS = 2
TOLERANCE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Split:
    """A layout; Example: Split(packed=True, max_tokens=32, shards=2, context=4, multiple_of=3)."""

    packed: bool
    max_tokens: int
    shards: int = 1
    context: int = 1
    multiple_of: int = 1
    count_multiple_of: int = 1

    def batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """Of all shards."""
        plan = make_micro_batches(
            samples,
            self.max_tokens,
            pad_id=VOCABULARY - 1,
            packed=self.packed,
            shards=self.shards,
            multiple_of=self.multiple_of,
            sequence_multiple_of=2 * self.context if self.context > 1 else 1,
            count_multiple_of=self.count_multiple_of,
            mtp_depths=DEPTHS,
        )
        assert len({len(shard) for shard in plan}) == 1
        return [batch for shard in plan for batch in shard]


SPLITS = st.builds(
    Split,
    packed=st.booleans(),
    max_tokens=st.integers(1, 80),
    shards=st.integers(1, 4),
    context=st.sampled_from([1, 2, 4]),
    multiple_of=st.sampled_from([1, 3, 4]),
    count_multiple_of=st.integers(1, 2),
)
LOG_PROB = st.integers(-80, 0).map(lambda n: n / 16)  # exact in float32


@st.composite
def one_sample(draw: st.DrawFn) -> Sample:
    tokens = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=24))
    prompt = draw(st.integers(1, len(tokens)))
    response = len(tokens) - prompt
    return Sample(
        token_ids=tokens,
        prompt_length=prompt,
        advantage=draw(st.integers(-16, 16)) / 8,
        old_log_probs=draw(st.lists(LOG_PROB, min_size=response, max_size=response)),
        reference_log_probs=draw(st.lists(LOG_PROB, min_size=response, max_size=response)),
        loss_mask=draw(st.none() | st.lists(st.integers(0, 1), min_size=len(tokens), max_size=len(tokens))),
    )


SAMPLES = st.lists(one_sample(), min_size=1, max_size=10)


def learned_places(sample: Sample) -> list[int]:
    """Slow reference: the places of learned tokens in the sequence."""
    mask = sample.loss_mask or [0] * sample.prompt_length + [1] * sample.response_length
    return [place for place in range(1, len(sample.token_ids)) if mask[place]]


def at(values: list[float] | None, sample: Sample, place: int) -> float:
    """The sample's value at a place of the sequence, 0 in the prompt."""
    assert values is not None
    return values[place - sample.prompt_length] if place >= sample.prompt_length else 0.0


Parameters = dict[str, Tensor]


def parameters() -> Parameters:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    return {"embedding": draw(VOCABULARY, WIDTH), "query": draw(WIDTH, WIDTH), "head": draw(WIDTH, VOCABULARY)}


def log_probs_of_segment(p: Parameters, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
    """[T, vocabulary]: one causal attention over a segment, the position added as its sine."""
    x = p["embedding"][tokens_T] + torch.sin(positions_T.double())[:, None]
    scores = x @ p["query"] @ x.T
    causal = torch.ones_like(scores, dtype=torch.bool).tril()
    hidden = x + scores.masked_fill(~causal, -torch.inf).softmax(-1) @ x
    return (hidden @ p["head"]).log_softmax(-1)


def log_probs_of_grid(p: Parameters, batch: MicroBatch) -> Tensor:
    """[B, T, vocabulary], attention within each segment only."""
    bounds = batch.bounds or [0, batch.tokens_BT.shape[1]]
    rows = zip(batch.tokens_BT, batch.positions_BT, strict=True)
    return torch.stack(
        [
            torch.cat([log_probs_of_segment(p, tokens[a:b], positions[a:b]) for a, b in pairwise(bounds)])
            for tokens, positions in rows
        ]
    )


def slices(batch: MicroBatch, context: int) -> Iterator[tuple[MicroBatch, Tensor]]:
    """Each context rank's slice with the places of the row that it should hold."""
    bounds = batch.bounds or [0, batch.tokens_BT.shape[1]]
    for rank in range(context):
        yield batch.context_slice(context, rank), torch.from_numpy(zigzag(bounds, context, rank))


def loss_of_split(p: Parameters, samples: Sequence[Sample], split: Split, config: LossConfig) -> Tensor:
    """The sum over all ranks' micro-batches, as training adds it up."""
    denominators = count(samples)
    total = torch.zeros((), dtype=torch.float64)
    for batch in split.batches(samples):
        grid_BTV = log_probs_of_grid(p, batch)
        for part, held in slices(batch, split.context):
            local = grid_BTV[:, held].flatten(0, 1)
            log_probs_NL = local[part.where_NL.clamp(min=0), part.targets_NL]
            found = policy_loss(
                log_probs_NL,
                part.old_log_probs_NL,
                part.advantages_N,
                part.mask_NL,
                token_weights(part.mask_NL, part.learned_N, denominators, config, dtype=torch.float64),
                config,
                part.reference_log_probs_NL,
                part.learned_N,
            )
            total = total + found.loss
    return total


def loss_of_each(p: Parameters, samples: Sequence[Sample], config: LossConfig) -> Tensor:
    """Slow reference: token by token. DeepSeekMath (arXiv 2402.03300) eq. 3, DAPO (arXiv 2503.14476) eq. 8."""
    tokens = sum(len(learned_places(sample)) for sample in samples)
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        places = learned_places(sample)
        ids = torch.tensor(sample.token_ids)
        log_probs = log_probs_of_segment(p, ids, torch.arange(len(ids)))
        share = len(samples) * len(places) if config.aggregation == "sequence-mean" else tokens
        log_ratios = [log_probs[place - 1, ids[place]] - at(sample.old_log_probs, sample, place) for place in places]
        for place, log_ratio in zip(places, log_ratios, strict=True):
            if config.ratio == "sequence":
                log_ratio = torch.stack(log_ratios).mean()
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.epsilon_high)
            term = torch.minimum(ratio * sample.advantage, clipped * sample.advantage)
            gap = at(sample.reference_log_probs, sample, place) - log_probs[place - 1, ids[place]]
            total = total - (term - config.kl_coefficient * (gap.exp() - gap - 1)) / share
    return total


def gradients(loss: Tensor, p: Parameters) -> list[Tensor]:
    if not loss.requires_grad:  # nothing is learned
        return [torch.zeros_like(value) for value in p.values()]
    return list(torch.autograd.grad(loss, list(p.values()), materialize_grads=True))


def assert_same(p: Parameters, samples: Sequence[Sample], split: Split, config: LossConfig) -> None:
    wanted, found = loss_of_each(p, samples, config), loss_of_split(p, samples, split, config)
    wanted_gradients, found_gradients = gradients(wanted, p), gradients(found, p)
    scale = max(1.0, *(float(gradient.abs().max()) for gradient in wanted_gradients))
    assert float((found - wanted).detach().abs()) <= TOLERANCE * max(1.0, float(wanted.detach().abs()))
    for one, other in zip(wanted_gradients, found_gradients, strict=True):
        assert float((one - other).abs().max()) <= TOLERANCE * scale


CONFIGS = [
    LossConfig(kl_coefficient=0.1, clip_low=0.2),
    LossConfig(kl_coefficient=0.1, clip_low=0.2, clip_high=0.3, aggregation="token-mean"),
]


@settings(max_examples=100, deadline=None)
@given(samples=SAMPLES, split=SPLITS)
def test_every_learned_token_is_held_exactly_once(samples: list[Sample], split: Split) -> None:
    """With its target, its log-probs, its advantage, its sequence's count and the places that predict it."""
    wanted: dict[tuple[int, int], tuple[Any, ...]] = {}
    for index, sample in enumerate(samples):
        for place in learned_places(sample):
            wanted[index, place] = (
                sample.token_ids[place],
                at(sample.old_log_probs, sample, place),
                at(sample.reference_log_probs, sample, place),
                sample.advantage,
                learned_tokens(sample),
                *(place - 2 - depth if place >= 2 + depth else None for depth in range(DEPTHS)),
            )
    held: dict[tuple[int, int], tuple[Any, ...]] = {}
    for batch in split.batches(samples):
        length = batch.tokens_BT.shape[1]
        for n, index in enumerate(batch.sample_indices):
            start = batch.bounds[n] if batch.bounds else n * length
            size = len(samples[index].token_ids)
            assert batch.tokens_BT.flatten()[start : start + size].tolist() == samples[index].token_ids
            for where, ahead, *entry in zip(
                batch.where_NL[n].tolist(),
                batch.ahead_DNL[:, n].T.tolist(),
                batch.targets_NL[n].tolist(),
                batch.old_log_probs_NL[n].tolist(),
                batch.reference_log_probs_NL[n].tolist(),
                strict=True,
            ):
                if where < 0:
                    assert (ahead, entry) == ([-1] * DEPTHS, [0, 0, 0])
                    continue
                key = index, where - start + 1
                assert key not in held
                places = [flat - start if flat >= 0 else None for flat in ahead]
                held[key] = (*entry, float(batch.advantages_N[n]), int(batch.learned_N[n]), *places)
    assert held == wanted


@settings(max_examples=60, deadline=None)
@given(samples=SAMPLES, split=SPLITS.filter(lambda split: split.context > 1))
def test_context_slices_partition_tokens_and_entries(samples: list[Sample], split: Split) -> None:
    for batch in split.batches(samples):
        rows, length = batch.tokens_BT.shape
        owners = torch.zeros_like(batch.where_NL)
        owners_ahead = torch.zeros_like(batch.ahead_DNL)
        covered: list[int] = []
        for part, held in slices(batch, split.context):
            covered += held.tolist()
            assert torch.equal(part.tokens_BT, batch.tokens_BT[:, held])
            assert torch.equal(part.positions_BT, batch.positions_BT[:, held])
            assert torch.equal(part.valid_BT, batch.valid_BT[:, held])
            # The full row's flat position of each local one: an entry must point at the very place that it did.
            origin = (torch.arange(rows)[:, None] * length + held).flatten()
            for own, whole, owned in (
                (part.where_NL, batch.where_NL, owners),
                (part.ahead_DNL, batch.ahead_DNL, owners_ahead),
            ):
                mine = own >= 0
                assert torch.equal(origin[own[mine]], whole[mine])
                owned += mine
        assert sorted(covered) == list(range(length))
        assert torch.equal(owners, batch.mask_NL.long())
        assert torch.equal(owners_ahead, (batch.ahead_DNL >= 0).long())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.aggregation)
@settings(max_examples=40, deadline=None)
@given(samples=SAMPLES, split=SPLITS)
def test_loss_and_gradient_of_any_split(config: LossConfig, samples: list[Sample], split: Split) -> None:
    assert_same(parameters(), samples, split, config)


@settings(max_examples=30, deadline=None)
@given(samples=SAMPLES, split=SPLITS.filter(lambda split: split.context == 1))
def test_sequence_ratio_of_any_split(samples: list[Sample], split: Split) -> None:
    assert_same(parameters(), samples, split, LossConfig(ratio="sequence", clip_low=0.2, kl_coefficient=0.1))


@pytest.mark.parametrize(
    "damage",
    [
        lambda sample: setattr(sample, "advantage", sample.advantage + 1),
        lambda sample: setattr(sample, "old_log_probs", [value - 0.5 for value in sample.old_log_probs]),
        lambda sample: sample.token_ids.__setitem__(0, 1),
    ],
    ids=["advantage", "old log-prob", "token"],
)
def test_the_comparison_can_fail(damage: Any) -> None:
    """A change to one of the samples shows in the loss by far more than the tolerance."""

    def samples() -> list[Sample]:
        return [
            Sample(
                token_ids=[n, 5, 7, 2 + n],
                prompt_length=2,
                advantage=0.5,
                old_log_probs=[-2.0, -2.5],
                reference_log_probs=[-2.0, -2.5],
            )
            for n in range(3)
        ]

    p, changed = parameters(), samples()
    damage(changed[0])
    split = Split(packed=True, max_tokens=32, context=2)
    assert_same(p, samples(), split, LossConfig())
    difference = loss_of_split(p, changed, split, LossConfig()) - loss_of_each(p, samples(), LossConfig())
    assert float(difference.detach().abs()) > 1e-4
