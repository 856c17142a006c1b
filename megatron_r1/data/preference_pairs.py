"""Preference pairs from files, tokenised, batch after batch.

First in the flow of a `reward_model` stage. Every row of a file is checked when it is opened; a pair is tokenised when
its turn comes, and left out, and counted, when it is held out for an evaluation or too long to be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_r1.config.data import PairsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.data.cursor import PromptCursor
from megatron_r1.data.files import JsonLines, Rows, TableRows, require_file
from megatron_r1.data.records import check_row, read_preference
from megatron_r1.data.templates import render
from megatron_r1.data.tokenizers import Tokenizer, encode_prompt
from megatron_r1.types import PreferencePair, Sample


class PreferencePairs:
    """Rows of a file as pairs by index; ids are "<file name>:<row>", counted from 0.

    Raises:
        UserError: a missing or empty file, a missing column, a row that is no pair.
    """

    def __init__(self, config: PairsConfig, tokenizer: Tokenizer) -> None:
        path = require_file(config)
        readers: dict[str, Callable[..., Rows]] = {"jsonl": JsonLines, "parquet": TableRows}
        self.name = path.name
        self._config, self._tokenizer = config, tokenizer
        self._rows = readers[config.source](path, config)
        self._length = min(len(self._rows), config.size or len(self._rows))
        if not self._length:
            raise UserError(f"pairs.path: {path} holds no rows; a reward model needs one pair at least")
        if config.source == "parquet":  # its reader looks at the columns only
            for index in range(self._length):
                check_row(self._rows[index], config, self._rows.where(index))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> PreferencePair:
        if not 0 <= index < self._length:
            raise IndexError(f"pair {index} of {self.name}, which has {self._length}")
        where = self._rows.where(index)
        row = read_preference(self._rows[index], self._config, where)
        try:
            prompt = encode_prompt(self._tokenizer, render(self._config.template, row.prompt))
            chosen, rejected = self._tokenizer.encode(row.chosen), self._tokenizer.encode(row.rejected)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if not prompt:
            raise UserError(f"{where}: the {self._tokenizer.name} tokenizer makes no token of {row.prompt!r}")
        end = self._tokenizer.eos_id
        return PreferencePair(
            id=f"{self.name}:{index}",
            question=row.prompt,
            chosen=Sample(token_ids=[*prompt, *chosen, end], prompt_length=len(prompt)),
            rejected=Sample(token_ids=[*prompt, *rejected, end], prompt_length=len(prompt)),
        )


class PairBatches:
    """Endless batches of pairs, epoch after epoch.

    Args:
        source: the pairs.
        shuffle: a new order each epoch, drawn from `seed`.
        exclude: question hashes (`data/heldout.py`) that are never trained on.
        max_tokens: longest sequence of a pair; a pair with a longer one is left out and counted in `too_long`.
    """

    def __init__(
        self, source: PreferencePairs, *, shuffle: bool, seed: int, exclude: frozenset[str], max_tokens: int
    ) -> None:
        self._cursor = PromptCursor(source, shuffle, seed, exclude)
        self._pairs, self._max_tokens = len(source), max_tokens
        self.too_long = 0  # pairs left out since the start, over all epochs

    @property
    def excluded(self) -> int:
        """Pairs left out since the start because their question is held out."""
        return self._cursor.excluded

    def take(self, number: int) -> list[PreferencePair]:
        """The next pairs.

        Raises:
            UserError: none is short enough, or every question is held out.
        """
        taken: list[PreferencePair] = []
        passed = 0  # too long since a pair was last kept
        while len(taken) < number:
            (pair,) = self._cursor.take(1)
            if max(len(pair.chosen.token_ids), len(pair.rejected.token_ids)) <= self._max_tokens:
                taken.append(pair)
                passed = 0
                continue
            self.too_long += 1
            passed += 1
            if passed >= self._pairs:
                raise UserError(
                    f"pairs: no pair of {self._cursor.source.name} has both sequences within {self._max_tokens} tokens "
                    "(max_length, and the model's max_position_embeddings), prompt and template included"
                )
        return taken

    def state(self) -> dict[str, Any]:
        """Where the next pair comes from, as JSON."""
        return {"cursor": self._cursor.state(), "too_long": self.too_long}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of the same pairs.

        Raises:
            UserError: they are others.
        """
        self._cursor.restore(state["cursor"])
        self.too_long = int(state["too_long"])


def sequences(pairs: Sequence[PreferencePair]) -> list[Sample]:
    """[2 x pairs] chosen, rejected, chosen, rejected, ...: batch them with together = 2."""
    return [sample for pair in pairs for sample in (pair.chosen, pair.rejected)]
