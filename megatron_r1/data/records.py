"""One row of a user's file -> question and reference answer; the answers of a pair, or a labelled one; messages.

Between the readers (`data/files.py`) and what is made of rows (`data/prompts.py`, `data/preference_pairs.py`,
`data/labelled_answers.py`, `data/conversations.py`).
GSM8K's own layout, whose answer is a worked solution that ends in "#### 1,080", is read as it is published.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, get_args

from megatron_r1.config.data import (
    NEED_REFERENCE,
    ConversationsConfig,
    FileConfig,
    LabelsConfig,
    PairsConfig,
    PromptsConfig,
)
from megatron_r1.config.errors import UserError
from megatron_r1.config.languages import LANGUAGES, language_code
from megatron_r1.types import Message, Role

GSM8K_MARK = "####"


class Record(NamedTuple):
    """What a row says; `metadata` holds every other column."""

    question: str
    answer: str | None
    metadata: dict[str, Any]
    language: str | None  # code of the target language, where a column gives it


class Preference(NamedTuple):
    """What a row of a preference file says."""

    prompt: str
    chosen: str
    rejected: str


class Label(NamedTuple):
    """What a row of a file of labelled answers says."""

    prompt: str
    response: str
    good: bool


def read_preference(row: Mapping[str, Any], config: PairsConfig, where: str) -> Preference:
    """The prompt and the two answers of a row.

    Raises:
        UserError: a missing column, a value that is no text or empty, or twice the same answer.
    """
    check_columns(row, config, where)
    for key in config.columns.values():
        if not isinstance(row[key], str) or not row[key].strip():
            raise UserError(
                f"{where}: column {key!r} holds {row[key]!r}; prompt and answers of a pair are texts, not empty"
            )
    pair = Preference(*(row[key] for key in config.columns.values()))
    if pair.chosen == pair.rejected:
        raise UserError(
            f"{where}: columns {config.chosen_key!r} and {config.rejected_key!r} hold the same answer, which says "
            "nothing about what is preferred; leave this row out"
        )
    return pair


def read_label(row: Mapping[str, Any], config: LabelsConfig, where: str) -> Label:
    """The prompt, the answer and the label of a row.

    Raises:
        UserError: a missing column, a prompt or answer that is no text or empty, a label that is none of 0, 1, false,
            true.
    """
    check_columns(row, config, where)
    for key in (config.prompt_key, config.response_key):
        if not isinstance(row[key], str) or not row[key].strip():
            raise UserError(f"{where}: column {key!r} holds {row[key]!r}; prompt and answer are texts, not empty")
    label = row[config.label_key]
    if not isinstance(label, int | float) or label not in (0, 1):
        raise UserError(
            f"{where}: column {config.label_key!r} holds {label!r}; a label is 1 or true for a good answer, 0 or false "
            "for a bad one"
        )
    return Label(row[config.prompt_key], row[config.response_key], bool(label))


def check_row(row: Mapping[str, Any], config: FileConfig, where: str) -> None:
    """Raise UserError when the row is not what the configuration promises."""
    if isinstance(config, PairsConfig):
        read_preference(row, config, where)
    elif isinstance(config, LabelsConfig):
        read_label(row, config, where)
    elif isinstance(config, ConversationsConfig):
        read_messages(row, config, where)
    else:
        read_record(row, config, where)


def read_messages(row: Mapping[str, Any], config: ConversationsConfig, where: str) -> list[Message]:
    """The messages of a row: a system message or none, then user and assistant in turn, the assistant last.

    Raises:
        UserError: a missing column, another role or order, a text that is blank or none, a tool call, a thought given
        twice.
    """
    check_columns(row, config, where)
    given = row.get(config.messages_key)
    if given is None:
        if not row.keys() >= set(config.columns.values()):
            raise UserError(f"{where}: column {config.messages_key!r} is empty; leave this row out")
        response = {"role": "assistant", "content": row[config.response_key]}
        thought = {config.reasoning_key: row.get(config.reasoning_key)}
        given = [{"role": "user", "content": row[config.prompt_key]}, {**response, **thought}]
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: column {config.messages_key!r} holds {_short(given)}; it must be a list of messages")
    messages = [_message(item, config, f"{where}: message {number}") for number, item in enumerate(given, 1)]
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(
            f"{where}: the roles are {', '.join(roles)}; allowed is a system message first, or none, then user and "
            "assistant in turn, the assistant last"
        )
    return messages


def _message(item: Any, config: ConversationsConfig, where: str) -> Message:
    """One {role, content}; keys that nothing is known about are left out, calls of tools are refused."""
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        raise UserError(f"{where} is {_short(item)}; a message is an object with `role` and `content`")
    role, content, thought = item["role"], item["content"], item.get(config.reasoning_key)
    if role not in get_args(Role):
        raise UserError(f"{where} has the role {role!r}; allowed are {', '.join(get_args(Role))}")
    if item.get("tool_calls"):
        raise UserError(f"{where} calls a tool, which no chat format here can write; leave this row out")
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{where} ({role}) has the content {_short(content)}; it must be a text, not blank")
    if thought is None or thought == "":
        return Message(role, content)
    if not isinstance(thought, str) or role != "assistant":
        raise UserError(f"{where} ({role}): {config.reasoning_key!r} is a text, and only in messages of the assistant")
    if "</think>" in content:
        raise UserError(
            f"{where} gives its thought twice: as {config.reasoning_key!r} and in <think> tags; leave one of them out"
        )
    return Message(role, content, thought)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_record(row: Mapping[str, Any], config: PromptsConfig, where: str) -> Record:
    """The question and answer of a row.

    Args:
        row: column -> value.
        config: names the columns.
        where: "file:line", for messages.

    Raises:
        UserError: a missing column, an empty question, no answer where the verifier needs one, an unknown language.
    """
    check_columns(row, config, where)
    question = row[config.question_key]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: column {config.question_key!r} holds {question!r}; a question is a text, not empty")
    answer = clean_answer(row[config.answer_key], f"{where}: column {config.answer_key!r}")
    if answer is None and config.verifier in NEED_REFERENCE:
        named = "" if config.verifier is None else f', which the verifier "{config.verifier}" compares with'
        raise UserError(
            f"{where}: column {config.answer_key!r} is empty; every question needs its reference answer{named}, unless "
            '`verifier` names one that knows the answer by itself, or is "none"'
        )
    used = config.columns.values()
    metadata = {key: value for key, value in row.items() if key not in used}
    return Record(question, answer, metadata, _language(row, config, where))


def _language(row: Mapping[str, Any], config: PromptsConfig, where: str) -> str | None:
    """The code in the language column; None without such a column, or for an empty cell."""
    value = None if config.language_key is None else row[config.language_key]
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == "":
        return None
    code = language_code(value) if isinstance(value, str) else None
    if code is None:
        raise UserError(
            f"{where}: column {config.language_key!r} holds {value!r}; allowed are the codes "
            f"{', '.join(sorted(LANGUAGES))}, also with a region (zh-CN), or nothing"
        )
    return code


def check_columns(columns: Iterable[str], config: FileConfig, where: str) -> None:
    """Check that the columns which the configuration names are there.

    Raises:
        UserError: listing the columns that are.
    """
    present = list(columns)
    if isinstance(config, ConversationsConfig) and not set(config.columns.values()) <= set(present):
        if config.messages_key in present:
            return
        raise UserError(
            f"{where}: neither a column {config.messages_key!r} nor {config.prompt_key!r} and {config.response_key!r}; "
            f"it has {', '.join(map(repr, present)) or 'none'}. Set messages_key, or prompt_key and response_key"
        )
    for setting, key in config.columns.items():
        if key not in present:
            raise UserError(
                f"{where}: no column {key!r}; it has {', '.join(map(repr, present)) or 'none'}. "
                f"Set {setting} to the right one"
            )


def clean_answer(value: Any, where: str) -> str | None:
    """The reference answer as text; None for null, NaN and blank.

    "...\\n#### $1,080" gives "1080" (GSM8K); a whole float gives its integer; any other text is
    only stripped.

    Raises:
        UserError: a list or a table.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise UserError(f"{where} holds a {type(value).__name__}; an answer is a text or a number")
    text = str(value)
    if GSM8K_MARK in text:
        text = text.rpartition(GSM8K_MARK)[2].replace(",", "").replace("$", "")
    return text.strip() or None
