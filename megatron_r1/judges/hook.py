"""What every judge and rewriter is behind: a server that is asked with a prompt, or a function of the user's.

`judges/correctness.py`, `judges/preference.py` and `judges/rewriting.py` say what is asked and how a reply is read;
here a reply that cannot be read is asked for once more, and a function's exception names the item.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from megatron_r1.config.errors import UserError
from megatron_r1.config.judges import JudgeConfig, RewriteConfig
from megatron_r1.judges import wording
from megatron_r1.judges.endpoint import Endpoint, Refused
from megatron_r1.judges.functions import load_function

Kind = Literal["correctness", "pair", "label", "rewrite"]
T = TypeVar("T")

FIELDS: dict[str, tuple[str, ...]] = {
    "correctness": ("question", "reference", "answer"),
    "pair": ("question", "answer_a", "answer_b"),
    "label": ("question", "answer"),
    "rewrite": ("question", "thought", "summary", "language"),
}
"""Kind -> the fields of its prompts, which are also the arguments of its functions, in order."""
CONTEXT = ("question", "reference", "language")
"""Fields that a prompt of the user's may leave out."""

_FIELD = re.compile(r"\{([a-z_]+)\}")
_OBJECT = re.compile(r"\{")


@dataclass(frozen=True, slots=True)
class Hook:
    """An opened judge or rewriter: `ask` either the server or the function."""

    kind: Kind
    key: str
    prompt: str
    endpoint: Endpoint | None
    function: Callable[..., Any] | None

    def ask(
        self, items: Sequence[Mapping[str, str]], read: Callable[[str], T | None], accept: Callable[[Any], T | None]
    ) -> list[T | None]:
        """What the judge says of each item, in their order.

        None: it could not be read twice, the server refused the item, or the function says so.

        items: field -> text, of FIELDS[kind]. read: a server's reply, None if unreadable. accept: a function's result;
        it raises ValueError for one that is not as documented.
        """
        if self.endpoint is None:
            return [self._call(number, item, accept) for number, item in enumerate(items)]
        chats = [[{"role": "user", "content": fill(self.prompt, item)}] for item in items]
        try:
            replies = self.endpoint.ask(chats)
        except Refused as error:
            raise UserError(f"{error} (asked about {_named(error.number, items[error.number])})") from error
        values = [None if reply is None else read(reply) for reply in replies]
        again = [i for i, value in enumerate(values) if value is None and replies[i] is not None]
        retry = [
            # An empty message of the assistant's is refused by some servers.
            [*chats[i], {"role": "assistant", "content": replies[i] or "..."}, {"role": "user", "content": self._again}]
            for i in again
        ]
        for i, reply in zip(again, self.endpoint.ask(retry), strict=True):
            values[i] = None if reply is None else read(reply)
        return values

    @property
    def _again(self) -> str:
        return wording.AGAIN[self.kind]

    def _call(self, number: int, item: Mapping[str, str], accept: Callable[[Any], T | None]) -> T | None:
        assert self.function is not None, "a hook has a server or a function"
        try:
            return accept(self.function(*(item[field] for field in FIELDS[self.kind])))
        except Exception as error:
            raise UserError(
                f"{self.key}.call: the function raised {type(error).__name__}: {error} on {_named(number, item)}; "
                "docs/data-stages.md gives its arguments and results"
            ) from error


def _named(number: int, item: Mapping[str, str]) -> str:
    return f"item {number} (question: {' '.join(item['question'].split())[:120]!r})"


def open_hook(config: JudgeConfig | RewriteConfig, kind: Kind, key: str, kept: str) -> Hook:
    """Load the function, or check what a server needs; sends no request.

    key: the table in the recipe, e.g. "stage.cold.judge". kept: what is safe when a server that is down ends the run.
    Raises UserError for a function that is not there, an environment variable that is not set, or a prompt without its
    fields.
    """
    prompt = config.prompt if config.prompt is not None else wording.PROMPTS[kind]
    if config.prompt is not None:
        _check_prompt(config, kind, key)
    if config.server is not None:
        return Hook(kind, key, prompt, Endpoint(config.server, f"{key}.server", kept), None)
    assert config.call is not None, "the schema wants a server or a function"
    return Hook(kind, key, prompt, None, load_function(config.call, f"{key}.call"))


def _check_prompt(config: JudgeConfig | RewriteConfig, kind: Kind, key: str) -> None:
    if config.server is None:
        raise UserError(f"{key}.prompt has no effect with `call`; remove it")
    needed = [field for field in FIELDS[kind] if field not in CONTEXT]
    missing = [field for field in needed if f"{{{field}}}" not in (config.prompt or "")]
    if missing:
        raise UserError(
            f"{key}.prompt has no field {', '.join(f'{{{field}}}' for field in missing)}, so the server would not see "
            f"what it is to judge; its fields are {', '.join(f'{{{field}}}' for field in FIELDS[kind])}"
        )


def fill(prompt: str, values: Mapping[str, str]) -> str:
    """The prompt with its fields replaced, once: braces in the values, and unknown ones in the prompt, stay."""
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), prompt)


def read_json(reply: str, key: str) -> str | None:
    """The text under `key` in the last JSON object of a reply that has it, in lower case; None if there is none.

    The object may stand in a code fence or between other words.
    """
    decoder = json.JSONDecoder(strict=False)  # judges write raw line breaks into their analysis
    found = None
    position = 0
    while (match := _OBJECT.search(reply, position)) is not None:
        try:
            value, position = decoder.raw_decode(reply, match.start())
        except (json.JSONDecodeError, RecursionError):
            position = match.end()
            continue
        if isinstance(value, dict) and isinstance(value.get(key), str):
            found = value[key].strip().lower()
    return found
