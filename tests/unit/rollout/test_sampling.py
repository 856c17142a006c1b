"""Sampling against exact probabilities: supports, ties, edges, renormalised log-probs, and the random streams."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_r1.config.optim import SamplingConfig
from megatron_r1.rollout.sampling import UniformStreams, sample_tokens
from tests.reference.log_probs import sampling_distribution

LOGITS = [1.3, -0.4, 2.1, 0.0, -math.inf, 1.9, -2.0, 0.7, -0.4, 1.3]
ONE_BELOW = 1 - 2**-53  # the largest float64 under 1


def draw(logits: list[float], uniform: list[float], **sampling: float) -> tuple[list[int], list[float]]:
    """One token of these logits for every uniform number."""
    rows = torch.tensor([logits] * len(uniform), dtype=torch.float32)
    ids, log_probs = sample_tokens(rows, torch.tensor(uniform, dtype=torch.float64), SamplingConfig(**sampling))
    assert (ids.dtype, log_probs.dtype) == (torch.int64, torch.float32)
    return ids.tolist(), log_probs.tolist()


def grid(number: int) -> list[float]:
    """The middles of `number` equal parts of [0, 1)."""
    return [(i + 0.5) / number for i in range(number)]


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 50},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-9},
    {"top_k": 5, "top_p": 0.7},
    {"temperature": 0.6, "top_k": 6, "top_p": 0.95},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_support_and_its_log_probs_are_exact(setting: dict[str, float]) -> None:
    """An even grid of uniform numbers hits a token as often as its probability says, to one grid cell a token."""
    exact = sampling_distribution(LOGITS, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **setting})
    ids, log_probs = draw(LOGITS, grid(20_000), **setting)
    counts = np.bincount(ids, minlength=len(LOGITS)) / 20_000
    assert np.abs(counts - exact).max() <= 2 / 20_000
    found = dict(zip(ids, log_probs, strict=True))
    assert set(found) == {i for i, p in enumerate(exact) if p > 1e-4} and min(p for p in exact if p) > 1e-4
    assert sum(math.exp(x) for x in found.values()) == pytest.approx(1, abs=1e-6)
    for token, log_prob in found.items():
        assert log_prob == pytest.approx(math.log(exact[token]), abs=2e-6)


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 6}], ids=str)
def test_chi_square_with_the_real_streams(setting: dict[str, float]) -> None:
    """4000 completions' own numbers; the bound is the 99.9 % point for the largest number of tokens, 9 degrees."""
    exact = sampling_distribution(LOGITS, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **setting})
    streams = UniformStreams(5, [("chain_sum:1", j) for j in range(4000)])
    ids, _ = draw(LOGITS, streams.at(0, np.arange(4000)).tolist(), **setting)
    counts = np.bincount(ids, minlength=len(LOGITS))
    expected = 4000 * np.array(exact)
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    assert ((counts[some] - expected[some]) ** 2 / expected[some]).sum() < 27.9


def support(logits: list[float], **setting: float) -> set[int]:
    return set(draw(logits, grid(400), **setting)[0])


def test_ties_go_to_the_lower_ids() -> None:
    equal = [0.0] * 4
    assert support(equal, top_k=2) == {0, 1}
    assert support([0.0, 1.0, 1.0, 1.0], top_k=2) == {1, 2}
    assert support(equal, top_p=0.5) == {0, 1}  # two tokens reach it exactly: no third
    assert support(equal, top_p=0.51) == {0, 1, 2}
    assert support([0.0, 1.0, 1.0], top_p=0.1) == {1}


@pytest.mark.parametrize("probs", [[0.5, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1], [0.7, 0.2, 0.1], [0.1] * 10], ids=str)
def test_top_p_that_is_reached_exactly_takes_no_token_more(probs: list[float]) -> None:
    """The smallest set whose probability reaches top_p, in spite of rounding; a little more takes the next."""
    logits = [math.log(p) + 3.7 for p in probs]
    for size in range(1, len(probs)):
        mass = round(sum(probs[:size]), 10)
        assert support(logits, top_p=mass) == set(range(size))
        assert support(logits, top_p=mass + 1e-5) == set(range(size + 1))


def test_top_p_of_one_keeps_the_least_likely_token() -> None:
    logits = [20.0, 0.0, 0.0]
    assert draw(logits, [ONE_BELOW], top_p=1.0)[0] == [2]
    assert support([20.0, 0.0], top_p=1.0, top_k=1) == {0}


