"""The `preferences` stage: pairs and labels by hand, votes in both orders, the balance of lengths, a kill between."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.load import load
from megatron_r1.config.stages import PreferencesStage
from megatron_r1.data.heldout import heldout_ids
from megatron_r1.data.pair_building import balance_lengths
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.judges.preference import swapped
from megatron_r1.observe.metrics import read_metrics
from megatron_r1.observe.rollouts import RolloutWriter
from megatron_r1.observe.rundir import RunDir, StageState
from megatron_r1.parallel.world import World
from megatron_r1.pipeline.making import chunks
from megatron_r1.pipeline.making.preferences import run_preferences
from megatron_r1.types import Completion, FinishReason, Group, Prompt, Score, Verdict

RECIPE = """
name = "demo"
seed = 5
model.preset = "tiny-moe"
tokenizer.kind = "char"

[[stage]]
kind = "pretrain"
name = "base"
steps = 1
optimizer.lr = 1e-3
corpus = [{ styles = { steps = 1.0 } }]

[[stage]]
kind = "preferences"
name = "prefs"
n = 4
chunk = 2
judge = { call = "judge.py:pair" }
prompts = { source = "jsonl", path = "prompts.jsonl", verifier = "none", shuffle = false, domain = "helpful" }
"""
# The judge likes answers by their last digit, says so in both orders, and stops at a file called "down".
JUDGE = """
from pathlib import Path

def pair(question, a, b):
    if Path(__file__).with_name("down").exists() and question == "q2":
        raise OSError("down")
    return max(-3, min(3, int(a[-1]) - int(b[-1])))

def biased(question, a, b):
    return 1

def safe(question, answer):
    return int(answer[-1]) > 4

def longer(question, a, b):
    return 3 if len(a) > len(b) else -3 if len(b) > len(a) else 0
"""
SAMPLED: dict[str, list[tuple[str, FinishReason]]] = {
    # 7 against 1: clearly; 4 against 3: by 1, which is not above the margin
    "q0": [("<think>x</think><answer>long 7</answer>", "stop"), ("1", "stop"), ("4", "stop"), ("3", "stop")],
    # the second is cut; both the same
    "q1": [("5", "stop"), ("55", "length"), ("<think>a</think>6", "stop"), ("6", "stop")],
    # nothing after the thought; 2 against 9
    "q2": [("<think>8", "stop"), ("1", "stop"), ("22", "stop"), ("<think>z</think> 9", "stop")],
    "q3": [("0", "stop"), ("0 3", "stop"), ("3", "stop"), ("00", "stop")],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    asked = [{"question": question, "answer": None} for question in (*SAMPLED, "held out")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    (tmp_path / "judge.py").write_text(JUDGE, encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.setattr(chunks._Sampler, "sample", _sample)
    yield tmp_path


def _sample(self: Any, number: int, prompts: list[Prompt], progress: Callable[[int, int], None]) -> None:
    """Writes SAMPLED in the place of a model's answers, where there are none."""
    if self.file(number).is_file():
        return
    groups = []
    for prompt in prompts:
        completions = [
            Completion(
                token_ids=[1],
                log_probs=[],
                finish_reason=finish,
                weight_versions=(0, 0),
                text=text,
                score=Score(total=0.0, parts={"format": 0.0}, verdict=Verdict(status="unknown")),
            )
            for text, finish in SAMPLED[prompt.question]
        ]
        groups.append(Group(prompt=prompt, completions=completions))
    RolloutWriter(self._folder.path).write(number, groups)


def run(folder: Path, world: World, *overrides: str, name: str = "run") -> dict[str, Any]:
    config = load(folder / "recipe.toml", overrides)
    directory = RunDir(folder / name)
    stage = config.stage[1]
    assert isinstance(stage, PreferencesStage)
    directory.write_stages([StageState(name=stage.name, kind=stage.kind)])
    context: Any = SimpleNamespace(
        config=config,
        world=world,
        tokenizer=build_tokenizer(config.tokenizer),
        run=directory,
        stop=SimpleNamespace(agreed=lambda: False),
        heldout=heldout_ids(["held out"]),
        attempt=1,
    )
    return run_preferences(stage, context, folder / name / "base" / "checkpoints" / "step-00000001")


