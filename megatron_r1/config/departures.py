"""In what a run departs from the DeepSeek-R1 paper; printed at the start of every run.

The paper's values are those of R1-Zero (arXiv 2501.12948, training details of R1-Zero; evaluation set-up of the same
paper), those of R1's second RL stage for `grpo` stages with a reward model (v2, section 3.2.2), and for `sft` stages
those of R1's two fine-tunings or, where `student` or the model is one of the paper's students, of its distillation
(v2, appendix B.4.2 and B.4.3), for `preferences` and `reward_model` stages those of its reward models (v2, section
3.1.2). Four cells are not stated there and are named so below: the clip range is that of R1's first RL stage, the
token-wise aggregation is DeepSeekMath's (arXiv 2402.03300 eq. 3), the precision is that in which DeepSeek-V3 was
trained (arXiv 2412.19437, section 3.3), the standard deviation's kind is open and so is never a departure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from megatron_r1.config.optim import STUDENTS, SamplingConfig, Student
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import (
    BenchmarkConfig,
    EvalStage,
    GrpoStage,
    PreferencesStage,
    RewardModelStage,
    SftStage,
)

PAPER_GRPO: dict[str, tuple[Any, str]] = {
    "optimizer.lr": (3e-6, "R1-Zero's learning rate; the optimum grows as models shrink"),
    "optimizer.schedule": ("constant", "no schedule is stated"),
    "sampling.temperature": (1.0, "samples come from the policy itself"),
    "sampling.max_new_tokens": (32768, "R1-Zero's limit up to step 8,200, then 65,536"),
    "grpo.prompts": (512, "questions of one rollout phase: 8,192 outputs"),
    "grpo.group_size": (16, "outputs per question"),
    "grpo.minibatches": (16, "one phase serves 16 optimizer steps"),
    "grpo.epochs": (1, "one pass over each phase"),
    "grpo.no_signal": ("keep", "groups of equal reward keep their zero advantages"),
    "grpo.dynamic_sampling": (False, "no resampling of groups without signal (DAPO's addition)"),
    "grpo.overlong": (None, "no penalty on length (DAPO's addition)"),
    "grpo.advantage.scale": (
        "std",
        "rewards are divided by the group's standard deviation (eq. 3)",
    ),
    "grpo.loss.aggregation": (
        "sequence-mean",
        "1/|o_i| within, 1/G across sequences (DeepSeekMath eq. 3)",
    ),
    "grpo.loss.ratio": ("token", "the token-wise form of DeepSeekMath eq. 3"),
    "grpo.loss.clip_low": (10.0, "stated for R1's first RL stage; R1-Zero's is not stated"),
    "grpo.loss.epsilon_high": (10.0, "the same range on both sides"),
    "grpo.loss.dual_clip": (None, "no bound on the loss of negative advantages"),
    "grpo.loss.kl": ("k3", "the estimator of eq. 2"),
    "grpo.loss.kl_coefficient": (0.001, "beta"),
    "grpo.loss.reference_every": (400, "the reference becomes the policy every 400 steps"),
    "grpo.correction.method": ("none", "no importance weight between sampling engine and trainer"),
    "grpo.correction.veto": (None, "no response is left out for its mismatch"),
    "grpo.correction.off_policy_mask": (
        None,
        "no response is left out for being off-policy (DeepSeek-V3.2's addition)",
    ),
    "grpo.correction.old_policy": ("trainer", "the ratio is taken between two states of one policy (eq. 1)"),
    "grpo.routing_replay": ("none", "each forward chooses its own experts"),
    "grpo.mtp_loss": (0.0, "no multi-token-prediction loss is stated for RL"),
    "grpo.expert_bias": ("frozen", "no update of the router's bias is stated for RL"),
    "prompts.template": ("r1-zero", "the template of table 1"),
}
PAPER_SFT: dict[str, tuple[Any, str]] = {
    "optimizer.lr": (5e-5, "both fine-tunings of DeepSeek-V3-Base"),
    "optimizer.schedule": ("cosine", "cosine decay to a tenth"),
    "batch": (128, "both fine-tunings of DeepSeek-V3-Base; distillation: 64"),
    "max_length": (32768, "the context of fine-tuning and distillation"),
}
PAPER_REWARD_MODEL: dict[str, tuple[Any, str]] = {
    "optimizer.lr": (6e-6, "the helpful reward model"),
    "batch": (256, "the helpful reward model"),
    "max_length": (8192, "the longest sequence of training; none is set for scoring"),
}
PAPER_PREFERENCES: dict[str, tuple[Any, str]] = {
    "votes": (4, "each pair is judged four times, in random order"),
    "margin": (1.0, "pairs of a mean difference above 1 are kept"),
    "balance_length": (True, "chosen and rejected answers are about as long, against a bias for length"),
}
PAPER_SEES = {"pairs": ("summary", "helpfulness: the final summary alone"), "labels": ("response", "safety: all of it")}
PRESET_STUDENTS: dict[str, Student] = {
    "qwen2.5-math-1.5b": "qwen-1.5b",
    "qwen2.5-1.5b": "qwen-1.5b",
    "qwen2.5-math-7b": "qwen-7b",
    "qwen2.5-7b": "qwen-7b",
    "qwen2.5-14b": "qwen-14b",
    "qwen2.5-32b": "qwen-32b",
    "llama-3.1-8b": "llama-8b",
    "llama-3.3-70b": "llama-70b",
}
"""Preset -> the paper's student of that size, for stages that do not name one; the paper's two smallest are the math
models."""
PAPER_EPOCHS = (2, 3)
PAPER_PREFERENCE_STEPS = 400
PAPER_PRECISION = ("fp8-blockwise", "DeepSeek-V3's, with bf16; none is stated for the RL")
PAPER_REWARD_EPOCHS = 1
PAPER_CHAT_TEMPLATE = ("deepseek", "R1's later stages answer in DeepSeek's chat format")
PAPER_EVAL: dict[str, tuple[Any, str]] = {
    "sampling.temperature": (0.6, "the paper's evaluation set-up"),
    "sampling.top_p": (0.95, "the paper's evaluation set-up"),
    "sampling.top_k": (0, "the paper's evaluation set-up"),
    "sampling.max_new_tokens": (32768, "the paper's evaluation set-up"),
}
# The file's name of a key that is read through a property.
SPELLED = {"epsilon_high": "clip_high", "shown": "sees"}
# Once the KL term is off, only that is the departure: its other keys have no effect.
NEEDS_KL = ("grpo.loss.kl", "grpo.loss.reference_every")


Compared = GrpoStage | SftStage | RewardModelStage | PreferencesStage | EvalStage | BenchmarkConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Departure:
    """One key whose value is not the paper's.

    Example: Departure(key="stage.r1-zero.optimizer.lr", paper="3e-06", here="0.001", why="R1-Zero's
    ...").
    """

    key: str
    paper: str  # values as the recipe spells them; "none" where a key is not set
    here: str
    why: str  # what the paper's value is, or where it comes from

    def __str__(self) -> str:
        return f"{self.key}: {self.here} (paper: {self.paper}; {self.why})"


def departures(config: RunConfig) -> list[Departure]:
    """Every key of the GRPO, SFT, reward-model, preferences and evaluation stages that departs from the paper, in the
    order of the stages, after the precision that they share and before the benchmarks.
    """
    found: list[Departure] = []
    paper, why = PAPER_PRECISION
    if config.model.precision != paper and any(isinstance(stage, GrpoStage) for stage in config.stage):
        found.append(Departure(key="model.precision", paper=paper, here=config.model.precision, why=why))
    for stage in config.stage:
        if isinstance(stage, GrpoStage):
            found += _compare(stage, _reinforcement(stage), skip=_silent(stage))
            found += _mask_limits(stage)
            found += _rewards(stage)
            found += _stop(stage)
        elif isinstance(stage, SftStage):
            found += _compare(stage, _fine_tuning(stage, config.model_of(stage).preset), skip=())
            found += _floor_and_epochs(stage)
        elif isinstance(stage, RewardModelStage):
            found += _compare(stage, PAPER_REWARD_MODEL, skip=())
            found += _reward_epochs(stage)
        elif isinstance(stage, PreferencesStage):
            found += _preferences(stage)
        elif isinstance(stage, EvalStage):
            found += _stop(stage)
            found += _compare(stage, PAPER_EVAL, skip=())
    for benchmark in config.benchmark:
        found += _stop(benchmark)
        found += _compare(benchmark, PAPER_EVAL, skip=())
    return found


def _silent(stage: GrpoStage) -> tuple[str, ...]:
    """Keys that have no effect in this stage, so that their value is no departure."""
    loss = stage.grpo.loss
    if loss.kl == "none":
        return ("grpo.loss.kl_coefficient", "grpo.loss.reference_every")
    return () if loss.kl_coefficient > 0 else NEEDS_KL


def _place(stage: Compared) -> str:
    return f"{'benchmark' if isinstance(stage, BenchmarkConfig) else 'stage'}.{stage.name}"


def _compare(stage: Compared, paper: dict[str, tuple[Any, str]], skip: Iterable[str]) -> Iterator[Departure]:
    for key, (value, why) in paper.items():
        for spelled, given in _values(stage, key):
            if key not in skip and given != value:
                yield Departure(key=f"{_place(stage)}.{spelled}", paper=_spell(value), here=_spell(given), why=why)


def _values(stage: Compared, key: str) -> list[tuple[str, Any]]:
    """(key as the file spells it, value): one, or one for each table of an array of several."""
    *names, last = key.split(".")
    found: list[tuple[str, Any]] = [("", stage)]
    for name in names:
        inner = [(f"{spelled}{name}.", getattr(table, name)) for spelled, table in found]
        found = []
        for spelled, value in inner:
            tables = value if isinstance(value, list) else [value]
            numbered = [f"{spelled}{i}." for i in range(len(tables))] if len(tables) > 1 else [spelled]
            found += zip(numbered, tables, strict=True)
    return [(f"{spelled}{SPELLED.get(last, last)}", getattr(table, last)) for spelled, table in found]


def _stop(stage: GrpoStage | EvalStage | BenchmarkConfig) -> Iterator[Departure]:
    sampling: SamplingConfig = stage.sampling
    if sampling.stop:
        why = "only the end-of-sequence token ends a completion"
        yield Departure(
            key=f"{_place(stage)}.sampling.stop",
            paper="none",
            here=_spell(sampling.stop),
            why=why,
        )


def _reinforcement(stage: GrpoStage) -> dict[str, tuple[Any, str]]:
    """The paper's values for this stage: with a reward model it is R1's second one, with the language reward its first,
    else R1-Zero.
    """
    kinds = {reward.kind for reward in stage.reward}
    if not kinds & {"language", "model"}:
        return PAPER_GRPO
    later = PAPER_GRPO | {"prompts.template": PAPER_CHAT_TEMPLATE}
    if "model" not in kinds:
        return later
    return later | {"sampling.temperature": (0.7, "R1's second RL stage: higher ones gave incoherent text")}


def _fine_tuning(stage: SftStage, preset: str | None) -> dict[str, tuple[Any, str]]:
    """The paper's values for this stage: those of distillation where it trains one of the students."""
    student = stage.student or PRESET_STUDENTS.get(preset or "")
    if student is None:
        return PAPER_SFT
    distillation = {
        "optimizer.lr": (STUDENTS[student], f"of the student {student} in distillation"),
        "batch": (64, "distillation"),
    }
    return PAPER_SFT | distillation


def _floor_and_epochs(stage: SftStage) -> Iterator[Departure]:
    tenth = stage.optimizer.lr / 10
    if not math.isclose(stage.optimizer.min_lr, tenth):
        key, why = f"stage.{stage.name}.optimizer.min_lr", "a tenth of the initial learning rate"
        yield Departure(key=key, paper=_spell(tenth), here=_spell(stage.optimizer.min_lr), why=why)
    low, high = PAPER_EPOCHS
    if stage.epochs is None or not low <= stage.epochs <= high:
        here = f"steps = {stage.steps}" if stage.epochs is None else _spell(stage.epochs)
        why = "R1's fine-tunings and distillation"
        yield Departure(key=f"stage.{stage.name}.epochs", paper=f"{low} to {high}", here=here, why=why)


def _reward_epochs(stage: RewardModelStage) -> Iterator[Departure]:
    if stage.epochs != PAPER_REWARD_EPOCHS:
        here = f"steps = {stage.steps}" if stage.epochs is None else _spell(stage.epochs)
        why = "one pass over the pairs"
        yield Departure(key=f"stage.{stage.name}.epochs", paper=_spell(PAPER_REWARD_EPOCHS), here=here, why=why)


def _preferences(stage: PreferencesStage) -> Iterator[Departure]:
    if stage.form == "pairs":
        yield from _compare(stage, PAPER_PREFERENCES, skip=())
    yield from _compare(stage, {"shown": PAPER_SEES[stage.form]}, skip=())


def _mask_limits(stage: GrpoStage) -> Iterator[Departure]:
    """Limits that change the objective; those that warn or stop only watch it."""
    masks = [f"{x.metric} above {_spell(x.threshold)}" for x in stage.grpo.mismatch_limit if x.action == "mask"]
    if masks:
        yield Departure(
            key=f"stage.{stage.name}.grpo.mismatch_limit",
            paper="none",
            here=f"mask {', '.join(masks)}",
            why="no response is left out for its mismatch",
        )


def _rewards(stage: GrpoStage) -> Iterator[Departure]:
    """The paper: R = R_accuracy + R_format; in R1's first RL stage R_language is added to the rule rewards, of which
    its first version names the accuracy alone; in its second all three, and one reward model a general prompt in the
    last 400 steps. All of equal weight; only the proportion of the weights matters.
    """
    weights = {reward.label: reward.weight for reward in stage.reward}
    models = [reward for reward in stage.reward if reward.kind == "model"]
    paper: tuple[str, ...] = ("accuracy", "language") if "language" in weights else ("accuracy", "format")
    if models:
        paper = ("accuracy", "format", "language", *(reward.label for reward in models))
    for reward in models:
        yield from _reasoning_by_rule(stage, reward)
        if reward.last_steps != PAPER_PREFERENCE_STEPS:
            yield Departure(
                key=f"stage.{stage.name}.reward.{reward.label}.last_steps",
                paper=_spell(PAPER_PREFERENCE_STEPS),
                here=_spell(reward.last_steps),
                why="of 1,700: with more steps the policy learns to please the reward model",
            )
    known = set(weights) in (set(paper), {*paper, "format"})
    if not known or len(set(weights.values())) != 1 or min(weights.values()) <= 0:
        yield Departure(
            key=f"stage.{stage.name}.reward",
            paper=_spell(dict.fromkeys(paper, 1)),
            here=_spell(weights),
            why=f"{' and '.join(paper)}, of the same weight",
        )


def _reasoning_by_rule(stage: GrpoStage, model: RewardConfig) -> Iterator[Departure]:
    """Prompts that a rule judges, and a reward model on top of it."""
    ruled = [reward for reward in stage.reward if reward.kind == "accuracy"]
    domains = {source.domain for source in stage.prompts}
    both = sorted(x for x in domains if model.covers(x) and any(rule.covers(x) for rule in ruled))
    if both:
        yield Departure(
            key=f"stage.{stage.name}.reward.{model.label}.domains",
            paper="those without the accuracy reward",
            here=f"{', '.join(both)} too",
            why="reasoning prompts are judged by rule alone",
        )


def _spell(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} x {_spell(item)}" for key, item in value.items())
    if isinstance(value, BaseModel):
        return ", ".join(f"{key} = {_spell(item)}" for key, item in value.model_dump().items())
    return str(value)
