"""The well-formed rows of a user's file by index: every row is checked when the file is opened.

Between the readers (`data/files.py`) and what is made of rows: prompts, preference pairs, labelled answers,
conversations. A stream is not checked so: each of its rows is when it is reached, and the first bad one is an error.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any

from megatron_r1.config.data import ConversationsConfig, FileConfig, PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.data.files import BadRows, DatasetRows, JsonLines, Rows, TableRows, require_file
from megatron_r1.data.records import check_row


class CheckedRows:
    """At most `size` rows, the first well-formed ones; `bad` counts the others, which are reported one by one.

    thing: what a row is, for messages, e.g. "conversation".

    Raises:
        UserError: a missing file, one without a well-formed row, a missing column, more bad rows than `max_bad_rows`.
    """

    def __init__(self, config: FileConfig, thing: str) -> None:
        path = require_file(config)
        self.name = path.name
        self.bad = BadRows(config.max_bad_rows)
        self._config, self._thing = config, thing
        self._rows: Rows
        if config.source == "jsonl":
            self._rows = JsonLines(path, config, self.bad)
            self._good = array("Q", range(len(self._rows)))
        else:
            if isinstance(config, PromptsConfig | ConversationsConfig) and config.source == "datasets":
                self._rows = DatasetRows(path, config)
            else:
                self._rows = TableRows(path, config)
            good = (index for index in range(len(self._rows)) if self.bad.passes(partial(self._check, index)))
            self._good = array("Q", islice(good, config.size))
        if not self._good:
            raise UserError(f"{config.table}.path: {path} holds no rows; one {thing} is needed at least")

    def __len__(self) -> int:
        return len(self._good)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._rows[self.number(index)]

    def number(self, index: int) -> int:
        """Of the reader's rows, which one it is: of JSON lines the bad and blank ones do not count."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self._thing} {index} of {self.name}, which has {len(self)}")
        return self._good[index]

    def where(self, index: int) -> str:
        """Its place for messages: "file:line" or "file, row n"."""
        return self._rows.where(self.number(index))

    def _check(self, row: int) -> None:
        check_row(self._rows[row], self._config, self._rows.where(row))