def rows(folder: Path, name: str = "run") -> list[dict[str, Any]]:
    text = (folder / name / "prefs" / "data.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_pairs_by_hand(folder: Path, world: World) -> None:
    found = run(folder, world, "stage.prefs.balance_length=false")
    written = rows(folder)
    assert [(row["prompt"], row["chosen"], row["rejected"], row["verdict"]) for row in written] == [
        ("q0", "long 7", "1", 3.0),
        ("q2", "9", "22", 3.0),
        ("q3", "0 3", "0", 3.0),
        ("q3", "3", "00", 3.0),
    ]
    assert written[0] == {
        "prompt": "q0",
        "chosen": "long 7",
        "rejected": "1",
        "verdict": 3.0,
        "votes": 4,
        "chosen_tokens": 6,
        "rejected_tokens": 1,
        "domain": "helpful",
        "prompt_id": "prompts.jsonl:0",
        "samples": [0, 1],
    }
    assert written[1]["samples"] == [3, 2]
    dropped = {"truncated": 1, "empty": 1, "duplicate": 1, "undecided": 1}
    assert found == {
        "preferences/kept": 4 / 8,
        "preferences/truncated": 1 / 8,
        "preferences/unreadable": 0.0,
        "preferences/undecided": 1 / 8,
        "preferences/rows": 4.0,
        "preferences/held_out": 1.0,
        "preferences/verdict": (4 * 3 + 1) / 5,
        "dropped": dropped,
    }
    card = json.loads((folder / "run" / "prefs" / "card.json").read_text())
    assert (card["rows"], card["candidates"], card["dropped"]) == (4, 8, dropped)
    assert card["domains"] == {"helpful": {"prompts": 4, "rows": 4}}
    assert card["weights"] == "base/checkpoints/step-00000001" and card["judge"] == "judge.py:pair"
    assert [line["preferences/rows"] for line in read_metrics(folder / "run" / "prefs" / "metrics.jsonl")] == [1, 3, 0]


def test_lengths_are_balanced_in_the_end(folder: Path, world: World) -> None:
    """Over all chunks: chosen answers are longer by 5, -1, 2, -1; either the 5 or the 2 goes, as the seed has it."""
    lengths = [(6, 1), (1, 2), (3, 1), (1, 2)]
    seen = set()
    for seed in range(5):
        found = run(folder, world, f"seed={seed}", name=f"seed-{seed}")
        kept = [(row["chosen_tokens"], row["rejected_tokens"]) for row in rows(folder, f"seed-{seed}")]
        assert kept == [lengths[i] for i in balance_lengths(lengths, seed)]
        assert found["dropped"]["length balance"] == 1 and found["preferences/rows"] == 3
        card = json.loads((folder / f"seed-{seed}" / "prefs" / "card.json").read_text())
        assert card["tokens"]["before_balance"]["chosen"]["mean"] == 2.8 and card["rows"] == 3
        assert card["tokens"]["after_balance"]["chosen"]["mean"] == round(sum(c for c, _ in kept) / 3, 1)
        seen.add(tuple(kept))
    assert seen == {((1, 2), (3, 1), (1, 2)), ((6, 1), (1, 2), (1, 2))}


def test_whole_responses_are_judged_where_asked(folder: Path, world: World) -> None:
    call = f'stage.prefs.judge.call="{folder / "judge.py"}:longer"'
    run(folder, world, call, 'stage.prefs.sees="response"', "stage.prefs.balance_length=false")
    assert [(row["chosen"], row["rejected"]) for row in rows(folder)] == [
        ("<think>x</think><answer>long 7</answer>", "1"),
        ("<think>a</think>6", "6"),
        ("<think>8", "1"),
        ("<think>z</think> 9", "22"),
        ("0 3", "0"),
        ("00", "3"),
    ]
    assert rows(folder)[3]["chosen_tokens"] == 5, "a tag is one token"


def test_a_judge_that_looks_at_places_decides_nothing(folder: Path, world: World) -> None:
    """Its votes are 1 for whichever answer stands first, so the mean says how often each did."""
    keys = ['stage.prefs.judge.call="judge.py:biased"', "stage.prefs.margin=0", "stage.prefs.balance_length=false"]
    run(folder, world, *(key.replace("judge.py", str(folder / "judge.py")) for key in keys))
    pairs = {f"{row['prompt_id']}#{min(row['samples']) // 2}": row for row in rows(folder)}
    means = {}
    for number, which in ((0, 0), (0, 1), (2, 1), (3, 0), (3, 1)):
        name = f"prompts.jsonl:{number}#{which}"
        means[name] = sum(-1 if swapped(5, name, vote) else 1 for vote in range(4)) / 4
    assert {name: row["verdict"] for name, row in pairs.items()} == {n: abs(m) for n, m in means.items() if m}
    for name, row in pairs.items():
        assert (row["samples"][0] < row["samples"][1]) == (means[name] > 0)


def test_labels_by_hand(folder: Path, world: World) -> None:
    call = f'stage.prefs.judge.call="{folder / "judge.py"}:safe"'
    found = run(folder, world, call, 'stage.prefs.form="labels"', 'stage.prefs.sees="summary"')
    labels = [(row["prompt"], row["response"], row["label"]) for row in rows(folder)]
    assert labels == [
        *(("q0", text, label) for text, label in (("long 7", 1), ("1", 0), ("4", 0), ("3", 0))),
        *(("q1", text, label) for text, label in (("5", 1), ("6", 1))),
        *(("q2", text, label) for text, label in (("1", 0), ("22", 0), ("9", 1))),
        *(("q3", text, label) for text, label in (("0", 0), ("0 3", 0), ("3", 0), ("00", 0))),
    ]
    assert found["dropped"] == {"truncated": 1, "empty": 1, "duplicate": 1}
    assert (found["preferences/rows"], found["preferences/good"]) == (13.0, 4 / 13)


def test_labels_are_of_whole_responses_unless_the_recipe_says_otherwise(folder: Path, world: World) -> None:
    (folder / "judge.py").write_text("def safe(question, answer):\n    return '<think>' in answer\n")
    found = run(folder, world, f'stage.prefs.judge.call="{folder / "judge.py"}:safe"', 'stage.prefs.form="labels"')
    assert found["preferences/good"] == 4 / 15
    assert json.loads((folder / "run" / "prefs" / "card.json").read_text())["sees"] == "response"


@pytest.mark.parametrize("chunk", [1, 3, 9])
@pytest.mark.parametrize("sampled", [True, False])
def test_it_goes_on_with_another_chunk(folder: Path, world: World, chunk: int, sampled: bool) -> None:
    """Killed by its judge in the second chunk of two prompts, which was sampled, or not even that."""
    run(folder, world, name="whole")
    (folder / "down").touch()
    with pytest.raises(UserError, match="OSError: down"):
        run(folder, world)
    (folder / "down").unlink()
    second = folder / "run" / "prefs" / "rollouts" / "step-000001.jsonl.gz"
    if not sampled:
        second.unlink()
    before = second.stat().st_mtime_ns if sampled else None
    found = run(folder, world, f"stage.prefs.chunk={chunk}")
    assert not sampled or second.stat().st_mtime_ns == before, "it was sampled again"
    assert rows(folder) == rows(folder, "whole")
    ours, whole = (json.loads((folder / name / "prefs" / "card.json").read_text()) for name in ("run", "whole"))
    assert ours.pop("settings")["chunk"] == chunk and whole.pop("settings")["chunk"] == 2
    assert ours == whole and found["preferences/held_out"] == 1
    (state,) = RunDir(folder / "run").read_stages()
    assert state.steps == state.steps_done == len(list((folder / "run" / "prefs" / "chunks").iterdir()))


def test_the_log_says_how_much_is_asked(folder: Path, world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run(folder, world)
    assert "stage prefs: asks 5 prompts, 4 answers each, in chunks of 2" in caplog.text
    config = load(folder / "recipe.toml", ()).stage[1]
    assert isinstance(config, PreferencesStage)
    endless = PromptsConfig(source="generator", task="chain_sum")
    plan = chunks._plan(config.model_copy(update={"prompts": [endless]}), 100_000, 0)
    assert plan.startswith("asks 100,000 prompts") and "chain_sum has no `size`: 100,000 prompts" in plan


def test_a_kill_between_chunks_gives_the_same_bytes(folder: Path, world: World) -> None:
    run(folder, world, name="whole")
    (folder / "down").touch()
    with pytest.raises(UserError, match=r"stage\.prefs\.judge\.call: the function raised OSError: down"):
        run(folder, world)
    assert (folder / "run" / "prefs" / "chunks" / "000000.jsonl").is_file()
    assert not (folder / "run" / "prefs" / "data.jsonl").exists()
    (folder / "down").unlink()
    (folder / "run" / "prefs" / ".data.jsonl.tmp").write_text("left by a kill")
    run(folder, world)
    for name in ("data.jsonl", "README.md", "card.json", "chunks/000001.jsonl"):
        assert (folder / "run" / "prefs" / name).read_bytes() == (folder / "whole" / "prefs" / name).read_bytes(), name


def test_nothing_kept_is_an_error_with_a_cure(folder: Path, world: World) -> None:
    with pytest.raises(UserError, match=r"kept none of 8 pairs \(truncated: 1, .*undecided: 5\).*Lower `margin`"):
        run(folder, world, "stage.prefs.margin=3")
