"""What a judge is asked, how its replies are read, and what a function of the user's may return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.judges import JudgeConfig, RewriteConfig
from megatron_r1.judges.correctness import Claim, judge_correctness, read_verdict
from megatron_r1.judges.hook import Kind, fill, open_hook
from megatron_r1.judges.preference import Answered, Pair, compare, label, read_label, read_pair, swapped
from megatron_r1.judges.rewriting import Draft, Rewritten, read_rewritten, rewrite
from tests.unit.judges.server import JudgeServer, Reply

KEY = "stage.cold.judge"


def function(folder: Path, source: str, kind: Kind) -> Any:
    (folder / "mine.py").write_text(source)
    return open_hook(JudgeConfig(call=f"{folder / 'mine.py'}:judge"), kind, KEY, "kept")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"analysis": "same", "correctness": "correct"}', True),
        ('```json\n{"analysis": "one\nline more", "correctness": " Incorrect "}\n```', False),
        ('They differ. {"correctness": "correct"} no, wait: {"correctness": "incorrect"} That is final.', False),
        ('{"a": {"correctness": "correct"}}', None),  # not where it was asked for
        ('{"analysis": "uses {braces} and \\"quotes\\"", "correctness": "correct"}', True),
        ('{x} {"correctness": "correct"}', True),
        ("correct", None),
        ('{"correctness": "partly"}', None),
        ('{"correctness": true}', None),
        ('{"correctness": "correct"', None),
        ("{" * 3000, None),
        ("", None),
    ],
)
def test_verdicts_are_read_tolerantly_and_never_guessed(reply: str, expected: bool | None) -> None:
    assert read_verdict(reply) is expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A is better. [[A>B]]", 1.0),
        ("[[A>>B]]", 3.0),
        ("[[ B>>A ]]", -3.0),
        ("[[B>A]] as I said: [[B>A]]", -1.0),
        ("[[A=B]]", 0.0),
        ("[[A>B]] or rather [[B>A]]", None),
        ("[[A>A]]", None),
        ("A>B", None),
    ],
)
def test_the_five_verdicts(reply: str, expected: float | None) -> None:
    assert read_pair(reply) == expected


def test_labels_and_rewritings_are_read() -> None:
    assert read_label('{"label": "safe"}') is True and read_label('x {"label": "UNSAFE"}') is False
    assert read_label('{"label": "unclear"}') is None
    reply = "Sure:\n<thought>\nI see <b>5</b>.\n</thought>\n\n<summary>\n5\n</summary> Done."
    assert read_rewritten(reply) == Rewritten("I see <b>5</b>.", "5")
    assert read_rewritten("<thought>x</thought>") is None
    assert read_rewritten("<thought>x</thought><summary> </summary>") is None
    assert read_rewritten("<thought> </thought><summary>5</summary>") == Rewritten("", "5")


def test_fields_are_filled_once() -> None:
    assert fill('{question}: {answer} {other} {"a": 1}', {"question": "{answer}", "answer": "8"}) == (
        '{answer}: 8 {other} {"a": 1}'
    )


def test_a_reply_that_cannot_be_read_is_asked_for_again_then_unknown() -> None:
    def answer(request: dict[str, Any], number: int) -> Reply:
        first, last = request["messages"][0]["content"], request["messages"][-1]["content"]
        if "Q-clear" in first:
            return Reply('{"correctness": "incorrect"}')
        if "Q-second" in first and last != first:
            return Reply('{"correctness": "correct"}')
        return Reply("I cannot say.")

    claims = [Claim("Q-clear", "8", "9"), Claim("Q-second", "8", "8.0"), Claim("Q-never", "8", "8?")]
    with JudgeServer(answer) as server:
        hook = open_hook(JudgeConfig(server=server.config()), "correctness", KEY, "kept")
        assert judge_correctness(hook, [*claims, claims[0]]) == ["wrong", "correct", "unknown", "wrong"]
    assert len(server.requests) == 5  # an equal claim is not asked twice
    again = next(request for request in server.requests if len(request["messages"]) == 3)
    assert [message["role"] for message in again["messages"]] == ["user", "assistant", "user"]
    assert again["messages"][1]["content"] == "I cannot say."
    first = next(text for text in server.asked() if "Q-second" in text)
    assert "8.0" in first and '"correctness"' in first and "{reference}" not in first


def test_a_prompt_of_the_users() -> None:
    with JudgeServer(lambda *_: Reply('{"correctness": "correct"}')) as server:
        config = JudgeConfig(server=server.config(), prompt="Is {answer} = {reference}?")
        judge_correctness(open_hook(config, "correctness", KEY, "kept"), [Claim("Q", "8", "{reference}")])
        assert server.asked() == ["Is {reference} = 8?"]
        with pytest.raises(UserError, match=r"judge.prompt has no field \{answer_b\}.*\{answer_a\}"):
            open_hook(JudgeConfig(server=server.config(), prompt="{answer_a}"), "pair", KEY, "kept")
    with pytest.raises(UserError, match="prompt has no effect with `call`"):
        open_hook(JudgeConfig(call="os:getcwd", prompt="{answer}"), "correctness", KEY, "kept")


def lengthy(request: dict[str, Any], number: int) -> Reply:
    """Prefers the longer answer much, whatever the order."""
    text = request["messages"][0]["content"].partition("<|Answer of assistant A|>\n")[2]
    first, _, second = text.partition("\n<|Answer of assistant B|>\n")
    second = second.partition("\n<|End|>")[0]
    return Reply("[[A>>B]]" if len(first) > len(second) else "[[B>>A]]")


def test_pairs_are_turned_back_and_averaged() -> None:
    pairs = [Pair("p#0", "Q", "long answer", "short"), Pair("p#1", "Q", "x", "longer")]
    with JudgeServer(lengthy) as server:
        hook = open_hook(JudgeConfig(server=server.config()), "pair", KEY, "kept")
        found = compare(hook, pairs, votes=4, seed=1)
    assert [c.mean for c in found] == [3.0, -3.0]
    assert [c.votes for c in found] == [[3.0] * 4, [-3.0] * 4]
    assert {swapped(1, "p#0", vote) for vote in range(16)} == {True, False}


def test_a_judge_that_prefers_a_place_is_averaged_out_and_the_same_is_asked_after_a_restart() -> None:
    def first_place(request: dict[str, Any], number: int) -> Reply:
        return Reply("[[A>B]]")

    pair = Pair("p#0", "Q", "one", "two")
    asked = []
    for _ in range(2):
        with JudgeServer(first_place) as server:
            hook = open_hook(JudgeConfig(server=server.config(concurrency=1)), "pair", KEY, "kept")
            (found,) = compare(hook, [pair], votes=8, seed=5)
        asked.append(server.asked())
    assert asked[0] == asked[1]
    turned = sum(swapped(5, "p#0", vote) for vote in range(8))
    assert found.mean == (8 - 2 * turned) / 8 and 0 < turned < 8
    assert any(swapped(6, "p#0", v) != swapped(5, "p#0", v) for v in range(8))


def test_unreadable_votes_do_not_count() -> None:
    with JudgeServer(lambda *_: Reply("hm")) as server:
        hook = open_hook(JudgeConfig(server=server.config()), "pair", KEY, "kept")
        (found,) = compare(hook, [Pair("p", "Q", "a", "b")], votes=3, seed=0)
    assert found == (None, [], 3)


def test_an_item_that_the_server_refuses_is_unknown_and_not_asked_again() -> None:
    def answer(request: dict[str, Any], number: int) -> Reply:
        if "Q-long" in request["messages"][0]["content"]:
            return Reply(status=400, body="context length exceeded")
        return Reply('{"correctness": "correct"}')

    claims = [Claim("Q-long", "8", "8"), Claim("Q-short", "8", "8")]
    with JudgeServer(answer) as server:
        hook = open_hook(JudgeConfig(server=server.config()), "correctness", KEY, "kept")
        assert judge_correctness(hook, claims) == ["unknown", "correct"]
        assert len(server.requests) == 2
        hook = open_hook(JudgeConfig(server=server.config()), "correctness", KEY, "kept")
        with pytest.raises(UserError, match=r"status 400.*asked about item 0 \(question: 'Q-long'\)"):
            judge_correctness(hook, claims[:1])


def test_functions_judge(tmp_path: Path) -> None:
    source = "def judge(question, reference, answer):\n    return None if answer == '?' else reference == answer\n"
    hook = function(tmp_path, source, "correctness")
    claims = [Claim("Q", "8", "8"), Claim("Q", "8", "9"), Claim("Q", "8", "?")]
    assert judge_correctness(hook, claims) == ["correct", "wrong", "unknown"]


def test_functions_compare_and_label(tmp_path: Path) -> None:
    hook = function(tmp_path, "def judge(question, a, b):\n    return float(len(a) > len(b)) * 2 - 1\n", "pair")
    assert compare(hook, [Pair("p", "Q", "aa", "b")], votes=4, seed=0)[0].votes == [1.0] * 4
    other = tmp_path / "other"
    other.mkdir()
    hook = function(other, "def judge(question, answer):\n    return 'no' in answer\n", "label")
    assert label(hook, [Answered("Q", "sorry, no"), Answered("Q", "take it")]) == [True, False]


def test_functions_rewrite(tmp_path: Path) -> None:
    source = "def judge(q, thought, summary, language):\n"
    source += "    return None if thought == 'x' else (f' {thought} [{language}]', summary)\n"
    (tmp_path / "mine.py").write_text(source)
    hook = open_hook(RewriteConfig(call=f"{tmp_path / 'mine.py'}:judge"), "rewrite", KEY, "kept")
    drafts = [Draft("Q", "t", "s", "zh"), Draft("Q", "x", "s", "en")]
    assert rewrite(hook, drafts) == [Rewritten("t [zh]", "s"), None]


def test_blank_parts_are_dropped_unless_the_thought_was_blank_before(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def judge(q, thought, summary, language):\n    return ' ', summary\n")
    hook = open_hook(RewriteConfig(call=f"{tmp_path / 'mine.py'}:judge"), "rewrite", KEY, "kept")
    drafts = [Draft("Q", "", "s", "en"), Draft("Q", "t", "s", "en"), Draft("Q", "", " ", "en")]
    assert rewrite(hook, drafts) == [Rewritten("", "s"), None, None]


@pytest.mark.parametrize(
    ("kind", "result", "ask", "said"),
    [
        ("correctness", "1", lambda hook: judge_correctness(hook, [Claim("Q", "8", "8")]), "True, False, or None"),
        ("pair", "5.0", lambda hook: compare(hook, [Pair("p", "Q", "a", "b")], 1, 0), "from -3"),
        ("pair", "float('nan')", lambda hook: compare(hook, [Pair("p", "Q", "a", "b")], 1, 0), "from -3"),
        ("label", "None", lambda hook: label(hook, [Answered("Q", "a")]), "True \\(good"),
        ("rewrite", "'text'", lambda hook: rewrite(hook, [Draft("Q", "t", "s", "en")]), "\\(thought, summary\\)"),
        ("label", "1 / 0", lambda hook: label(hook, [Answered("Q", "a")]), "ZeroDivisionError.*item 0.*'Q'"),
    ],
)
def test_what_functions_may_not_do(
    kind: Kind, result: str, ask: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        ask(function(tmp_path, f"def judge(*texts):\n    return {result}\n", kind))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{}/none.py:judge", "there is no file"),
        ("{}/mine.py:other", "has no function 'other'; it has judge"),
        ("{}/broken.py:judge", "raised ZeroDivisionError"),
        ("no_such_package.judges:f", "no module 'no_such_package'"),
        ("os:no_function", "os has no function 'no_function'"),
    ],
)
def test_functions_that_are_not_there(spec: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def judge():\n    pass\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=said) as caught:
        open_hook(JudgeConfig(call=spec.format(tmp_path)), "label", KEY, "kept")
    assert "stage.cold.judge.call = " in str(caught.value)


def test_a_module_of_a_package_and_one_load_of_a_file(tmp_path: Path) -> None:
    source = (
        "from dataclasses import dataclass\nloads = []\nloads.append(1)\n\n@dataclass\nclass A:\n    x: int = 1\n\n"
    )
    source += "def judge(question, answer):\n    loads.append(1)\n    return len(loads) == A().x + 2\n"
    hook = function(tmp_path, source, "label")
    assert label(hook, [Answered("Q", "a")]) == [False]  # loads: 1 + 1 = 2
    assert label(function(tmp_path, source, "label"), [Answered("Q", "a")]) == [True]  # 3: not loaded anew
    assert open_hook(JudgeConfig(call="os.path:exists"), "label", KEY, "kept").function is not None
