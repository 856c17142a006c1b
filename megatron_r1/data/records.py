"""One row of a user's file -> question, reference answer and the rest; or a prompt and the two answers of a pair.

Between the readers (`data/files.py`) and the prompts or pairs (`data/prompts.py`, `data/preference_pairs.py`).
GSM8K's own layout, whose answer is a worked solution that ends in "#### 1,080", is read as it is published.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megatron_r1.config.data import PairsConfig, PromptsConfig
from megatron_r1.config.errors import UserError

GSM8K_MARK = "####"


class Record(NamedTuple):
    """What a row says; `metadata` holds every other column."""

    question: str
    answer: str | None
    metadata: dict[str, Any]


class Preference(NamedTuple):
    """What a row of a preference file says."""

    prompt: str
    chosen: str
    rejected: str


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


def check_row(row: Mapping[str, Any], config: PromptsConfig | PairsConfig, where: str) -> None:
    """Raise UserError when the row is not what the configuration promises."""
    if isinstance(config, PairsConfig):
        read_preference(row, config, where)
    else:
        read_record(row, config, where)


def read_record(row: Mapping[str, Any], config: PromptsConfig, where: str) -> Record:
    """The question and answer of a row.

    Args:
        row: column -> value.
        config: names the two columns.
        where: "file:line", for messages.

    Raises:
        UserError: a missing column, an empty question, or no answer where the verifier needs one.
    """
    check_columns(row, config, where)
    question = row[config.question_key]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: column {config.question_key!r} holds {question!r}; a question is a text, not empty")
    answer = clean_answer(row[config.answer_key], f"{where}: column {config.answer_key!r}")
    if answer is None and config.verifier is None:
        raise UserError(
            f"{where}: column {config.answer_key!r} is empty; every question needs its reference "
            "answer, unless `verifier` names one that knows the answer by itself"
        )
    used = (config.question_key, config.answer_key)
    return Record(question, answer, {key: value for key, value in row.items() if key not in used})


def check_columns(columns: Iterable[str], config: PromptsConfig | PairsConfig, where: str) -> None:
    """Check that the columns which the configuration names are there.

    Raises:
        UserError: listing the columns that are.
    """
    present = list(columns)
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
