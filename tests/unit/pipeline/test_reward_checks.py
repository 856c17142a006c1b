"""Rewards that could not score the prompts of their stage are refused before the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import GrpoStage
from megatron_r1.pipeline.reward_checks import check_rewards

REASONING = {"source": "generator", "task": "chain_sum"}
GENERAL = {"source": "jsonl", "path": "x.jsonl", "verifier": "none", "domain": "general"}
ACCURACY = {"kind": "accuracy", "domains": ["reasoning"]}
HELPFUL = {"kind": "model", "name": "helpful", "from": "helpful", "domains": ["general"]}


def trained(form: str, written: str, **reward: Any) -> tuple[RunConfig, GrpoStage]:
    """A recipe whose reward model learns from a `preferences` stage."""
    loss, rows = ("pairwise", "pairs") if form == "pairs" else ("pointwise", "labels")
    judge = {"server": {"url": "http://x:1/v1", "model": "m"}}
    wrote = {"name": "wrote", "kind": "preferences", "form": form, "from": "./x", "prompts": GENERAL, "judge": judge}
    model = {"name": "helpful", "kind": "reward_model", "steps": 1, "optimizer": {"lr": 1}, "loss": loss}
    model |= {"from": "./x", rows: {"stage": "wrote"}}
    grpo = {"name": "rl2", "kind": "grpo", "from": "./x", "steps": 9, "optimizer": {"lr": 1}, "prompts": GENERAL}
    grpo |= {"reward": [{**HELPFUL, **reward}]}
    stages = [{**wrote, "sees": written}, model, grpo]
    text = {"name": "x", "model": {"preset": "tiny-dense"}, "tokenizer": {"kind": "char"}, "stage": stages}
    config = RunConfig.model_validate(text)
    stage = config.stage[2]
    assert isinstance(stage, GrpoStage)
    return config, stage


@pytest.mark.parametrize(("form", "sees"), [(f, s) for f in ("pairs", "labels") for s in ("summary", "response")])
def test_a_model_is_given_what_it_was_trained_on(form: str, sees: str) -> None:
    config, stage = trained(form, sees)
    assert config.sees(stage.reward[0]) == sees
    for given in ("summary", "response"):
        config, stage = trained(form, sees, sees=given)
        if given == sees:
            check_rewards(stage, config)
            continue
        said = rf'reward\.helpful\.sees = "{given}", but stage \'helpful\' learns from .* \'wrote\' .* sees = "{sees}"'
        with pytest.raises(UserError, match=said):
            check_rewards(stage, config)


def test_what_is_not_known_is_scored_whole() -> None:
    config, _ = trained("pairs", "summary")
    for keys in ({"from": "./elsewhere"}, {"url": "http://x:1"}):
        base = {"kind": "model", "name": "m", **keys}
        assert config.sees(RewardConfig.model_validate(base)) == "response"
        assert config.sees(RewardConfig.model_validate({**base, "sees": "summary"})) == "summary"


def check(prompts: list[dict[str, Any]], reward: list[dict[str, Any]]) -> None:
    reward_model = {
        "name": "helpful",
        "kind": "reward_model",
        "steps": 1,
        "optimizer": {"lr": 1},
        "pairs": {"path": "x"},
    }
    grpo = {"name": "rl2", "kind": "grpo", "steps": 9, "optimizer": {"lr": 1}, "prompts": prompts, "reward": reward}
    grpo["grpo"] = {"minibatches": 1}
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
