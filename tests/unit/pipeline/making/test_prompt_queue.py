"""The order in which a stage asks its prompts, and where it goes on."""

from __future__ import annotations

from typing import Any

from megatron_r1.config.model import TokenizerConfig
from megatron_r1.config.stages import SampleStage
from megatron_r1.data.heldout import heldout_ids
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.pipeline.making.prompt_queue import PromptQueue

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char"))
SOURCES: list[dict[str, Any]] = [
    {"source": "generator", "task": "chain_sum", "size": 5, "seed": 3},
    {"source": "generator", "task": "chain_sum", "size": 4, "seed": 4, "shuffle": False},
]
STAGE = SampleStage.model_validate({"name": "cold", "kind": "sample", "init_from": "base", "prompts": SOURCES})


def queue(skip: int = 0, heldout: frozenset[str] = frozenset()) -> PromptQueue:
    return PromptQueue(STAGE.prompts, TOKENIZER, heldout, skip)


def test_prompts_come_source_by_source() -> None:
    whole = queue()
    assert whole.left == 9
    names = [prompt.id for prompt in whole.take(4)]
    assert whole.left == 5
    names += [prompt.id for prompt in whole.take(9)]
    assert sorted(names[:5]) == [f"chain_sum@3:{i}" for i in range(5)] != names[:5]
    assert names[5:] == [f"chain_sum@4:{i}" for i in range(4)]
    assert (whole.left, whole.take(1), whole.take_asked(1)) == (0, [], [])
    assert [prompt.id for prompt in queue(skip=3).take(99)] == names[3:]
    assert queue(skip=3).left == 6


def test_a_chunk_of_so_many_prompts_that_are_not_held_out() -> None:
    prompts = queue().take(9)
    heldout = heldout_ids(prompts[i].question for i in (0, 2, 3))
    found = queue(heldout=heldout).take_asked(2)
    assert [prompt.id for prompt in found] == [prompt.id for prompt in prompts[:5]]
    assert len(queue(heldout=heldout).take_asked(0)) == 1, "a chunk of nothing but held-out prompts is one too"
    assert len(queue(heldout=heldout).take_asked(99)) == 9
