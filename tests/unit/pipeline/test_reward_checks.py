"""Rewards that could not score the prompts of their stage are refused before the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import GrpoStage
from megatron_r1.pipeline.reward_checks import check_rewards

REASONING = {"source": "generator", "task": "chain_sum"}
GENERAL = {"source": "jsonl", "path": "x.jsonl", "verifier": "none", "domain": "general"}
ACCURACY = {"kind": "accuracy", "domains": ["reasoning"]}
HELPFUL = {"kind": "model", "name": "helpful", "from": "helpful", "domains": ["general"]}


def check(prompts: list[dict[str, Any]], reward: list[dict[str, Any]]) -> None:
    reward_model = {
        "name": "helpful",
        "kind": "reward_model",
        "steps": 1,
        "optimizer": {"lr": 1},
        "pairs": {"path": "x"},
    }
    grpo = {"name": "rl2", "kind": "grpo", "steps": 9, "optimizer": {"lr": 1}, "prompts": prompts, "reward": reward}
    text = {
        "name": "x",
        "model": {"preset": "tiny-dense"},
        "tokenizer": {"kind": "char"},
        "stage": [reward_model, grpo],
    }
    config = RunConfig.model_validate(text)
    stage = config.stage[1]
    assert isinstance(stage, GrpoStage)
    check_rewards(stage, config)


def test_the_papers_second_stage_passes() -> None:
    general = {**GENERAL, "last_steps": 4}
    check([REASONING, general], [ACCURACY, {"kind": "format"}, {**HELPFUL, "last_steps": 4}])
    check([REASONING, general], [ACCURACY, {**HELPFUL, "last_steps": 5}])
    check([REASONING], [{"kind": "accuracy"}])


@pytest.mark.parametrize(
    ("prompts", "reward", "said"),
    [
        (
            [REASONING, GENERAL],
            [{"kind": "accuracy"}, HELPFUL],
            r"rl2\.prompts\.1\.verifier = \"none\", but the accuracy reward covers .* \(domains = \['reasoning'\]\)",
        ),
        ([REASONING, GENERAL], [ACCURACY], r"rl2\.prompts\.1: no reward scores the domain 'general' at all"),
        (
            [REASONING, {**GENERAL, "last_steps": 5}],
            [ACCURACY, {**HELPFUL, "last_steps": 4}],
            r"as long as it is asked \(last_steps = 5\): helpful \(last_steps = 4\)",
        ),
        ([REASONING, GENERAL], [ACCURACY, {**HELPFUL, "last_steps": 4}], r"\(last_steps = None\): helpful"),
        ([REASONING, GENERAL], [ACCURACY, ACCURACY, HELPFUL], "kind 'accuracy' is given 2 times"),
        (
            [REASONING, GENERAL],
            [ACCURACY, {**HELPFUL, "template": "plain"}],
            r"reward\.helpful\.template = 'plain' without effect: stage 'helpful'",
        ),
        (
            [REASONING, GENERAL],
            [ACCURACY, {**HELPFUL, "from": "nowhere"}],
            r"reward\.helpful\.from = 'nowhere': neither a stage of this recipe \(helpful, rl2\) nor a folder",
        ),
        ([REASONING, GENERAL], [ACCURACY, {**HELPFUL, "model": "big"}], r"no table \[models\.big\] \(tables: none\)"),
    ],
)
def test_refused(prompts: list[dict[str, Any]], reward: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(prompts, reward)


def test_a_folder_must_hold_a_reward_model(tmp_path: Path) -> None:
    def refused(said: str) -> None:
        with pytest.raises(UserError, match=rf"reward\.helpful\.from = '{tmp_path}': {said}"):
            check([REASONING, GENERAL], [ACCURACY, {**HELPFUL, "from": str(tmp_path)}])

    refused("that folder holds no complete checkpoint")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    refused(r".*holds no reward model: it has no scalar head")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"url": "node7:8123"}, "url = 'node7:8123' is no address"),
        ({"url": "http://node7:8123", "template": "plain"}, "template without effect beside `url`"),
        ({"from": "helpful", "timeout": 5}, "timeout = 5 without effect"),
        ({"from": "helpful", "template": "Q:"}, "has no {prompt} field"),
        ({"from": "helpful", "url": "http://node7:8123"}, "exactly one of `from`"),
    ],
)
def test_keys_of_a_reward_model(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check([REASONING], [{"kind": "model", "name": "m", **keys}])
