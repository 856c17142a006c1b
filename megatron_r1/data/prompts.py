"""Sources of verifiable prompts: files, procedural tasks and the tasks of reasoning-gym.

First in the flow of a GRPO stage or an evaluation. A source knows nothing of epochs or order:
`data/cursor.py` does. Every mistake a file can hold is reported when it is opened or, in a stream,
when its row is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.data.checked_rows import CheckedRows
from megatron_r1.data.files import RowStream, require_file
from megatron_r1.data.generators import build_task, keyed_random, problem_at
from megatron_r1.data.gym_tasks import GymTask
from megatron_r1.data.records import read_record
from megatron_r1.data.templates import render
from megatron_r1.data.tokenizers import Tokenizer, encode_prompt
from megatron_r1.types import Prompt

DEFAULT_SIZE = 100_000
"""Problems of a procedural source whose `size` is not set."""
DEFAULT_SHUFFLE_BUFFER = 10_000
FILE_VERIFIER = "math"
"""Verifier of answers from files, unless the configuration names another."""

NumberedRows = Iterator[tuple[int, Mapping[str, Any]]]

FILE_OPTIONS: dict[str, tuple[str, ...]] = {
    "jsonl": (),
    "parquet": (),
    "datasets": ("split", "streaming", "shuffle_buffer"),
}


class Asked(Protocol):
    """What a cursor hands out: anything with a question, which may be held out."""

    @property
    def question(self) -> str: ...


Item = TypeVar("Item", bound=Asked, covariant=True)


@runtime_checkable
class PromptSource(Protocol[Item]):
    """Prompts, or other items with a question, by index; never empty."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@runtime_checkable
class PromptStream(Protocol[Item]):
    """Prompts that can only be read in order."""

    name: str

    def stream(self, epoch: int, seed: int | None, start: int = 0) -> Iterator[Item]:
        """The prompts of an epoch from the `start`-th on; a pure function of its arguments.

        seed None: in the order of the files, else shuffled by (seed, epoch).
        """
        ...


def open_prompts(config: PromptsConfig, tokenizer: Tokenizer) -> PromptSource[Prompt] | PromptStream[Prompt]:
    """The prompt source of a `[stage.prompts]` table.

    Raises:
        UserError: a missing or empty file, a missing column, a bad row, an unknown task or option.
    """
    make = PromptMaker(config, tokenizer)
    if config.source in ("generator", "reasoning_gym"):
        return ProceduralPrompts(config, make)
    _check_options(config)
    if config.source == "datasets" and config.options.get("streaming", False):
        return StreamingSource(RowStream(require_file(config), config), config, make)
    return FilePrompts(config, make)


class PromptMaker:
    """Applies the template and the tokenizer."""

    def __init__(self, config: PromptsConfig, tokenizer: Tokenizer) -> None:
        self.template = config.template
        self.domain = config.domain
        self.tokenizer = tokenizer

    def __call__(
        self,
        name: str,
        question: str,
        answer: str | None,
        verifier: str,
        metadata: dict[str, Any],
        language: str | None = None,
    ) -> Prompt:
        """The prompt of this id.

        Raises:
            UserError: the tokenizer cannot encode it, or makes nothing of it.
        """
        text = render(self.template, question)
        try:
            token_ids = encode_prompt(self.tokenizer, text)
        except UserError as error:
            raise UserError(f"prompt {name}: {error}") from error
        if not token_ids:
            raise UserError(f"prompt {name}: the {self.tokenizer.name} tokenizer makes no token of {text!r}")
        return Prompt(
            id=name,
            question=question,
            text=text,
            token_ids=token_ids,
            answer=answer,
            verifier=verifier,
            metadata=metadata,
            language=language,
            domain=self.domain,
        )


