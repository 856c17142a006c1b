"""The report: a page that parses, loads nothing, escapes all, and works on parts of a run."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.observe.collect import collect, evenly_spaced
from megatron_r1.observe.evaluations import evaluation_table
from megatron_r1.observe.metrics import MetricsWriter
from megatron_r1.observe.panels import stage_charts
from megatron_r1.observe.report import write_learning_curve, write_report
from megatron_r1.observe.rollouts import RolloutWriter
from megatron_r1.observe.rundir import Departure, RunDir, StageState
from megatron_r1.observe.sections import MAX_TEXT, completion_html
from megatron_r1.types import Completion, Group, Prompt, Score, Verdict

HOSTILE = "</pre><script>alert('x')</script><img src=http://evil.example/a.png> \" & $title"
VOID = {"meta", "link", "br", "img", "input", "hr"}

AFTER = {
    "eval/pass_at_1": 0.6,
    "eval/cons_at_k": 0.7,
    "eval/k": 16,
    "eval/length": 50.0,
    "styles": {"steps": 12, "direct": 3},
}
RECIPE = """
name = "toy"
[[stage]]
name = "base"
kind = "pretrain"
[[stage]]
name = "before"
kind = "eval"
prompts = {task = "chain_sum"}
[[stage]]
name = "zero"
kind = "grpo"
[[stage]]
name = "after"
kind = "eval"
prompts = {task = "chain_sum"}
[[stage]]
name = "zero-2"
kind = "grpo"
[[stage]]
name = "base-again"
kind = "eval"
from = "base"
prompts = {task = "chain_sum"}
"""


class Page(HTMLParser):
    """Checks that tags balance and collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def texts(self, tag: str) -> list[str]:
        return [data for where, data in self.text if where == tag]


def group(prompt_id: str, rewards: list[float], text: str) -> Group:
    completions = [
        Completion(
            token_ids=[1, 2],
            log_probs=[0.0, 0.0],
            finish_reason="stop",
            weight_versions=(1, 1),
            text=f"{text} {reward}",
            score=Score(
                total=reward,
                parts={"accuracy": reward},
                verdict=Verdict(status="correct" if reward > 0 else "wrong", extracted=text),
            ),
        )
        for reward in rewards
    ]
    prompt = Prompt(id=prompt_id, question=text, text=text, token_ids=[1], answer=text, verifier="integer")
    return Group(prompt=prompt, completions=completions)


def result(pass_at_1: float, cons: float, length: float) -> dict[str, float]:
    return {
        "eval/pass_at_1": pass_at_1,
        "eval/cons_at_k": cons,
        "eval/k": 16,
        "eval/length": length,
    }


def rl_lines(folder: Path, steps: int, start: float) -> None:
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            writer.write(step, {"reward/accuracy": start, "rollout/length": 10.0 * step})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "toy")
    run.path.mkdir()
    run.resolved.write_text(RECIPE)
    run.write_stages(
        [
            StageState(name="base", kind="pretrain", state="done", steps=9, steps_done=9),
            StageState(name="before", kind="eval", state="done", result=result(0.2, 0.3, 5.0)),
            StageState(name="zero", kind="grpo", state="done", steps=4, steps_done=4, started=1e9),
            StageState(name="after", kind="eval", state="done", result=AFTER),
            StageState(name="zero-2", kind="grpo", state="running", steps=6, steps_done=2),
            StageState(name="base-again", kind="eval", result=result(0.1, 0.2, 6.0)),
        ]
    )
    rl_lines(run.stage("zero").path, 4, 0.5)
    rl_lines(run.stage("zero-2").path, 2, 0.75)
    writer = RolloutWriter(run.stage("zero").path)
    writer.write(0, [group("p:0", [0.0, 1.0], "plain"), group("p:1", [0.5, 0.25], HOSTILE)])
    run.write_departures([Departure(key="clip<low>", paper="10", here="0.2", why=HOSTILE)])
    return run


