"""The in-process engine on one process: what a completion is does not depend on its company."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, TokenizerConfig
from megatron_r1.config.optim import SamplingConfig
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.types import Completion, Prompt
from tests.reference.log_probs import sampling_distribution, slow_log_probs

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char"))
TEXTS = ["1+2=?", "12-3+4-5+6=?", "7=?", "5-6+9-1+2=?", "?"]
MAX_LENGTH = 64


def prompt(text: str) -> Prompt:
    return Prompt(
        id=f"test:{text}",
        question=text,
        text=text,
        token_ids=TOKENIZER.encode(text),
        answer=None,
        verifier="integer",
    )


@pytest.fixture(scope="module", params=["tiny-moe", "tiny-dense"])
def model(request: pytest.FixtureRequest, world: World) -> torch.nn.Module:
    """A random model that ends a completion after some ten tokens and has one padded vocabulary entry."""
    from megatron_r1.model.build import build_model

    config = ModelConfig(preset=request.param, override={"vocab_size": TOKENIZER.vocab_size + 1}, mtp=False)
    torch.manual_seed(0)
    model = build_model(architecture(config, TOKENIZER.vocab_size), config, world)[0]
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=draw)
    return model


@pytest.fixture
def engine(model: torch.nn.Module, world: World) -> Any:
    from megatron_r1.rollout.megatron import MegatronEngine

    return MegatronEngine([model], world, TOKENIZER, TOKENIZER.vocab_size, MAX_LENGTH)


def sampling(**fields: Any) -> SamplingConfig:
    return SamplingConfig(**{"max_new_tokens": 20, "batch_size": 64, **fields})


def ids(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in groups]


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


def full_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """[T, vocabulary without padding] of a forward without cache."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
    return logits[0, :, : TOKENIZER.vocab_size]


def test_tokens_do_not_depend_on_the_batch(engine: Any) -> None:
    prompts = [prompt(text) for text in TEXTS]
    together = engine.generate(prompts, 4, sampling(), seed=3)
    assert [len(group) for group in together] == [4] * 5
    assert len({tuple(c) for group in ids(together) for c in group}) > 15, "completions differ"
    assert ids(engine.generate(prompts, 4, sampling(batch_size=3), seed=3)) == ids(together)
    for one, group in zip(prompts, ids(together), strict=True):
        assert ids(engine.generate([one], 4, sampling(batch_size=1), seed=3)) == [group]
    assert ids(engine.generate(prompts[::-1], 2, sampling(), seed=3)) == [group[:2] for group in ids(together)[::-1]]
    assert ids(engine.generate(prompts, 4, sampling(), seed=4)) != ids(together)


def test_log_probs_are_those_of_a_full_forward(engine: Any, model: torch.nn.Module) -> None:
    prompts = [prompt(text) for text in TEXTS]
    groups = engine.generate(prompts, 4, sampling(temperature=0.8), seed=3)
    for one, group in zip(prompts, groups, strict=True):
        for c in group:
            start = len(one.token_ids) - 1
            logits = full_logits(model, [*one.token_ids, *c.token_ids])[start:-1]
            expected, _ = slow_log_probs(logits[None], torch.tensor([c.token_ids]), TOKENIZER.vocab_size, 0.8)
            assert len(c.log_probs) == len(c.token_ids)
            torch.testing.assert_close(torch.tensor(c.log_probs).double(), expected[0], rtol=0, atol=1e-5)


def test_log_probs_under_truncation_are_those_of_the_truncated_distribution(
    engine: Any, model: torch.nn.Module
) -> None:
    one = prompt(TEXTS[1])
    (group,) = engine.generate([one], 8, sampling(temperature=0.7, top_k=20, top_p=0.9), seed=1)
    for c in group:
        tokens = [*one.token_ids, *c.token_ids]
        logits = full_logits(model, tokens)
        for t, (token, log_prob) in enumerate(zip(c.token_ids, c.log_probs, strict=True)):
            exact = sampling_distribution(logits[len(one.token_ids) - 1 + t].tolist(), 0.7, 20, 0.9)
            assert exact[token] > 0 and log_prob == pytest.approx(math.log(exact[token]), abs=1e-5)


def test_a_completion_ends_at_the_end_token_or_at_its_length(engine: Any) -> None:
    groups = engine.generate([prompt(text) for text in TEXTS], 40, sampling(max_new_tokens=30), seed=0)
    completions = flat(groups)
    for c in completions:
        assert TOKENIZER.eos_id not in c.token_ids[:-1]
        if c.finish_reason == "stop":
            assert c.token_ids[-1] == TOKENIZER.eos_id
        else:
            assert (c.finish_reason, len(c.token_ids)) == ("length", 30)
            assert c.token_ids[-1] != TOKENIZER.eos_id
        assert c.text == TOKENIZER.decode(c.token_ids)
        assert max(c.token_ids) < TOKENIZER.vocab_size
    ended = sum(c.finish_reason == "stop" for c in completions)
    assert 10 < ended < 190


