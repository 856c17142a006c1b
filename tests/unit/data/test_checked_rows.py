"""Bad rows of prompts, pairs and labels: reported with their place, counted, left out, and one more than allowed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_r1.config.data import FileConfig, LabelsConfig, PairsConfig, PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.data.checked_rows import CheckedRows
from megatron_r1.data.labelled_answers import LabelledAnswers
from megatron_r1.data.preference_pairs import PreferencePairs
from megatron_r1.data.prompts import PromptSource, open_prompts
from megatron_r1.data.reward_rows import RewardBatches, count_rows
from megatron_r1.data.tokenizers import build_tokenizer

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char"))
TABLES: dict[type[FileConfig], tuple[dict[str, Any], dict[str, Any]]] = {
    PromptsConfig: ({"question": "1+1=?", "answer": "2"}, {"question": "1+1=?", "answer": None}),
    PairsConfig: ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"}),
    LabelsConfig: ({"prompt": "p", "response": "a", "label": 1}, {"prompt": "p", "response": "a", "label": 2}),
}


def write(folder: Path, source: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{source}"
    if source == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
@pytest.mark.parametrize("table", list(TABLES))
def test_bad_rows_are_left_out_up_to_a_limit(
    table: Any, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = TABLES[table]
    path = write(tmp_path, source, [good, bad, good, bad, good])
    with caplog.at_level(logging.WARNING):
        rows = CheckedRows(table(source=source, path=path, max_bad_rows=2), "row")
    assert (len(rows), rows.bad.count) == (3, 2)
    assert all(rows[index] == good for index in range(3))
    place = {"jsonl": f"{path}:{{}}", "parquet": f"{path}, row {{}}"}[source]
    first = 1 if source == "jsonl" else 0
    assert rows.where(1) == place.format(first + 2)
    assert f"bad row 2 of at most 2: {place.format(first + 3)}" in caplog.text
    for allowed in (0, 1):
        with pytest.raises(UserError, match=f"{first + 1 + 2 * allowed}: column"):
            CheckedRows(table(source=source, path=path, max_bad_rows=allowed), "row")
    assert len(CheckedRows(table(source=source, path=path, size=1), "row")) == 1, "rows that nobody needs are not read"


def test_what_is_made_of_rows_leaves_them_out(tmp_path: Path) -> None:
    for table, (good, bad) in TABLES.items():
        config: Any = table(source="jsonl", path=write(tmp_path, "jsonl", [bad, good, good]), max_bad_rows=1)
        if isinstance(config, PromptsConfig):
            prompts = open_prompts(config, TOKENIZER)
            assert isinstance(prompts, PromptSource)
            assert [prompts[index].question for index in range(len(prompts))] == ["1+1=?"] * 2
            continue
        rows: Any = PreferencePairs(config, TOKENIZER) if table is PairsConfig else LabelledAnswers(config, TOKENIZER)
        batches: Any = RewardBatches(rows, shuffle=False, seed=0, exclude=frozenset(), max_tokens=99)
        assert (len(rows), count_rows(config), batches.bad) == (2, 2, 1)
        assert [item.question for item in batches.take(2)] == ["p", "p"]


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
@pytest.mark.parametrize(("verifier", "needed"), [("judge", True), ("exact", True), ("none", False), ("safe", False)])
def test_a_reference_is_there_when_the_file_is_opened(verifier: str, needed: bool, source: str, tmp_path: Path) -> None:
    path = write(tmp_path, source, [{"question": "a", "answer": "1"}, {"question": "b", "answer": None}])
    config = PromptsConfig.model_validate({"source": source, "path": path, "verifier": verifier})
    if not needed:
        assert len(CheckedRows(config, "prompt")) == 2
        return
    place = "rows.jsonl:2" if source == "jsonl" else "rows.parquet, row 1"
    with pytest.raises(UserError, match=f'{place}: column .answer. is empty; .*verifier "{verifier}" compares'):
        open_prompts(config, TOKENIZER)


def test_streams_and_tasks_have_no_bad_rows() -> None:
    with pytest.raises(ValidationError, match="max_bad_rows = 1 without effect"):
        PromptsConfig(source="generator", task="chain_sum", max_bad_rows=1)
    with pytest.raises(ValidationError, match="max_bad_rows = 1 without effect"):
        PromptsConfig(source="datasets", path=Path("x"), options={"streaming": True}, max_bad_rows=1)