def test_the_page_is_well_formed_and_loads_nothing(run: RunDir) -> None:
    text = write_report(run.path).read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "use", "image"}
        assert not {"src", "srcset", "data", "action", "xlink:href"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    styles = "".join(page.texts("style"))
    assert "url(" not in styles and "@import" not in styles
    assert "http" not in "".join(page.texts("script")) + styles


def test_only_the_pages_own_script_may_run(run: RunDir) -> None:
    text = write_report(run.path).read_text()
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for t, a in Page(text).tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy
    assert text.count("<script") == 1


def test_hostile_text_is_shown_as_it_is(run: RunDir) -> None:
    page = Page(write_report(run.path).read_text())
    assert f"{HOSTILE} 0.25" in page.texts("pre")
    assert page.texts("b").count(HOSTILE) >= 2  # reference answer and extracted answer
    assert "clip<low>" in page.texts("code")
    assert HOSTILE in page.texts("div")  # question, and why it departs


def test_best_and_worst_take_one_completion_of_each_prompt(run: RunDir) -> None:
    (phase,) = collect(run.path).stages[2].phases
    assert [(row["prompt_id"], row["reward"]) for row in phase.best] == [("p:0", 1.0), ("p:1", 0.5)]
    assert [(row["prompt_id"], row["reward"]) for row in phase.worst] == [
        ("p:0", 0.0),
        ("p:1", 0.25),
    ]
    assert (phase.completions, phase.mean_reward) == (4, 0.4375)


def test_the_curve_counts_rl_steps_over_the_stages(run: RunDir) -> None:
    curve = collect(run.path).curve
    by_name = {series.name: series.points for series in curve.accuracy}
    assert by_name == {
        "training pass@1": [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5), (5, 0.75), (6, 0.75)],
        "held-out pass@1": [(0, 0.1), (0, 0.2), (4, 0.6)],
        "held-out cons@16": [(0, 0.2), (0, 0.3), (4, 0.7)],
    }
    lengths = {series.name: series.points for series in curve.length}
    assert lengths["training"][3:] == [(4, 40.0), (5, 10.0), (6, 20.0)]
    assert lengths["held-out"] == [(0, 5.0), (0, 6.0), (4, 50.0)]


def test_the_curve_leaves_out_other_branches_and_names_benchmarks(run: RunDir) -> None:
    text = RECIPE.replace('name = "zero-2"', 'name = "zero-2"\nfrom = "base"')
    text = text.replace(
        'from = "base"\nprompts = {task = "chain_sum"}',
        'from = "base"\nprompts = {path = "data/aime.jsonl"}',
    )
    run.resolved.write_text(text)
    by_name = {series.name: series.points for series in collect(run.path).curve.accuracy}
    assert by_name == {
        "training pass@1": [(1, 0.75), (2, 0.75)],
        "held-out pass@1, chain_sum 1": [(0, 0.2)],
        "held-out cons@16, chain_sum 1": [(0, 0.3)],
        "held-out pass@1, aime 2": [(0, 0.1)],
        "held-out cons@16, aime 2": [(0, 0.2)],
    }


def test_the_learning_curve_is_an_svg_file(run: RunDir, tmp_path: Path) -> None:
    text = write_learning_curve(run.path, tmp_path / "curve.svg").read_text()
    assert text.startswith("<svg xmlns=") and text.count("<polyline") == 5
    assert 'viewBox="0 0 1120 320"' in text
    (run.stage("zero").metrics).unlink()
    (run.stage("zero-2").metrics).unlink()
    run.write_stages([StageState(name="zero", kind="grpo", state="running")])
    with pytest.raises(UserError, match="no learning curve yet"):
        write_learning_curve(run.path, tmp_path / "none.svg")


def test_evaluations_stand_side_by_side(run: RunDir) -> None:
    page = Page(write_report(run.path).read_text())
    assert "Held-out evaluation" in page.texts("h3")
    cells = page.texts("td")
    at = cells.index("cons@16")
    assert cells[at : at + 4] == ["cons@16", "30.0%", "70.0%", "20.0%"]


def test_results_of_stages_are_read_out(run: RunDir) -> None:
    texts = Page(write_report(run.path).read_text()).texts("div")
    expected = "pass@1 60.0%, cons@16 70.0%, samples a problem 16, length 50.0"
    assert f"{expected}, styles (steps 12, direct 3)" in texts


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "new")
    run.path.mkdir()
    run.recipe.write_text('name = "young"\n')
    page = Page(write_report(run.path).read_text())
    assert "young " in page.texts("h1")
    assert "· pending" in page.texts("span")
    assert "No stage has begun." in page.texts("p")
    run.write_stages([StageState(name="base", kind="pretrain", state="running", steps=9)])
    assert "▶ running" in Page(write_report(run.path).read_text()).texts("span")


