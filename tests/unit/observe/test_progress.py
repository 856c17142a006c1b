"""Progress: the text of a log, the live block of a terminal, the ETA, tables."""

from __future__ import annotations

import io

import pytest

from megatron_r1.observe.progress import Progress, duration, is_terminal, table


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_lines_are_aligned_ascii_at_the_interval() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("r1-zero", 600, start_step=100, stream=out, interval=30, clock=clock) as progress:
        for step in range(101, 161):
            clock.now += 2.0
            progress.update(step, {"reward/mean": 1.25, "reward/accuracy": step / 200})
        progress.update(161, {"policy/kl": 0.5})  # within the interval: shown by close
    lines = out.getvalue().split("\n")
    assert lines[0] == (
        "r1-zero       step 101/600  17%  reward    1.25  accuracy   50.5%  elapsed 0:00:02  eta 0:16:38"
    )
    assert [line[19:22] for line in lines[:-1]] == ["101", "116", "131", "146", "161"]
    assert "kl  0.5000" in lines[4] and "accuracy   80.0%" in lines[4]  # kept from step 160
    assert lines[5] == ""
    assert len({line.index("elapsed") for line in lines[:4]}) == 1
    assert out.getvalue().isascii() and "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


def test_plain_phase_lines_wait_for_the_interval_too() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress("z", 10, stream=out, interval=30, clock=clock)
    for done in range(0, 512, 64):
        progress.phase("rollout", done, 512)
        clock.now += 10
    progress.close()
    assert [line[:45].rstrip() for line in out.getvalue().splitlines()] == [
        "z             step  0/10   0%  rollout 0/512",
        "z             step  0/10   0%  rollout 192/51",
        "z             step  0/10   0%  rollout 384/51",
    ]
    assert out.getvalue().splitlines()[0].endswith("elapsed 0:00:00  eta --:--")


def test_the_last_step_is_printed_once_whatever_the_interval() -> None:
    out = io.StringIO()
    with Progress("sft", 3, stream=out, interval=1e9, clock=Clock()) as progress:
        for step in (1, 2, 3):
            progress.update(step, {"loss/lm": 3.0 - step})
    assert [line.split("step ")[1][:8] for line in out.getvalue().splitlines()] == [
        "1/3  33%",
        "3/3 100%",
    ]


def test_eta_follows_the_recent_pace() -> None:
    clock = Clock()
    progress = Progress("z", 1000, enabled=False, clock=clock)
    assert progress.eta() is None
    for step in range(1, 101):  # slow at first
        clock.now += 10.0
        progress.update(step, {})
    assert progress.eta() == pytest.approx(900 * 10.0)
    for step in range(101, 201):
        clock.now += 1.0
        progress.update(step, {})
    assert progress.eta() == pytest.approx(800 * 1.0)


def test_other_ranks_print_nothing() -> None:
    out = io.StringIO()
    with Progress("z", 2, enabled=False, stream=out) as progress:
        progress.phase("rollout", 1, 2)
        progress.update(2, {"reward/mean": 1.0})
    assert out.getvalue() == ""


def test_a_terminal_gets_a_block_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with Progress("r1-zero", 600, start_step=100, stream=out, clock=Clock()) as progress:
        progress.phase("rollout", 128, 512)
        progress.update(150, {"reward/accuracy": 0.625})
    text = out.getvalue()
    assert "128/512" in text and "step 150/600 25%" in text and "62.5%" in text
    assert "\x1b[1A" in text  # cursor up: redrawn, not appended
    assert "\x1b[?25h" in text  # the cursor is shown again


def test_forced_colour_puts_no_codes_into_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert not is_terminal(io.StringIO())
    assert is_terminal(Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    columns, rows = ["metric", "before", "after"], [["pass@1", 0.2141, "84%"], ["k", 16, None]]
    out = io.StringIO()
    table("Held-out", columns, rows, stream=out)
    assert out.getvalue() == (
        "Held-out\nmetric  before  after\n------  ------  -----\npass@1   0.214    84%\nk           16      -\n"
    )
    monkeypatch.setenv("TERM", "xterm")
    drawn = Terminal()
    table("Held-out", columns, [["[bold]x", 1, 2]], stream=drawn)
    assert "[bold]x" in drawn.getvalue()  # data, not rich markup


def test_durations() -> None:
    assert [duration(s) for s in (None, 0.4, 423, 93600)] == [
        "--:--",
        "0:00:00",
        "0:07:03",
        "26:00:00",
    ]