def test_top_p_counts_what_top_k_left() -> None:
    """Of 0.4, 0.3, 0.2, 0.1 top-k 2 leaves 4/7 and 3/7; 0.5 is reached by the first alone."""
    logits = [math.log(p) for p in (0.1, 0.2, 0.3, 0.4)]
    assert support(logits, top_k=2, top_p=0.5) == {3}
    assert support(logits, top_p=0.5) == {2, 3}


@pytest.mark.parametrize("setting", [{}, {"top_k": 3}, {"top_p": 0.99}], ids=str)
def test_the_edges_never_pick_an_impossible_token(setting: dict[str, float]) -> None:
    low, high = -math.inf, 0.3
    for places in itertools.combinations(range(5), 2):
        logits = [high if i in places else low for i in range(5)]
        ids, log_probs = draw(logits, [0.0, ONE_BELOW], **setting)
        assert ids == list(places)
        assert log_probs == pytest.approx([-math.log(2)] * 2, abs=1e-6)


def test_tiny_probabilities_at_the_end_do_not_break_the_edge() -> None:
    logits = [0.0] + [-200.0] * 50_000 + [-math.inf]
    ids, log_probs = draw(logits, [0.0, 0.5, ONE_BELOW])
    assert ids == [0, 0, 0] and log_probs == pytest.approx([0.0] * 3, abs=1e-6)


def test_low_precision_logits_are_computed_in_float32() -> None:
    rows = torch.tensor([LOGITS]).bfloat16()
    ids, log_probs = sample_tokens(rows, torch.tensor([0.4], dtype=torch.float64), SamplingConfig())
    again, expected = draw(rows[0].float().tolist(), [0.4])
    assert (ids.tolist(), log_probs.tolist()) == (again, expected)


def test_rows_are_independent() -> None:
    rows = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sampling = SamplingConfig(top_p=0.8, temperature=0.9)
    together = sample_tokens(rows.clone(), uniform, sampling)
    for i in range(6):
        alone = sample_tokens(rows[i : i + 1].clone(), uniform[i : i + 1], sampling)
        assert together[0][i] == alone[0][0]
        torch.testing.assert_close(together[1][i], alone[1][0], rtol=0, atol=1e-6)


def all_numbers(seed: int, keys: list[tuple[str, int]], length: int) -> np.ndarray:
    streams = UniformStreams(seed, keys)
    return np.stack([streams.at(t, np.arange(len(keys))).numpy() for t in range(length)])


def test_a_completion_has_its_numbers_whatever_its_batch() -> None:
    keys = [("a", 0), ("a", 1), ("b", 0), ("c", 5)]
    together = all_numbers(9, keys, 200)
    for column, key in enumerate(keys):
        assert np.array_equal(all_numbers(9, [key], 200)[:, 0], together[:, column])
    assert np.array_equal(all_numbers(9, keys[::-1], 200), together[:, ::-1])


def test_rows_that_are_gone_are_skipped() -> None:
    keys = [("a", 0), ("b", 0), ("c", 0)]
    streams, whole = UniformStreams(9, keys), all_numbers(9, keys, 300)
    for position, rows in ((0, [0, 1, 2]), (5, [2, 0]), (63, [1]), (64, [1, 2]), (250, [2])):
        assert streams.at(position, np.array(rows)).tolist() == whole[position, rows].tolist()


def test_seeds_prompts_and_numbers_differ() -> None:
    keys = [("p:1", 0), ("p:1", 1), ("p:11", 0), ("p", 10), ("p:1", 10)]
    columns = [*all_numbers(1, keys, 50).T, *all_numbers(2, keys, 50).T]
    for a, b in itertools.combinations(columns, 2):
        assert not np.isclose(a, b).any()


def test_numbers_are_uniform() -> None:
    numbers = all_numbers(3, [("p", j) for j in range(500)], 20).ravel()
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 99.9 % point of chi-square with 19 degrees of freedom


def test_the_numbers_are_pinned() -> None:
    """A change of the generator or of its key would change every sampled completion of a given seed."""
    found = all_numbers(1234, [("chain_sum:17", 3)], 65)[[0, 1, 64], 0]
    assert found.tolist() == [0.14217462029581895, 0.43969346800355347, 0.2566304202420573]
