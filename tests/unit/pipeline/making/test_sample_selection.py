"""A chunk of samples, every one with a fate of its own: which become rows, and under which reason the others count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.data import ConversationsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.config.stages import SampleStage
from megatron_r1.data.chat import R1Format
from megatron_r1.data.records import read_messages
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.observe.rollouts import RolloutWriter, read_rollouts
from megatron_r1.pipeline.making.card_parts import totals
from megatron_r1.pipeline.making.chunks import Chunk, ChunkFiles, Outcome
from megatron_r1.pipeline.making.hooks import check_hooks
from megatron_r1.pipeline.making.sample_card import REASONS, sample_card, shares
from megatron_r1.pipeline.making.sample_selection import Selection, measured
from megatron_r1.rewards.mixer import Scorer
from megatron_r1.rewards.workers import VerifierPool
from megatron_r1.types import Completion, FinishReason, Group, Prompt

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char", characters="这是一个问题"))  # and no accents


def stage(**changes: Any) -> SampleStage:
    prompts = {"source": "generator", "task": "chain_sum", "verifier": changes.pop("verifier", None)}
    return SampleStage(**{"name": "cold", "kind": "sample", "init_from": "base", "prompts": [prompts], **changes})


def said(thought: str, answer: str) -> str:
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


def prompt(name: str, question: str, answer: str | None, verifier: str = "integer", domain: str = "maths") -> Prompt:
    return Prompt(
        id=name, question=question, text=question, token_ids=[5], answer=answer, verifier=verifier, domain=domain
    )


def chunk(
    folder: Path, table: SampleStage, asked: list[tuple[Prompt, list[str | tuple[str, FinishReason]]]], number: int = 0
) -> Chunk:
    """Samples as the stage itself would find them: scored, written and read again."""
    groups = []
    for each, texts in asked:
        completions = []
        for item in texts:
            text, finish = item if isinstance(item, tuple) else (item, "stop")
            ids = TOKENIZER.encode(text)
            completions.append(
                Completion(token_ids=ids, log_probs=[], finish_reason=finish, weight_versions=(0, 0), text=text)
            )
        groups.append(Group(prompt=each, completions=completions))
    with VerifierPool(1) as pool:
        Scorer(measured(table), pool).score_groups(groups)
    rows = iter(read_rollouts(RolloutWriter(folder).write(number, groups)))
    return Chunk(number, [p for p, _ in asked], 1, [[next(rows) for _ in texts] for _, texts in asked])


ASKED: list[tuple[Prompt, list[str | tuple[str, FinishReason]]]] = [
    (
        prompt("sums:0", "5-6+9=?", "8"),
        [
            said("that is -1 and then 8", "8"),
            said("That is -1  and then 8", "8"),  # duplicate
            said("first -1, then 8, done", "8"),  # over the cap, or kept
            said("hm", "9"),
            (said("hm", "8"), "length"),
            "hm</think><answer>8</answer>",
            said("这是一个问题 that", "8"),
            said("x" * 2001, "8"),
            said("```8```", "8"),
            said("we add the one to all of the others " * 6, "8"),
            said("", "8"),
        ],
    ),
    (prompt("sums:1", "5 - 6 + 9 = ?", "8", domain="other"), [said("that is -1 and then 8", "8"), said("a", "7")]),
    (prompt("free:0", "describe a cat", None, verifier="none", domain="other"), [said("a cat it is", "soft, small")]),
]


def test_every_sample_counts_once_under_its_reason(tmp_path: Path) -> None:
    table = stage(prefer="short")
    outcome = Selection(table, TOKENIZER, seed=1)(chunk(tmp_path, table, ASKED), [])
    reasons = ("wrong", "truncated", "format", "language", "paragraph", "code block", "repetition", "no thought")
    assert outcome.summary["domains"]["maths"] == {
        "prompts": 1,
        "prompts_kept": 1,
        "samples": 11,
        "rows": 1,
        "dropped": {**dict.fromkeys(reasons, 1), "duplicate": 1, "over the cap": 1},
    }
    # The same answer to the same question, written otherwise, in another prompt: a duplicate across prompts.
    assert outcome.summary["domains"]["other"]["dropped"] == {"wrong": 1, "duplicate": 1}
    assert outcome.summary["sources"]["free"] == {
        "prompts": 1, "prompts_kept": 1, "samples": 1, "rows": 1, "dropped": {}
    }  # fmt: skip
    assert outcome.summary["languages"] == {"en": 2} and outcome.summary["held_out"] == 1
    total = totals([outcome.summary], REASONS)
    assert total.samples == 14 == total.rows + sum(total.dropped.values())
    assert shares([outcome.summary])["sample/accepted"] == 2 / 14
    assert shares([outcome.summary])["sample/prompts_kept"] == 2 / 3


def test_rows_are_conversations_that_fine_tuning_writes_in_the_same_words(tmp_path: Path) -> None:
    table = stage(prefer="short")
    outcome = Selection(table, TOKENIZER, seed=1)(chunk(tmp_path, table, ASKED), [])
    first = outcome.rows[0]
    assert first == {
        "messages": [
            {"role": "user", "content": "5-6+9=?"},
            {"role": "assistant", "content": "8", "reasoning_content": "that is -1 and then 8"},
        ],
        "domain": "maths",
        "prompt_id": "sums:0",
        "source": "sums",
        "sample": 0,
        "tokens": len(TOKENIZER.encode(said("that is -1 and then 8", "8"))),
        "language": "en",
        "rewritten": False,
    }
    messages = read_messages(first, ConversationsConfig(path=Path("x")), "here")
    text = R1Format(TOKENIZER, "plain").render(messages, answering=False)
    assert "<think>that is -1 and then 8</think><answer>8</answer>" in text


def test_earlier_chunks_are_known_after_a_restart_too(tmp_path: Path) -> None:
    table = stage(keep=9)
    work = Selection(table, TOKENIZER, seed=1)
    first = work(chunk(tmp_path, table, ASKED), [])
    again = chunk(tmp_path, table, ASKED, number=1)
    assert work(again, [first.summary]).rows == []
    restarted = Selection(table, TOKENIZER, seed=1)(again, [first.summary])
    assert restarted.rows == [] and restarted.summary["domains"]["maths"]["dropped"]["duplicate"] == 3


JUDGE = """
asked = []
def judge(question, reference, answer):
    asked.append(answer)
    return {"yes": True, "no": False}.get(answer)
