"""What preference pairs and labelled answers have in common: rows of a file, tokenised, batch after batch.

First in the flow of a `reward_model` stage, below `data/preference_pairs.py` and `data/labelled_answers.py`. Every row
of a file is checked when it is opened; it is tokenised when its turn comes, and left out, and counted, when it is held
out for an evaluation or too long to be scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from megatron_r1.config.data import LabelsConfig, PairsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.data.checked_rows import CheckedRows
from megatron_r1.data.cursor import PromptCursor
from megatron_r1.data.templates import render
from megatron_r1.data.tokenizers import Tokenizer, encode_prompt
from megatron_r1.types import Sample


class Scored(Protocol):
    """A question with sequences to score."""

    @property
    def question(self) -> str: ...

    @property
    def samples(self) -> list[Sample]: ...


Item = TypeVar("Item", bound=Scored)
Config = TypeVar("Config", PairsConfig, LabelsConfig)


class RewardRows(ABC, Generic[Config, Item]):
    """Rows of a file as items by index; ids are "<file name>:<row>", counted from 0.

    Raises:
        UserError: as `CheckedRows`.
    """

    thing: ClassVar[str]  # what a row is, for messages

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self._rows = CheckedRows(config, self.thing)
        self.name, self.bad = self._rows.name, self._rows.bad
        self.config: Config = config
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        return self._read(self._rows[index], f"{self.name}:{index}", self._rows.where(index))

    @abstractmethod
    def _read(self, row: Mapping[str, Any], name: str, where: str) -> Item:
        """The item of a row, which is a well-formed one."""

    def _sequences(self, question: str, answers: Sequence[str], where: str) -> list[Sample]:
        """Template with the question, answer, end of sequence: of each answer."""
        try:
            return [answer_sequence(self._tokenizer, self.config.template, question, answer) for answer in answers]
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def count_rows(config: PairsConfig | LabelsConfig) -> int:
    """How many well-formed rows a table names.

    Raises:
        UserError: as `CheckedRows`.
    """
    return len(CheckedRows(config, "row"))


def answer_sequence(tokenizer: Tokenizer, template: str, question: str, answer: str) -> Sample:
    """What a reward model reads, in training and when it scores: template with the question, answer, end of sequence.

    Raises:
        UserError: a text that the tokenizer cannot encode, or of whose prompt it makes no token.
    """
    prompt = encode_prompt(tokenizer, render(template, question))
    if not prompt:
        raise UserError(f"the {tokenizer.name} tokenizer makes no token of {question!r}")
    return Sample(token_ids=[*prompt, *tokenizer.encode(answer), tokenizer.eos_id], prompt_length=len(prompt))


class RewardBatches(Generic[Item]):
    """Endless batches of items, epoch after epoch.

    Args:
        source: the items.
        seed: of the new order of each epoch, where `shuffle` is set.
        exclude: question hashes (`data/heldout.py`) that are never trained on.
        max_tokens: longest sequence; an item with a longer one is left out and counted in `too_long`.
    """

    def __init__(
        self, source: RewardRows[Any, Item], *, shuffle: bool, seed: int, exclude: frozenset[str], max_tokens: int
    ) -> None:
        self._cursor: PromptCursor[Item] = PromptCursor(source, shuffle, seed, exclude)
        self._source, self._max_tokens = source, max_tokens
        self.too_long = 0  # items left out since the start, over all epochs

    @property
    def bad(self) -> int:
        """Rows of the file that are left out because they are malformed."""
        return self._source.bad.count

    @property
    def excluded(self) -> int:
        """Items left out since the start because their question is held out."""
        return self._cursor.excluded

    def take(self, number: int) -> list[Item]:
        """The next items.

        Raises:
            UserError: none is short enough, or every question is held out.
        """
        taken: list[Item] = []
        passed = 0  # too long since an item was last kept
        while len(taken) < number:
            (item,) = self._cursor.take(1)
            if fits(item, self._max_tokens):
                taken.append(item)
                passed = 0
                continue
            self.too_long += 1
            passed += 1
            if passed >= len(self._source):
                source = self._source
                raise UserError(
                    f"{source.config.table}: no {source.thing} of {source.name} keeps within {self._max_tokens} tokens "
                    "a sequence (max_length, and the model's max_position_embeddings), prompt and template included"
                )
        return taken

    def state(self) -> dict[str, Any]:
        """Where the next item comes from, as JSON."""
        return {"cursor": self._cursor.state(), "too_long": self.too_long}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of the same rows.

        Raises:
            UserError: they are others.
        """
        self._cursor.restore(state["cursor"])
        self.too_long = int(state["too_long"])


def fits(item: Scored, max_tokens: int) -> bool:
    """Whether every sequence of an item is short enough to be scored."""
    return all(len(sample.token_ids) <= max_tokens for sample in item.samples)


def sequences(items: Sequence[Scored]) -> list[Sample]:
    """Those of all items in a row: chosen, rejected, chosen, rejected, ... (to batch with together = 2), or answers."""
    return [sample for item in items for sample in item.samples]
