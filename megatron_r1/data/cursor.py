"""Where training stands in its prompts (or preference pairs): what comes next, in which epoch, and what was skipped.

Between a prompt source and the rollout. Each epoch is a permutation seeded by (seed, epoch), so
two integers are the whole state and a resumed run sees exactly the prompts it would have seen.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from megatron_r1.config.errors import UserError
from megatron_r1.data.generators import keyed_random
from megatron_r1.data.heldout import question_hash
from megatron_r1.data.prompts import Asked, PromptSource, PromptStream

Item = TypeVar("Item", bound=Asked)


class PromptCursor(Generic[Item]):
    """Takes prompts from a source, epoch after epoch.

    Args:
        source: prompts by index, or a stream that can only be read in order.
        shuffle: a new order each epoch; a stream shuffles within its buffer.
        seed: of the orders.
        exclude: question hashes (`data/heldout.py`) that are never handed out; skips are counted
            in `excluded`.
    """

    def __init__(
        self,
        source: PromptSource[Item] | PromptStream[Item],
        shuffle: bool,
        seed: int,
        exclude: frozenset[str] = frozenset(),
    ) -> None:
        self.source = source
        self.shuffle = shuffle
        self.seed = seed
        self.exclude = exclude
        self.epoch = 0
        self.position = 0  # prompts read of this epoch, those skipped included
        self.excluded = 0  # prompts skipped since the start, over all epochs
        # Reads this epoch from this position on; None: to be opened.
        self._reader: Iterator[Item] | None = None

    def take(self, n: int) -> list[Item]:
        """The next n prompts, going on into the next epoch where this one ends.

        Raises:
            UserError: a whole epoch holds no prompt that may be handed out.
        """
        taken: list[Item] = []
        ends_passed = 0  # since a prompt was last kept
        while len(taken) < n:
            prompt = self._next()
            if prompt is None:
                ends_passed += 1
                if ends_passed > 1:
                    raise UserError(
                        f"prompts {self.source.name}: a whole epoch gives no prompt to train on; "
                        "it is empty or every question is held out for evaluation. Give other "
                        "problems to one of the two"
                    )
                self.epoch, self.position, self._reader = self.epoch + 1, 0, None
                continue
            self.position += 1
            if self.exclude and question_hash(prompt.question) in self.exclude:
                self.excluded += 1
                continue
            ends_passed = 0
            taken.append(prompt)
        return taken

    def state(self) -> dict[str, Any]:
        """Where the cursor stands, as JSON."""
        return self._identity() | {
            "epoch": self.epoch,
            "position": self.position,
            "excluded": self.excluded,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of the same source, size, seed and order.

        Raises:
            UserError: the prompts are not the ones the state was taken from.
        """
        for key, now in self._identity().items():
            if state[key] != now:
                raise UserError(
                    f"prompts: {key} was {state[key]!r} when the checkpoint was written and is "
                    f"{now!r} now, so the order of prompts cannot be continued; restore the "
                    "setting or start the stage anew"
                )
        self.epoch = int(state["epoch"])
        self.position = int(state["position"])
        self.excluded = int(state["excluded"])
        self._reader = None

    def _identity(self) -> dict[str, Any]:
        """What must not change between a state and its restore."""
        length = len(self.source) if isinstance(self.source, PromptSource) else None
        return {
            "source": self.source.name,
            "length": length,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def _next(self) -> Item | None:
        """The prompt at the current position; None at the end of the epoch."""
        if self._reader is None:
            self._reader = self._read_epoch()
        return next(self._reader, None)

    def _read_epoch(self) -> Iterator[Item]:
        if isinstance(self.source, PromptSource):
            order = epoch_order(len(self.source), self.seed if self.shuffle else None, self.epoch)
            return (self.source[index] for index in order[self.position :])
        return self.source.stream(self.epoch, self.seed if self.shuffle else None, self.position)


def epoch_order(length: int, seed: int | None, epoch: int) -> array[int]:
    """[length] the indices 0..length-1 in the order of this epoch; seed None: as they stand."""
    order = array("Q", range(length))
    if seed is not None:
        keyed_random("order", seed, epoch).shuffle(order)
    return order