"""


def test_a_judge_is_asked_only_about_what_would_be_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(JUDGE)
    table = stage(verifier="judge", judge={"call": f"{tmp_path / 'mine.py'}:judge"}, keep=9)
    texts: list[Any] = [
        said("so", "yes"),
        said("so", "no"),
        said("so", "?"),
        said("", "yes"),
        (said("b", "yes"), "length"),
    ]
    asked: list[Any] = [(prompt("q:0", "is it?", "yes", verifier="judge"), texts)]
    work = Selection(table, TOKENIZER, seed=1)
    outcome = work(chunk(tmp_path, table, asked), [])
    assert [row["messages"][1]["content"] for row in outcome.rows] == ["yes"]
    assert outcome.summary["domains"]["maths"]["dropped"] == {
        "wrong": 1, "unknown verdict": 1, "truncated": 1, "no thought": 1
    }  # fmt: skip
    assert work.judge is not None and work.judge.function is not None
    assert work.judge.function.__globals__["asked"] == ["yes", "no", "?"]
    nothing: list[Any] = [(prompt("q:1", "is it?", None, verifier="judge"), [said("so", "yes")])]
    with pytest.raises(UserError, match="prompt q:1 has no reference answer"):
        work(chunk(tmp_path, table, nothing), [])


REWRITE_ANSWER = """
def rewrite(question, thought, summary, language):
    return {"same": ("New.", "yes"), "lost": ("New.", "no"), "kept": ("New.", "yes!"), "odd": ("New.", "?")}[thought]
"""


def test_a_judge_is_asked_once_more_about_rewritten_answers(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(JUDGE.replace('"yes": True', '"yes": True, "yes!": True') + REWRITE_ANSWER)
    mine = f"{tmp_path / 'mine.py'}:"
    table = stage(verifier="judge", judge={"call": f"{mine}judge"}, rewrite={"call": f"{mine}rewrite"}, keep=9)
    texts: list[Any] = [said(thought, "yes") for thought in ("same", "lost", "kept", "odd")]
    asked: list[Any] = [(prompt("q:0", "is it?", "yes", verifier="judge"), texts)]
    work = Selection(table, TOKENIZER, seed=1)
    outcome = work(chunk(tmp_path, table, asked), [])
    assert [row["messages"][1]["content"] for row in outcome.rows] == ["yes", "yes!"]
    assert outcome.summary["domains"]["maths"]["dropped"] == {"rewrite": 2}
    assert work.judge is not None and work.judge.function is not None
    # Equal claims are asked once; of the rewritten ones those whose summary has changed.
    assert work.judge.function.__globals__["asked"] == ["yes", "no", "yes!", "?"]


def test_a_blank_thought_may_stay_blank_and_half_a_character_is_written(tmp_path: Path) -> None:
    source = "def rewrite(question, thought, summary, language):\n"
    source += (
        "    return {'8': ('', '8'), '+8': (' ', '8'), '8.0': ('I \\ud800 add.', '8'), '08': ('So.', '')}[summary]\n"
    )
    (tmp_path / "mine.py").write_text(source)
    table = stage(rewrite={"call": f"{tmp_path / 'mine.py'}:rewrite"}, keep=9, filter={"thought": 0})
    texts: list[Any] = [said("", "8"), said("hm", "+8"), said("hm", "8.0"), said("hm", "08")]
    asked: list[Any] = [(prompt("q:0", "how many?", "8"), texts)]
    outcome = Selection(table, TOKENIZER, seed=1)(chunk(tmp_path, table, asked), [])
    assert [row["messages"][1]["reasoning_content"] for row in outcome.rows] == ["", "I ? add."]
    assert outcome.summary["domains"]["maths"]["dropped"] == {"rewrite": 2}


REWRITE = """
def rewrite(question, thought, summary, language):
    cases = {
        "drop": None, "lose": ("I add.", "9"), "box": ("I add slowly.", "It is \\\\boxed{8}."),
        "code": ("```", "8"), "mixed": ("这是一个问题", "8"), "tags": ("<think>", "8"),
        "accent": ("caf\\u00e9 then", "8"),
    }
    return cases[thought]
