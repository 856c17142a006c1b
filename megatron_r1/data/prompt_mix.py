"""Several prompt sources as one: how many questions of a phase each of them gives, and where each stands.

Between the sources (`data/prompts.py`, each behind a cursor) and the rollout of a `grpo` or `distill` stage. R1's
second RL stage asks reasoning prompts throughout and general ones in its last steps only (DeepSeek-R1 v2, 3.2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.data.cursor import PromptCursor
from megatron_r1.data.prompts import open_prompts
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.types import Prompt

_ROUNDING = 1e-9  # of shares added up in floating point


class PromptMix:
    """Takes the questions of a phase from its sources, by weight.

    What a share leaves of a question over is carried to the next phase, so that over many phases each source gives its
    share to within one question, however small that is. A source that does not take part is owed nothing: it begins
    with what it is owed at that time, 0, and does not make up for what was asked before.

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
        self._owed = [0.0 for _ in sources]  # of each source: its share so far less what it gave, within (-1, 1)

    def take(self, number: int, step: int = 0, steps: int = 0) -> list[Prompt]:
        """The questions of a phase that begins after `step` of `steps` optimizer steps, source after source.

        Raises:
            UserError: a source has none that may be handed out.
        """
        weights = [source.weight if source.active(step, steps) else 0.0 for source in self.sources]
        counts, self._owed = fair_counts(number, weights, self._owed)
        taken = [cursor.take(count) for cursor, count in zip(self._cursors, counts, strict=True)]
        return [replace(prompt, source=i) for i, prompts in enumerate(taken) for prompt in prompts]

    def state(self) -> dict[str, Any]:
        """Where the next questions come from, as JSON."""
        return {"cursors": [cursor.state() for cursor in self._cursors], "owed": list(self._owed)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of the same sources.

        Raises:
            UserError: they are others.
        """
        before, now = len(state["cursors"]), len(self._cursors)
        if before != now:
            raise UserError(
                f"prompts: there were {before} sources when the checkpoint was written and there are {now} now, so the "
                "order of prompts cannot be continued; restore the sources or start the stage anew"
            )
        for cursor, known in zip(self._cursors, state["cursors"], strict=True):
            cursor.restore(known)
        self._owed = [float(owed) for owed in state["owed"]]


def fair_counts(number: int, weights: Sequence[float], owed: Sequence[float]) -> tuple[list[int], list[float]]:
    """How many of `number` questions each source gives, and what it is owed afterwards, which stays within (-1, 1).

    One question after the other goes to the source that must have it earliest, among those whose share is not used up:
    Baruah et al., "Proportionate progress" (1996), for one processor. A source of weight 0 gives none and is owed what
    it was before. Some weight must be above 0.
    """
    total = sum(weights)
    rates = [weight / total for weight in weights]
    active = [i for i, rate in enumerate(rates) if rate > 0]
    counts = [0] * len(rates)
    for asked in range(1, number + 1):
        open_now = [i for i in active if owed[i] + asked * rates[i] - counts[i] > _ROUNDING]
        # (1 - owed + given) / rate: questions after which the source would be behind by a whole one.
        counts[min(open_now or active, key=lambda i: ((1 - owed[i] + counts[i]) / rates[i], i))] += 1
    return counts, [left + number * rate - count for left, rate, count in zip(owed, rates, counts, strict=True)]
