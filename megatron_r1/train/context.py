"""What every stage is given: the run's configuration, this rank's world, tokenizer, folders and outputs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.model.presets import Architecture
from megatron_r1.observe.rundir import RunDir
from megatron_r1.parallel.world import World
from megatron_r1.train.stopping import StopRequest


@dataclass(frozen=True, slots=True)
class RunContext:
    """Shared by the stages of a run; built once a rank."""

    config: RunConfig
    arch: Architecture
    world: World
    tokenizer: Tokenizer
    run: RunDir
    stop: StopRequest
    heldout: frozenset[str]  # hashes of every evaluation question: no stage trains on them
    attempt: int