"""


def test_rewritten_answers_pass_the_rules_again(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWRITE)
    table = stage(rewrite={"call": f"{tmp_path / 'mine.py'}:rewrite"}, keep=9)
    cases = ("drop", "lose", "box", "code", "mixed", "tags", "accent")
    asked: list[Any] = [(prompt("q:0", "how many?", "8"), [said(case, "8") for case in cases])]
    outcome = Selection(table, TOKENIZER, seed=1)(chunk(tmp_path, table, asked), [])
    assert outcome.summary["domains"]["maths"]["dropped"] == {"rewrite": 6}
    (row,) = outcome.rows
    assert row["messages"][1] == {
        "role": "assistant", "content": "It is \\boxed{8}.", "reasoning_content": "I add slowly."
    }  # fmt: skip
    written = "<think>I add slowly.</think><answer>It is \\boxed{8}.</answer>"
    assert row["rewritten"] and row["tokens"] == len(TOKENIZER.encode(written)) + 1


def test_the_card_adds_up(tmp_path: Path) -> None:
    table = stage(prefer="short")
    work = Selection(table, TOKENIZER, seed=1)
    first = work(chunk(tmp_path, table, ASKED), [])
    second = work(chunk(tmp_path, table, ASKED, number=1), [first.summary])
    files = sample_card(table, "run", "base/checkpoints/step-3", [first.summary, second.summary])
    card = json.loads(files["card.json"])
    assert (card["prompts"], card["samples"], card["rows"], card["held_out_prompts"]) == (6, 28, 2, 2)
    assert card["dropped"]["wrong"] == 4 and next(iter(card["dropped"])) == "wrong"
    assert card["samples"] == card["rows"] + sum(card["dropped"].values())
    assert card["domains"]["maths"]["samples"] == 22 and card["sources"]["free"]["rows"] == 1
    assert card["tokens"]["100%"] == len(TOKENIZER.encode(said("that is -1 and then 8", "8")))
    assert card["weights"] == "base/checkpoints/step-3" and card["settings"]["n"] == 4
    assert "| maths | 2 | 1 | 22 | 1 | 0.04545 | 0.09091 |" in files["README.md"]
    assert "| wrong | 4 | 0.1429 |" in files["README.md"]


def test_chunk_files(tmp_path: Path) -> None:
    files = ChunkFiles(tmp_path)
    assert files.summaries() == []
    files.write(0, Outcome([{"a": "1\u2028é"}, {"a": 2}], {"chunk": 0}))
    files.write(1, Outcome([], {"chunk": 1}))
    files.write(2, Outcome([{"a": "\ud800"}], {"chunk": 2}))  # of a user's question: no UTF-8
    (tmp_path / "chunks" / ".000003.jsonl.tmp").write_text('{"chunk": 3}')  # cut short by a kill
    assert [summary["chunk"] for summary in files.summaries()] == [0, 1, 2]
    files.join(tmp_path / "data.jsonl")
    assert (tmp_path / "data.jsonl").read_text() == '{"a": "1\u2028é"}\n{"a": 2}\n{"a": "?"}\n'


def test_hooks_are_checked_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'stage\.cold\.prompts\.0\.verifier = "judge" without a judge'):
        check_hooks(stage(verifier="judge"))
    with pytest.raises(UserError, match=r"stage\.cold\.judge has no effect"):
        check_hooks(stage(judge={"call": "os:getcwd"}))
    with pytest.raises(UserError, match=r"stage\.cold\.rewrite\.call = .*there is no file"):
        check_hooks(stage(rewrite={"call": f"{tmp_path}/none.py:f"}))
    check_hooks(stage(verifier="judge", judge={"call": "os:getcwd"}))