def test_finished_rows_leave_the_batch_and_change_no_other(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_r1.rollout import megatron

    prompts = [prompt(text) for text in TEXTS]
    widths: list[int] = []
    keep = megatron._Cache.keep
    monkeypatch.setattr(megatron._Cache, "keep", lambda cache, rows: (widths.append(len(rows)), keep(cache, rows))[1])
    setting = sampling(max_new_tokens=30, batch_size=200)
    dropped = engine.generate(prompts, 40, setting, seed=0)
    assert len(widths) >= 2 and widths == sorted(widths, reverse=True) and widths[0] < 200
    monkeypatch.setattr(megatron, "_COMPACT_BELOW", 0.0)
    widths.clear()
    kept = engine.generate(prompts, 40, setting, seed=0)
    assert widths == []
    assert ids(kept) == ids(dropped)
    for a, b in zip(flat(kept), flat(dropped), strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-5)


def first_stop(c: Completion, stops: list[str]) -> int | None:
    """How many tokens it takes until the text holds a stop string."""
    texts = (TOKENIZER.decode(c.token_ids[:i]) for i in range(1, len(c.token_ids) + 1))
    return next((i for i, text in enumerate(texts, 1) if any(stop in text for stop in stops)), None)


def test_stop_strings(engine: Any) -> None:
    """A completion is cut at the token that completes the first stop string; the others go on as before."""
    prompts = [prompt(text) for text in TEXTS]
    free = flat(engine.generate(prompts, 6, sampling(), seed=3))
    chosen = next(c.text for c in free if len(c.text) > 8 and "<" not in c.text)
    stops = [chosen[3:6], chosen[7]]
    stopped = flat(engine.generate(prompts, 6, sampling(stop=stops), seed=3))
    ends = [first_stop(c, stops) for c in free]
    assert sum(end is not None for end in ends) >= 2 and None in ends
    for before, after, end in zip(free, stopped, ends, strict=True):
        if end is None:
            assert (after.token_ids, after.finish_reason) == (before.token_ids, before.finish_reason)
        else:
            assert (after.token_ids, after.finish_reason) == (before.token_ids[:end], "stop")


def test_a_stop_string_of_several_bytes_a_character(model: torch.nn.Module, world: World) -> None:
    """Byte tokens: a character of the stop string may take up to four of them."""
    from megatron_r1.rollout.megatron import MegatronEngine, _Row

    byte = build_tokenizer(TokenizerConfig(kind="byte"))
    engine = MegatronEngine([model], world, byte, byte.vocab_size, 64)
    row = _Row(prompt("?"), 0, 0, token_ids=byte.encode("so 答案 "))
    assert engine._hit_stop(row, ["答案 "]) and not engine._hit_stop(row, ["答案。"])


def test_the_model_s_own_length_ends_a_completion(engine: Any) -> None:
    long = prompt("1+" * 29 + "1=?")  # 61 tokens of 64
    short = prompt("7=?")
    groups = engine.generate([long, short], 12, sampling(max_new_tokens=50), seed=2)
    assert {len(c.token_ids) for c in groups[0] if c.finish_reason == "length"} == {3}
    assert max(len(c.token_ids) for c in groups[0]) == 3
    assert ids(engine.generate([short], 12, sampling(max_new_tokens=50), seed=2))[0] == ids(groups)[1]
    assert max(len(c.token_ids) for c in groups[1]) > 3


def test_a_prompt_without_room_is_refused(engine: Any) -> None:
    with pytest.raises(UserError, match=r"prompt test:1\S+ has 64 tokens, but .* is 64: nothing is left"):
        engine.generate([prompt("7=?"), prompt("1" * 64)], 2, sampling(), seed=0)


def test_versions_progress_and_no_prompts(engine: Any) -> None:
    engine.update_weights(7)
    seen: list[tuple[int, int]] = []
    groups = engine.generate([prompt("7=?"), prompt("8=?")], 3, sampling(batch_size=4), 0, lambda *n: seen.append(n))
    assert engine.weight_version == 7
    assert {c.weight_versions for group in groups for c in group} == {(7, 7)}
    assert seen == [(4, 6), (6, 6)]
    assert engine.generate([], 3, sampling(), 0) == []
