"""The contract between training and sampling: what any rollout engine, in-process or a server, must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_r1.config.optim import SamplingConfig
from megatron_r1.types import Completion, Prompt

Progress = Callable[[int, int], None]
"""Called with (completions finished so far, completions asked for)."""


class RolloutEngine(Protocol):
    """Turns prompts into completions that carry ids, log-probs, finish reason and weight version."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next `generate` samples from."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingConfig,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Sample n completions of each prompt, in the order of the prompts.

        The random numbers of completion j of a prompt depend on (seed, prompt.id, j) only, so the same seed gives
        the same tokens whatever the batch or the data-parallel split.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Make the trainer's current weights the ones sampled from, under this version number."""
        ...
