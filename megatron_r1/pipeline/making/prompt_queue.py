"""The prompts that a `sample` or `preferences` stage asks, each once, from where an earlier attempt stopped.

Between the sources (`data/prompts.py`) and the chunks that are sampled (`pipeline/making/chunks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from megatron_r1.config.data import PromptsConfig
from megatron_r1.data.cursor import epoch_order
from megatron_r1.data.heldout import question_hash
from megatron_r1.data.prompts import PromptSource, open_prompts
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.types import Prompt


class PromptQueue:
    """The prompts of some sources, one source after the other, each in its order.

    Args:
        heldout: question hashes of those that are left out.
        skip: prompts that are taken already.

    Raises UserError as `open_prompts`.
    """

    def __init__(
        self, sources: Sequence[PromptsConfig], tokenizer: Tokenizer, heldout: frozenset[str], skip: int = 0
    ) -> None:
        self._sources = [(open_prompts(config, tokenizer), config) for config in sources]
        self._heldout, self._taken = heldout, skip
        self._waiting = islice(self._each(), skip, None)

    @property
    def left(self) -> int | None:
        """How many are still to be taken; None where a source is a stream, whose length nobody knows."""
        lengths = [len(source) if isinstance(source, PromptSource) else None for source, _ in self._sources]
        known = [length for length in lengths if length is not None]
        return sum(known) - self._taken if len(known) == len(lengths) else None

    def take(self, number: int) -> list[Prompt]:
        """The next prompts, held-out ones included; [] at the end."""
        found = [make() for make in islice(self._waiting, number)]
        self._taken += len(found)
        return found

    def take_asked(self, number: int) -> list[Prompt]:
        """The next prompts up to and with the `number`-th that is not held out; one at least, [] at the end."""
        found: list[Prompt] = []
        asked = 0
        while (asked < number or not found) and (ahead := self.take(1)):
            found += ahead
            asked += self.asks(ahead[0])
        return found

    def asks(self, prompt: Prompt) -> bool:
        """Whether it is not held out."""
        return question_hash(prompt.question) not in self._heldout

    def _each(self) -> Iterator[Callable[[], Prompt]]:
        """A call a prompt: those that are skipped need not be made."""
        for source, config in self._sources:
            seed = config.seed if config.shuffle else None
            if isinstance(source, PromptSource):
                for index in epoch_order(len(source), seed, epoch=0):
                    yield _later(source.__getitem__, index)
            else:
                for prompt in source.stream(0, seed, 0):
                    yield _later(lambda same: same, prompt)


def _later(make: Callable[[Any], Prompt], argument: Any) -> Callable[[], Prompt]:
    return lambda: make(argument)
