"""A card: the hub reads its header, its numbers are the ones given, and it names no place of this machine."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import DatasetCard

from megatron_r1.config.stages import SampleStage
from megatron_r1.data.dataset_card import Card, CardTable, card_files, quantiles, shown_settings

CARD = Card(
    name="run/cold",
    what="Conversations.",
    rows=1234,
    columns={"messages": "a | b"},
    tables=[CardTable(title="Dropped", columns=["reason", "share"], rows=[["wrong", 0.25], ["kept", 1.0]], note="Hm.")],
    settings={"n": 4, "filter": {"language": 0.95, "off": None}, "prompts": [{"size": 3}], "stop": ["a"]},
    facts={"dropped": {"wrong": 3}},
    languages=["zh", "en"],
)


def test_the_card(tmp_path: Path) -> None:
    files = card_files(CARD)
    assert sorted(files) == ["README.md", "card.json"]
    assert files == card_files(CARD)
    (tmp_path / "README.md").write_text(files["README.md"])
    read = DatasetCard.load(tmp_path / "README.md")
    assert read.data.language == ["en", "zh"] and read.data.size_categories == ["1K<n<10K"]
    assert read.data.to_dict()["configs"] == [{"config_name": "default", "data_files": "data.jsonl"}]
    lines = read.text.splitlines()
    for line in ("# run/cold", "Rows: 1234", "| `messages` | a \\| b |", "Hm.", "| wrong | 0.25 |", "| kept | 1 |"):
        assert line in lines
    settings = lines[lines.index("## Settings") + 4 :]
    assert settings == ["| `n` | 4 |", "| `filter.language` | 0.95 |", "| `prompts.0.size` | 3 |", '| `stop` | ["a"] |']
    facts = json.loads(files["card.json"])
    assert (facts["name"], facts["rows"], facts["dropped"]) == ("run/cold", 1234, {"wrong": 3})
    assert facts["settings"] == CARD.settings


def test_quantiles_are_lengths_that_occur() -> None:
    assert quantiles([]) == {}
    assert quantiles([7]) == {"mean": 7, **dict.fromkeys(("0%", "5%", "25%", "50%", "75%", "95%", "100%"), 7.0)}
    assert quantiles(range(101)) == {
        "mean": 50, "0%": 0, "5%": 5, "25%": 25, "50%": 50, "75%": 75, "95%": 95, "100%": 100
    }  # fmt: skip
    assert quantiles([4, 1, 2])["mean"] == 2.3 and quantiles([4, 1, 2])["50%"] == 2


def test_settings_without_places_and_keys() -> None:
    stage = SampleStage.model_validate(
        {
            "name": "cold",
            "kind": "sample",
            "from": "/home/me/weights",
            "prompts": [{"source": "jsonl", "path": Path("/home/me/q.jsonl"), "verifier": "judge"}],
            "judge": {"server": {"url": "http://10.0.0.7/v1", "model": "judge-1", "api_key": "NAME"}},
            "rewrite": {"call": "/home/me/mine.py:rewrite"},
        }
    )
    shown = shown_settings(stage)
    text = json.dumps(shown)
    assert "/home" not in text and "10.0.0.7" not in text and "NAME" not in text
    assert (shown["from"], shown["prompts"][0]["path"], shown["rewrite"]["call"]) == (
        "weights",
        "q.jsonl",
        "mine.py:rewrite",
    )
    assert shown["judge"]["server"]["model"] == "judge-1" and shown["filter"]["language"] == 0.95
