"""What every stage is given: the run's configuration, this rank's world, tokenizer, folders and outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import Stage
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.model.presets import Architecture, architecture
from megatron_r1.observe.rundir import RunDir
from megatron_r1.parallel.world import World
from megatron_r1.train.stopping import StopRequest


@dataclass(frozen=True, slots=True)
class RunContext:
    """Shared by the stages of a run; built once a rank. `arch` and `model` are of the stage that it is given to."""

    config: RunConfig
    arch: Architecture
    model: ModelConfig
    world: World
    tokenizer: Tokenizer
    run: RunDir
    stop: StopRequest
    heldout: frozenset[str]  # hashes of every evaluation question: no stage trains on them
    attempt: int
    checkpoint: Callable[[str], Path]  # name of a stage, or folder -> the weights that it holds; UserError if none

    def model_named(self, name: str | None) -> tuple[ModelConfig, Architecture]:
        """The `[models.<name>]` table, None: `[model]`, and its architecture."""
        model = self.config.model if name is None else self.config.models[name]
        return model, architecture(model, self.tokenizer.vocab_size)

    def of(self, stage: Stage) -> RunContext:
        """The same for a stage with a model of its own."""
        model, arch = self.model_named(stage.model)
        return dataclasses.replace(self, model=model, arch=arch)
