"""Readers of a user's files: rows by index (JSON lines, parquet, `datasets`) or streamed in order.

Below `data/prompts.py`, `data/reward_rows.py` and `data/conversations.py`, which turn rows into what they are called
after. Everything is local: nothing here asks a network.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.config.data import ConversationsConfig, FileConfig, PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.data.records import check_columns, check_row

logger = logging.getLogger(__name__)

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Suffix -> builder of the `datasets` library."""


class Rows(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def where(self, index: int) -> str:
        """A row's place for messages: "file:line" or "file, row n"."""
        ...


class BadRows:
    """Counts rows that are left out because they are no good: each is reported, and one more than allowed an error."""

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = allowed
        self.count = 0

    def passes(self, check: Callable[[], object]) -> bool:
        """Whether `check` raises no UserError.

        Raises:
            UserError: it does, and no further row may be bad.
        """
        try:
            check()
        except UserError as error:
            self.count += 1
            if self.count > self.allowed:
                more = f" (bad row {self.count}; max_bad_rows = {self.allowed})" if self.allowed else ""
                raise UserError(f"{error}{more}") from error
            logger.warning("left out, bad row %d of at most %d: %s", self.count, self.allowed, error)
            return False
        return True


class JsonLines:
    """A JSON-lines file, checked whole at the start; memory holds the rows' byte offsets only."""

    def __init__(self, path: Path, config: FileConfig, bad: BadRows | None = None) -> None:
        """bad: takes rows that are no good; None: the first is an error."""
        bad = BadRows() if bad is None else bad
        self.path = path
        self._offsets = array("Q")
        self._lines = array("Q")
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if len(self._offsets) == config.size:
                    break
                if line.strip() and bad.passes(partial(self._check, line, config, f"{path}:{number}")):
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return parse_line(file.readline(), self.where(index))

    def where(self, index: int) -> str:
        """file:line of a row."""
        return f"{self.path}:{self._lines[index]}"

    def _check(self, line: bytes, config: FileConfig, where: str) -> None:
        check_row(parse_line(line, where), config, where)


def parse_line(line: bytes, where: str) -> Mapping[str, Any]:
    """The object of one line of a JSON-lines file.

    Raises:
        UserError: it is none, in UTF-8.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # json's and unicode's errors are both ValueErrors
        raise UserError(f"{where}: not valid JSON ({error}); write one object per line, in UTF-8") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}; each line must be an object {{...}}")
    return row


class TableRows:
    """Rows of a parquet file or a folder of them, memory-mapped."""

    def __init__(self, path: Path, config: FileConfig) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise UserError('source = "parquet" needs the library pyarrow: pip install pyarrow') from error
        try:
            self._table = pq.read_table(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as parquet ({error})") from error
        self.path = path
        check_columns(self._table.column_names, config, str(path))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        return row

    def where(self, index: int) -> str:
        """File and row, counted from 0."""
        return f"{self.path}, row {index}"


class DatasetRows:
    """Rows of a `datasets` folder (`save_to_disk`) or of local json, parquet and csv files."""

    def __init__(self, path: Path, config: PromptsConfig | ConversationsConfig) -> None:
        self.path = path
        self._dataset = load_dataset(path, config, streaming=False)
        check_columns(self._dataset.column_names, config, str(path))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._dataset[index]
        return row

    def where(self, index: int) -> str:
        """Folder and row, counted from 0."""
        return f"{self.path}, row {index}"


class RowStream:
    """Rows of the same in order, without loading them: `iterate` starts over each time."""

    def __init__(self, path: Path, config: PromptsConfig) -> None:
        self.path = path
        self._dataset = load_dataset(path, config, streaming=True)

    def iterate(self) -> Iterator[Mapping[str, Any]]:
        """Every row, in the order of the files.

        Raises:
            UserError: a file turns out to be broken.
        """
        with _readable(self.path):
            yield from self._dataset


def require_file(config: FileConfig) -> Path:
    """The path of a file source.

    Raises:
        UserError: it does not exist, or is a folder where a file is needed.
    """
    path = config.path
    if path is None or not path.exists():
        raise UserError(f"{config.table}.path: {str(path)!r} does not exist (looked from {Path.cwd()})")
    if config.source == "jsonl" and not path.is_file():
        raise UserError(f'{config.table}.path: {path} is a folder; source "jsonl" reads one file of JSON lines')
    return path


def load_dataset(path: Path, config: PromptsConfig | ConversationsConfig, streaming: bool) -> Any:
    """A `datasets` Dataset, or an IterableDataset when streaming.

    Option `split` picks one of a saved DatasetDict.

    Raises:
        UserError: the library is missing, the folder holds no data, or the split is unknown.
    """
    # Read when the library is imported: a local path must not ask the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import datasets
    except ImportError as error:
        raise UserError('source = "datasets" needs the library of that name: pip install datasets') from error
    with _readable(path):
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                saved = _pick_split(saved, config, path)
            return saved.to_iterable_dataset() if streaming else saved
        files = _data_files(path)
        builder = BUILDERS[files[0].suffix]
        names = [str(file) for file in files]
        return datasets.load_dataset(builder, data_files=names, split="train", streaming=streaming)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what `datasets` and pyarrow raise for a broken file into a message."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"{path}: `datasets` cannot read it ({type(error).__name__}: {error})") from error


def _pick_split(saved: Mapping[str, Any], config: PromptsConfig | ConversationsConfig, path: Path) -> Any:
    split: Any = config.options.get("split")
    if split is None and len(saved) == 1:
        return next(iter(saved.values()))
    if split not in saved:
        raise UserError(f"{path}: split {split!r} is not there; set options = {{split = ...}} to one of {list(saved)}")
    return saved[split]


def _data_files(path: Path) -> list[Path]:
    """The data file itself, or those of a folder; all of one kind."""
    candidates = [path] if path.is_file() else path.iterdir()
    files = sorted(file for file in candidates if file.suffix in BUILDERS)
    if not files:
        raise UserError(
            f"{path}: neither a folder written by save_to_disk nor data files; allowed are {', '.join(BUILDERS)}"
        )
    kinds = sorted({BUILDERS[file.suffix] for file in files})
    if len(kinds) > 1:
        raise UserError(f"{path}: files of several kinds ({', '.join(kinds)}); give a folder with one kind")
    return files
