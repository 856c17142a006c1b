"""One row of a user's file -> question, reference answer and the rest.

Between the readers (`data/files.py`) and the prompts (`data/prompts.py`). GSM8K's own layout,
whose answer is a worked solution that ends in "#### 1,080", is read as it is published.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.errors import UserError

GSM8K_MARK = "####"


class Record(NamedTuple):
    """What a row says; `metadata` holds every other column."""

    question: str
    answer: str | None
    metadata: dict[str, Any]


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


def check_columns(columns: Iterable[str], config: PromptsConfig, where: str) -> None:
    """Check that the columns of question and answer are there.

    Raises:
        UserError: listing the columns that are.
    """
    present = list(columns)
    for key, setting in ((config.question_key, "question_key"), (config.answer_key, "answer_key")):
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
