"""Several prompt sources as one: how many questions of a phase each of them gives, and where each stands.

Between the sources (`data/prompts.py`, each behind a cursor) and the rollout of a `grpo` or `distill` stage. R1's
second RL stage asks reasoning prompts throughout and general ones in its last steps only (DeepSeek-R1 v2, 3.2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_r1.config.data import PromptsConfig
from megatron_r1.data.cursor import PromptCursor
from megatron_r1.data.prompts import open_prompts
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.types import Prompt


class PromptMix:
    """Takes the questions of a phase from its sources, by weight.

    Args:
        sources: `[stage.prompts]` tables.
        tokenizer: of the prompts.
        seed: of the order within each source.
        exclude: question hashes that are never handed out.

    Raises:
        UserError: as `open_prompts`.
    """

    def __init__(
        self, sources: Sequence[PromptsConfig], tokenizer: Tokenizer, seed: int, exclude: frozenset[str] = frozenset()
    ) -> None:
        self.sources = list(sources)
        self._cursors = [
            PromptCursor(open_prompts(source, tokenizer), source.shuffle, seed, exclude) for source in sources
        ]

    @property
    def excluded(self) -> int:
        """Questions left out since the start because they are held out."""
        return sum(cursor.excluded for cursor in self._cursors)

    def take(self, number: int, step: int = 0, steps: int = 0) -> list[Prompt]:
        """The questions of a phase that begins after `step` of `steps` optimizer steps, source after source.

        Raises:
            UserError: a source has none that may be handed out.
        """
        active = [source.last_steps is None or step >= steps - source.last_steps for source in self.sources]
        weights = [source.weight if on else 0.0 for source, on in zip(self.sources, active, strict=True)]
        counts = shares(number, weights)
        return [prompt for cursor, count in zip(self._cursors, counts, strict=True) for prompt in cursor.take(count)]

    def state(self) -> dict[str, Any]:
        """Where the next questions come from, as JSON."""
        return {"cursors": [cursor.state() for cursor in self._cursors]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of the same sources.

        Raises:
            UserError: they are others.
        """
        for cursor, known in zip(self._cursors, state["cursors"], strict=True):
            cursor.restore(known)


def shares(number: int, weights: Sequence[float]) -> list[int]:
    """`number` cut in whole parts in proportion to the weights, by largest remainders; their sum is `number`.

    Of equal remainders the first is served. A part of weight 0 is 0. Raises ValueError unless some weight is above 0.
    """
    total = sum(weights)
    if not total > 0:
        raise ValueError(f"weights {list(weights)}: none is above 0")
    exact = [number * weight / total for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for index in [i for i in by_remainder if weights[i] > 0][: number - sum(counts)]:
        counts[index] += 1
    return counts