def test_values_that_are_not_finite_are_counted_on_the_page(run: RunDir) -> None:
    with MetricsWriter(run.stage("base").path) as writer:
        writer.write(1, {"loss/lm": float("nan"), "optim/grad_norm": float("inf")})
        writer.write(2, {"loss/lm": 2.0, "optim/grad_norm": 1.0})
    page = Page(write_report(run.path).read_text())
    assert any(text.startswith("2 values were not finite") for text in page.texts("p"))


def test_no_run_directory_and_damage_are_user_errors(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path / "empty")
    run.resolved.write_text("= broken")
    with pytest.raises(UserError, match=r"resolved\.toml"):
        write_report(run.path)


def test_long_completions_lose_their_middle_and_say_so() -> None:
    text = "a" * MAX_TEXT + "MIDDLE" + "b" * MAX_TEXT
    shown = completion_html(text)
    assert "MIDDLE" not in shown
    assert f"[... {MAX_TEXT + 6:,} characters left out ...]" in shown
    assert shown.startswith("a" * (MAX_TEXT // 2) + "\n") and shown.endswith("b" * (MAX_TEXT // 2))
    assert completion_html("<think>x</think>") == (
        '<span class="tag">&lt;think&gt;</span>x<span class="tag">&lt;/think&gt;</span>'
    )


def test_phases_shown_are_evenly_spaced_with_both_ends() -> None:
    assert evenly_spaced(list(range(31)), 6) == [0, 6, 12, 18, 24, 30]
    assert evenly_spaced([1, 2], 6) == [1, 2]


def test_languages_have_lines_and_rows_of_their_own(run: RunDir) -> None:
    with MetricsWriter(run.stage("zero").path) as writer:
        for step in (5, 6):
            writer.write(step, {"reward/language": 0.5, "reward/language/zh": 0.25, "reward/language_prompts/zh": 1.0})
    (chart,) = [chart for chart in stage_charts(collect(run.path).stages[2]) if "in its language" in chart]
    labels = Page(chart).texts("text")
    assert "all prompts" in labels and "zh" in labels and chart.count("<polyline") == 2
    states = [
        StageState(name="a", kind="eval", result={"eval/k": 4, "eval/language": 0.5, "eval/language/en": 0.25}),
        StageState(name="b", kind="eval", result={"eval/k": 4, "eval/language": 1.0, "eval/language/zh": 1.0}),
    ]
    table = evaluation_table(states)
    assert table is not None
    assert table.rows == [
        ["language", "50.0%", "100.0%"],
        ["language en", "25.0%", "-"],
        ["language zh", "-", "100.0%"],
        ["samples a problem", "4", "4"],
    ]


def test_benchmarks_have_completions_rows_and_lines_of_their_own(run: RunDir) -> None:
    groups = [group("f:0", [1.0, 0.0], "one"), group("f:0", [0.5, 0.25], "two")]
    RolloutWriter(run.stage("after").path).write(0, groups, benchmarks=["sums", "chat"])
    both = {"eval/sums/pass_at_1": 0.5, "eval/sums/cons_at_k": 0.75, "eval/sums/k": 4.0, "eval/sums/problems": 2.0}
    both |= {"eval/sums/length": 9.0, "eval/chat/pass_at_1": 0.25, "eval/chat/cons_at_k": 1.0, "eval/chat/k": 2.0}
    run.update_stage("after", result=both)
    view = collect(run.path)
    assert [(p.benchmark, p.completions, p.mean_reward) for p in view.stages[3].phases] == [
        ("sums", 2, 0.5),
        ("chat", 2, 0.375),
    ]
    by_name = {series.name: series.points for series in view.curve.accuracy}
    assert by_name["held-out pass@1, sums"] == [(4, 0.5)] and by_name["held-out pass@1, chat"] == [(4, 0.25)]
    assert by_name["held-out cons@4, sums"] == [(4, 0.75)] and "held-out cons@2, chat" not in by_name
    page = Page(write_report(run.path).read_text())
    assert "Everything measured" in page.texts("summary")
    cells = page.texts("td")
    at = cells.index("zero", cells.index("base"))  # its row of the closing table
    assert cells[at : at + 2] == ["zero", "50.0 %"]
    assert page.texts("span").count("benchmark") == 1
    keys = [a["data-step"] for t, a in page.tags if t == "button" and a.get("data-stage") == "3"]
    assert keys == ["sums", "chat"]
    assert "Benchmark chat: 2 completions, mean reward 0.375" in page.texts("p")
