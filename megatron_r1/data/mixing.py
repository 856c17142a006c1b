"""Which rows of several sources of conversations go into a mix, and in which order.

Between the sources (`data/conversations.py`) and the data.jsonl of a `mix` stage (`pipeline/making/mix.py`). Each
source is read once: a row is left out, and counted, when it is malformed, was there before, or shares words with an
evaluation (`data/decontaminate.py`). Memory holds a few numbers a row.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.config.data import MixSource
from megatron_r1.config.errors import UserError
from megatron_r1.config.stages import MixStage
from megatron_r1.data.conversations import Conversations
from megatron_r1.data.decontaminate import Contamination
from megatron_r1.data.files import parse_line
from megatron_r1.data.generators import keyed_random
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.types import Conversation

DOMAIN_KEY = "domain"
EXAMPLES = 5
"""Rows of a source left out for contamination that are told in full."""

_DOMAIN = re.compile(r"[a-z0-9][a-z0-9_-]*")


class Example(NamedTuple):
    """A row that was left out because an evaluation asks something of it."""

    row: str  # "<file name>:<row>"
    sets: list[str]
    shared: str  # the first words in common
    question: str


@dataclass(slots=True)
class SourceRows:
    """What one source has to offer; the arrays are aligned."""

    name: str
    config: MixSource
    conversations: Conversations
    rows: array[int] = field(default_factory=lambda: array("Q"))  # places in `conversations` of the rows that may go in
    tokens: array[int] = field(default_factory=lambda: array("Q"))
    domains: list[str] = field(default_factory=list)
    duplicates: int = 0
    contaminated: int = 0
    by_set: Counter[str] = field(default_factory=Counter)  # a row may count for several evaluation sets
    examples: list[Example] = field(default_factory=list)  # the first EXAMPLES

    @property
    def bad(self) -> int:
        """Rows that are malformed or that the tokenizer cannot write."""
        return self.conversations.bad.count

    def record(self, place: int) -> dict[str, Any]:
        """The row of data.jsonl for the `place`-th row that may go in."""
        messages = self.conversations[self.rows[place]].messages
        return {
            "messages": [
                {"role": message.role, "content": message.content}
                | ({} if message.reasoning is None else {"reasoning_content": message.reasoning})
                for message in messages
            ],
            DOMAIN_KEY: self.domains[place],
            "source": self.name,
        }


class Draw(NamedTuple):
    """How many rows a source gives."""

    wanted: int | None  # by weight; None: all it has
    given: int

    @property
    def short(self) -> int:
        """Rows missing because the source is too small, or capped."""
        return 0 if self.wanted is None else self.wanted - self.given


def read_sources(
    stage: MixStage, names: Sequence[str], contamination: Contamination, tokenizer: Tokenizer
) -> list[SourceRows]:
    """Every source's rows that may go into the mix.

    names: of the sources. Of rows with the same messages the first one stays, whichever source it is in. The tokens of
    a row are those of all its texts, thoughts included, without the marks of a chat format.

    Raises:
        UserError: as `Conversations`; more rows than `max_bad_rows` that the tokenizer cannot write, or with a domain
            that is no name.
    """
    seen: set[bytes] = set()
    found = []
    for config, name in zip(stage.sources, names, strict=True):
        source = SourceRows(name, config, Conversations(config))
        for index in range(len(source.conversations)):
            _read_row(source, index, seen, contamination, tokenizer)
        found.append(source)
    return found


def _read_row(
    source: SourceRows, index: int, seen: set[bytes], contamination: Contamination, tokenizer: Tokenizer
) -> None:
    conversation = source.conversations[index]
    digest = _digest(conversation)
    if digest in seen:
        source.duplicates += 1
        return
    seen.add(digest)
    texts = list(_texts(conversation))
    # A system message is no question and no answer.
    sets, shared = contamination.find(text for role, text in texts if role != "system")
    if sets:
        source.contaminated += 1
        source.by_set.update(sets)
        if len(source.examples) < EXAMPLES:
            source.examples.append(Example(conversation.id, sets, shared, conversation.question))
        return
    measured: list[tuple[str, int]] = []

    def measure() -> None:
        try:
            domain = _domain(source.conversations.row(index), source.config.domain)
            measured.append((domain, sum(len(tokenizer.encode(text)) for _, text in texts)))
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from error

    if source.conversations.bad.passes(measure):
        ((domain, tokens),) = measured
        source.rows.append(index)
        source.tokens.append(tokens)
        source.domains.append(domain)


def read_questions(path: Path, key: str) -> list[str]:
    """The questions of a JSON-lines file of the user's, in its column `key`.

    Raises:
        UserError: a missing file, a line that is no object, a question that is no text.
    """
    if not path.is_file():
        raise UserError(f"decontaminate.files: there is no file {path}; name a file of JSON lines")
    questions = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = parse_line(line, f"{path}:{number}")
                if not isinstance(row.get(key), str):
                    raise UserError(
                        f"{path}:{number}: column {key!r} holds {row.get(key)!r}; a question is a text. It has "
                        f"{', '.join(map(repr, row)) or 'no columns'}; set decontaminate.key to the right one"
                    )
                questions.append(row[key])
    return questions


def read_references(path: Path, key: str) -> list[str]:
    """The texts in a column of a JSON-lines file that `read_questions` can read; rows without it have none."""
    with path.open("rb") as file:
        rows = [parse_line(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip()]
    return [row[key] for row in rows if isinstance(row.get(key), str)]


def counts(stage: MixStage, available: Sequence[int]) -> list[Draw]:
    """How many rows each source gives, of those available.

    With `size`, the sources' shares by weight (largest remainder), of which a source that is too small, or capped,
    gives what it has; the others do not make up for it, so that their proportions stay. Without, all, up to the cap.
    """
    wanted: Sequence[int | None] = [None] * len(available)
    if stage.size is not None:
        wanted = apportion(stage.size, [source.weight for source in stage.sources])
    limits = [min(have, source.cap or have) for source, have in zip(stage.sources, available, strict=True)]
    return [Draw(want, limit if want is None else min(want, limit)) for want, limit in zip(wanted, limits, strict=True)]


def draw(sources: Sequence[SourceRows], draws: Sequence[Draw], seed: int) -> list[tuple[int, int]]:
    """(source, place among its rows) of the mix, shuffled by the seed.

    A source with `shuffle` gives a random choice of its rows, another its first ones.
    """
    chosen: list[tuple[int, int]] = []
    for number, (source, (_, given)) in enumerate(zip(sources, draws, strict=True)):
        places = list(range(len(source.rows)))
        if source.config.shuffle:
            keyed_random("mix-source", seed, number).shuffle(places)
        chosen += [(number, place) for place in places[:given]]
    keyed_random("mix", seed).shuffle(chosen)
    return chosen


def _texts(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """(role, text) of every message and thought."""
    for message in conversation.messages:
        if message.reasoning is not None:
            yield message.role, message.reasoning
        yield message.role, message.content


def _digest(conversation: Conversation) -> bytes:
    said = [(message.role, message.reasoning, message.content) for message in conversation.messages]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).digest()


def _domain(row: Mapping[str, Any], default: str) -> str:
    """What the row is counted as."""
    value = row.get(DOMAIN_KEY)
    if value is None:
        return default
    if not isinstance(value, str) or not _DOMAIN.fullmatch(value):
        raise UserError(
            f"column {DOMAIN_KEY!r} holds {value!r}; a domain is a name of small letters, digits, _ and -, or nothing"
        )
    return value


def apportion(number: int, weights: Sequence[float]) -> list[int]:
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
