"""Labelled answers: tokens, labels as files write them, what is left out, resuming, refusals with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.data import LabelsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.data.heldout import heldout_ids
from megatron_r1.data.labelled_answers import LabelledAnswers
from megatron_r1.data.reward_rows import RewardBatches, sequences
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.types import LabelledAnswer

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char"))
ROWS: list[dict[str, Any]] = [{"prompt": f"{i}+1=?", "response": "x" * (1 + i), "label": i % 2} for i in range(6)]


def write(folder: Path, rows: list[Any] = ROWS) -> Path:
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(path: Path, **keys: Any) -> LabelledAnswers:
    return LabelledAnswers(LabelsConfig(**{"source": "jsonl", "path": path, **keys}), TOKENIZER)


def batches(path: Path, **keys: Any) -> RewardBatches[LabelledAnswer]:
    settings: dict[str, Any] = {"shuffle": False, "seed": 1, "exclude": frozenset(), "max_tokens": 99, **keys}
    return RewardBatches(source(path), **settings)


def test_an_answer_is_template_answer_and_end(tmp_path: Path) -> None:
    answer = source(write(tmp_path), template="Q: {prompt} A:")[3]
    assert (answer.id, answer.question, answer.good) == ("labels.jsonl:3", "3+1=?", True)
    prompt = TOKENIZER.encode("Q: 3+1=? A:")
    assert answer.sample.token_ids == [*prompt, *TOKENIZER.encode("xxxx"), TOKENIZER.eos_id]
    assert answer.sample.prompt_length == len(prompt)
    assert sequences([answer, answer]) == [answer.sample, answer.sample]


def test_labels_are_numbers_or_truth_values_under_any_column(tmp_path: Path) -> None:
    rows = [{"q": "1", "a": "2", "safe": label} for label in (1, 0, True, False, 1.0, 0.0)]
    given = source(write(tmp_path, rows), prompt_key="q", response_key="a", label_key="safe")
    assert [given[i].good for i in range(6)] == [True, False] * 3


def test_parquet_gives_the_same(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "labels.parquet")
    table, lines = source(tmp_path / "labels.parquet", source="parquet"), source(write(tmp_path))
    assert [table[i].samples for i in range(6)] == [lines[i].samples for i in range(6)]
    assert [table[i].good for i in range(6)] == [lines[i].good for i in range(6)]


def test_what_is_left_out_is_counted_and_resuming_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path)
    # Prompts have 5 tokens, so that answers of 4 and more x are beyond 9 tokens with the end.
    keys: dict[str, Any] = {"max_tokens": 9, "exclude": heldout_ids(["1+1=?"])}
    rows = batches(path, **keys)
    assert [answer.question for answer in rows.take(3)] == ["0+1=?", "2+1=?", "0+1=?"]
    assert (rows.excluded, rows.too_long) == (1, 3)
    again = batches(path, **keys)
    again.restore(json.loads(json.dumps(rows.state())))
    assert again.take(5) == rows.take(5)
    assert again.state() == rows.state()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1", "response": "2"}, r"labels\.jsonl:2: no column 'label'.*Set label_key to the right one"),
        (
            {**ROWS[0], "label": "safe"},
            r"labels\.jsonl:2: column 'label' holds 'safe'; a label is 1 or true for a good",
        ),
        ({**ROWS[0], "label": 2}, r"labels\.jsonl:2: column 'label' holds 2"),
        ({**ROWS[0], "label": None}, r"labels\.jsonl:2: column 'label' holds None"),
        ({**ROWS[0], "response": " "}, r"labels\.jsonl:2: column 'response' holds ' '; prompt and answer are texts"),
        ([1], r"labels\.jsonl:2: a JSON list"),
    ],
)
def test_bad_rows_are_refused_at_the_start(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(write(tmp_path, [ROWS[0], row]))


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels\.path: .*none\.jsonl' does not exist"):
        source(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"labels\.path: .*holds no rows; one labelled answer is needed at least"):
        source(write(tmp_path, []))
    with pytest.raises(UserError, match=r"labels: no labelled answer of labels\.jsonl keeps within 5 tokens"):
        batches(write(tmp_path), max_tokens=5).take(1)
