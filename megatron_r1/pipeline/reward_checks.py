"""Can the rewards of a `grpo` stage score its prompts? Asked by `pipeline/preflight.py` before the start. No torch."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.checkpoint import folders
from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import GrpoStage
from megatron_r1.pipeline.inputs import checkpoint_of
from megatron_r1.rewards.accuracy import ACCEPT, JUDGE
from megatron_r1.rewards.mixer import check_labels

UNJUDGED = (ACCEPT, JUDGE)
"""Verifiers that give an accuracy reward nothing: they belong to stages that sample data."""


def check_rewards(stage: GrpoStage, config: RunConfig) -> None:
    """Raise UserError for terms with one label, a reward model that is not there or is none, prompts that an accuracy
    reward cannot judge, and prompts without any reward.
    """
    check_labels(stage.reward)
    for reward in stage.reward:
        if reward.kind == "model" and reward.url is None:
            _check_model(f"stage.{stage.name}.reward.{reward.label}", reward, config)
    for number, source in enumerate(stage.prompts):
        _check_source(stage, number, source)


def _check_model(key: str, reward: RewardConfig, config: RunConfig) -> None:
    source = reward.init_from
    assert source is not None, "the validator saw to it"
    if reward.model is not None and reward.model not in config.models:
        known = ", ".join(config.models) or "none"
        raise UserError(f"{key}.model = {reward.model!r}: there is no table [models.{reward.model}] (tables: {known})")
    names = [stage.name for stage in config.stage]
    if source in names:  # `pipeline/graph.py` has seen to its kind
        if reward.template is not None:
            raise UserError(
                f"{key}.template = {reward.template!r} without effect: stage {source!r} scores under the template that "
                "it was trained with; remove it"
            )
        _check_sees(key, reward, config)
        return
    if not Path(source).is_dir():
        raise UserError(f"{key}.from = {source!r}: neither a stage of this recipe ({', '.join(names)}) nor a folder")
    found = checkpoint_of(Path(source))
    if found is None:
        raise UserError(f"{key}.from = {source!r}: that folder holds no complete checkpoint (step-<number>)")
    try:
        folders.require_reward_model(found)
    except UserError as error:
        raise UserError(f"{key}.from = {source!r}: {error}") from error


def _check_sees(key: str, reward: RewardConfig, config: RunConfig) -> None:
    origin = config.trained_on(reward)
    trained = config.sees(reward.model_copy(update={"sees": None}))
    if origin is not None and reward.sees not in (None, trained):
        raise UserError(
            f'{key}.sees = "{reward.sees}", but stage {reward.init_from!r} learns from what stage {origin.name!r} '
            f'wrote with sees = "{trained}": the model would be given another part of an answer than in training; '
            f'remove it here, or set stage.{origin.name}.sees = "{reward.sees}"'
        )


def _check_source(stage: GrpoStage, number: int, source: PromptsConfig) -> None:
    key = f"stage.{stage.name}.prompts" + (f".{number}" if len(stage.prompts) > 1 else "")
    covering = [reward for reward in stage.reward if reward.covers(source.domain)]
    if source.verifier in UNJUDGED and any(reward.kind == "accuracy" for reward in covering):
        others = sorted({each.domain for each in stage.prompts if each.verifier not in UNJUDGED})
        raise UserError(
            f'{key}.verifier = "{source.verifier}", but the accuracy reward covers its domain {source.domain!r}: give '
            f"that reward the domains that can be judged (domains = {others}), and this source a domain of its own"
        )
    while_asked = [reward for reward in covering if _lasts(reward.last_steps, source.last_steps)]
    if not while_asked:
        late = [f"{reward.label} (last_steps = {reward.last_steps})" for reward in covering]
        raise UserError(
            f"{key}: no reward scores the domain {source.domain!r} "
            + (f"as long as it is asked (last_steps = {source.last_steps}): {', '.join(late)}" if late else "at all")
            + "; give a reward that domain, or ask these prompts in the same last steps"
        )


def _lasts(reward: int | None, source: int | None) -> bool:
    """Whether a reward of so many last steps counts whenever a source of so many is asked; None: always."""
    return reward is None or (source is not None and source <= reward)