class ProceduralPrompts:
    """Problems made on demand; ids are "<task>@<seed>:<index>", as problems of two seeds differ."""

    def __init__(self, config: PromptsConfig, make: PromptMaker) -> None:
        name = config.task or ""
        self.name = f"{name}@{config.seed}"
        self._length = config.size or DEFAULT_SIZE
        self._make = make
        self._problem: Callable[[int], tuple[str, str | None, dict[str, Any]]]
        if config.source == "generator":
            task = build_task(name, config.options)
            self._problem = partial(problem_at, task, config.seed)
            own_verifier = task.verifier
        else:
            gym = GymTask(name, config.options, self._length, config.seed)
            self._problem = gym.problem
            own_verifier = gym.verifier
        self._verifier = config.verifier or own_verifier

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Prompt:
        _check_index(index, self._length, self.name)
        question, answer, metadata = self._problem(index)
        # A generator says in which language it asks; reasoning-gym has no such key.
        return self._make(f"{self.name}:{index}", question, answer, self._verifier, metadata, metadata.get("language"))


class FilePrompts:
    """The well-formed rows of a file; ids are "<file name>:<row>", counted from 0."""

    def __init__(self, config: PromptsConfig, make: PromptMaker) -> None:
        self._rows = CheckedRows(config, "prompt")
        self.name, self.bad = self._rows.name, self._rows.bad
        self._config = config
        self._make = make

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        row, where = self._rows[index], self._rows.where(index)
        return _from_row(f"{self.name}:{self._rows.number(index)}", row, where, self._config, self._make)


class StreamingSource:
    """Rows too many to load, read in order through a shuffle buffer.

    Resuming reads an epoch anew up to where it stood (rows are skipped before they become
    prompts): slower than a stored buffer, and exact.
    """

    def __init__(self, rows: RowStream, config: PromptsConfig, make: PromptMaker) -> None:
        self.name = rows.path.name
        self._rows = rows
        self._config = config
        self._make = make
        self._buffer: int = config.options.get("shuffle_buffer", DEFAULT_SHUFFLE_BUFFER)

    def stream(self, epoch: int, seed: int | None, start: int = 0) -> Iterator[Prompt]:
        """The prompts of an epoch from the `start`-th on; see `PromptStream`."""
        rows: NumberedRows = islice(enumerate(self._rows.iterate()), self._config.size)
        if seed is not None:
            rows = self._shuffled(rows, epoch, seed)
        for index, row in islice(rows, start, None):
            where = f"{self._rows.path}, row {index}"
            yield _from_row(f"{self.name}:{index}", row, where, self._config, self._make)

    def _shuffled(self, rows: NumberedRows, epoch: int, seed: int) -> NumberedRows:
        """Each row leaves a full buffer from a random place, where the next one takes its seat."""
        rng = keyed_random("stream", seed, epoch)
        buffer = list(islice(rows, self._buffer))
        for row in rows:
            seat = rng.randrange(len(buffer))
            yield buffer[seat]
            buffer[seat] = row
        rng.shuffle(buffer)
        yield from buffer


def _from_row(name: str, row: Mapping[str, Any], where: str, config: PromptsConfig, make: PromptMaker) -> Prompt:
    record = read_record(row, config, where)
    verifier = config.verifier or FILE_VERIFIER
    return make(name, record.question, record.answer, verifier, record.metadata, record.language)


def _check_index(index: int, length: int, name: str) -> None:
    if not 0 <= index < length:
        raise IndexError(f"prompt {index} of {name}, which has {length}")


def _check_options(config: PromptsConfig) -> None:
    allowed = FILE_OPTIONS[config.source]
    unknown = [key for key in config.options if key not in allowed]
    if unknown:
        raise UserError(
            f"prompts.options: source {config.source!r} has no option {', '.join(unknown)}; "
            f"allowed are {', '.join(allowed) or 'none'}"
        )
    streaming = config.options.get("streaming", False)
    if not isinstance(streaming, bool):
        raise UserError(f"prompts.options: streaming = {streaming!r}; allowed are true and false")
    buffer = config.options.get("shuffle_buffer", DEFAULT_SHUFFLE_BUFFER)
    if type(buffer) is not int or buffer < 1:
        raise UserError(f"prompts.options: shuffle_buffer = {buffer!r}; allowed is an integer from 1 on")
