"""The whole run: model, tokenizer, layout, benchmarks and the stages, as one validated object."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_r1.config.base import Table
from megatron_r1.config.model import ModelConfig, ParallelConfig, TokenizerConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.stages import (
    AskedProblems,
    BenchmarkConfig,
    EvalStage,
    PreferencesStage,
    RewardModelStage,
    Stage,
)

CLOSING_COLUMNS = ("row", "stage", "accuracy", "language", "format", "mean_tokens", "problems", "seconds")
"""Columns of the closing table (`observe/evaluations.py`) that no benchmark's may be mistaken for."""


RESERVED_NAMES = (
    "logs",
    "superseded",
    "recipe.toml",
    "resolved.toml",
    "stages.json",
    "departures.json",
    "summary.json",
)
"""Names in a run directory (`observe/rundir.py`) that no stage can have."""


class RunConfig(Table):
    """A recipe file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is runs/<name> unless --run-dir says otherwise."""
    seed: int = 1234
    """Seed of weights, data order and sampling."""
    model: ModelConfig
    models: dict[str, ModelConfig] = Field(default_factory=dict)
    """`[models.<name>]`: further models, e.g. the dense students of a distillation; a stage takes one by its `model`.
    All share tokenizer and layout."""
    tokenizer: TokenizerConfig
    parallel: ParallelConfig = ParallelConfig()
    benchmark: list[BenchmarkConfig] = Field(default_factory=list)
    stage: list[Stage] = Field(min_length=1)
    threads: PositiveInt = 1
    """CPU threads a rank (OMP_NUM_THREADS)."""
    timeout_minutes: PositiveInt = 30
    """Longest a collective may wait before the run ends with an error."""

    def model_of(self, stage: Stage) -> ModelConfig:
        """The model that a stage trains, samples from or writes."""
        return self.model if stage.model is None else self.models[stage.model]

    def trained_on(self, reward: RewardConfig) -> PreferencesStage | None:
        """The stage that wrote what a reward's model was trained on, where both are stages of this recipe."""
        stages = {stage.name: stage for stage in self.stage}
        model = stages.get(reward.init_from or "")
        rows = (model.pairs or model.labels) if isinstance(model, RewardModelStage) else None
        origin = stages.get(rows.stage or "") if rows is not None else None
        return origin if isinstance(origin, PreferencesStage) else None

    def sees(self, reward: RewardConfig) -> Literal["summary", "response"]:
        """What a reward model is given to score: what it was trained on, as far as this recipe tells."""
        origin = self.trained_on(reward)
        trained = "response" if origin is None else origin.shown
        return reward.sees or trained

    def problem_sets(self, stage: EvalStage) -> list[AskedProblems]:
        """What an eval stage asks, in the order that it names them: its own prompts, or benchmarks."""
        if stage.prompts is not None:
            return [AskedProblems(None, f"stage.{stage.name}", stage, stage.prompts)]
        tables = {benchmark.name: benchmark for benchmark in self.benchmark}
        return [_asked(tables[name]) for name in stage.benchmarks]

    def all_problem_sets(self) -> list[AskedProblems]:
        """What no stage may train on: every benchmark, whether asked or not, and the prompts of every eval stage."""
        own = [self.problem_sets(stage) for stage in self.stage if isinstance(stage, EvalStage) and stage.prompts]
        return [*map(_asked, self.benchmark), *(asked for sets in own for asked in sets)]

    @model_validator(mode="after")
    def _stages(self) -> RunConfig:
        names = [stage.name for stage in self.stage]
        for i, stage in enumerate(self.stage):
            if stage.name in names[:i]:
                raise ValueError(f"two stages are called {stage.name!r}; names must differ")
            if stage.name in RESERVED_NAMES:
                raise ValueError(
                    f"a stage cannot be called {stage.name!r}: the run directory uses that name; rename it"
                )
            if stage.kind in ("eval", "export", "sample", "preferences") and i == 0 and stage.init_from is None:
                raise ValueError(
                    f"stage {stage.name!r} ({stage.kind}) has no weights: set `from` to a checkpoint folder"
                )
            for key in ("model", "teacher_model"):
                if (model := getattr(stage, key, None)) is not None and model not in self.models:
                    raise ValueError(
                        f"stage {stage.name!r} has {key} = {model!r}; there is no table [models.{model}] (tables: "
                        f"{', '.join(self.models) or 'none'})"
                    )
        return self

    @model_validator(mode="after")
    def _benchmarks(self) -> RunConfig:
        names = [benchmark.name for benchmark in self.benchmark]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(f"two benchmarks are called {name!r}; names must differ")
            if name in CLOSING_COLUMNS:
                raise ValueError(
                    f"a benchmark is called {name!r}, as a column of the closing table; take another name (taken: "
                    f"{', '.join(CLOSING_COLUMNS)})"
                )
        for stage in self.stage:
            asked = stage.benchmarks if isinstance(stage, EvalStage) else []
            if len(set(asked)) < len(asked):
                raise ValueError(f"stage {stage.name!r} names a benchmark twice: {', '.join(asked)}")
            for name in asked:
                if name not in names:
                    raise ValueError(
                        f"stage {stage.name!r} asks for the benchmark {name!r}; there is no such [[benchmark]] "
                        f"(tables: {', '.join(names) or 'none'})"
                    )
        return self


def _asked(benchmark: BenchmarkConfig) -> AskedProblems:
    return AskedProblems(benchmark.name, f"benchmark.{benchmark.name}", benchmark, benchmark.prompts)
