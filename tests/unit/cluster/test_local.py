"""The local launcher: what ranks are told, what becomes of them, and what the user reads when one
dies.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_r1.cluster.local import launch

ROOT = Path(__file__).parents[3]


def script(folder: Path, body: str) -> list[str]:
    """A rank's program. `R` is its rank, `mark(text)` leaves a file `R.text` in the folder."""
    head = f"""\
    import os, pathlib, signal, sys, time
    R = int(os.environ["RANK"])
    def mark(text):
        pathlib.Path({str(folder)!r}, f"{{R}}.{{text}}").write_text(str(os.getpid()))
    """
    path = folder / "rank.py"
    path.write_text(textwrap.dedent(head) + textwrap.dedent(body), encoding="utf-8")
    return [sys.executable, "-S", str(path)]


def wait_for(condition: object, what: str, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def marked(folder: Path, *names: str) -> bool:
    return all((folder / name).exists() and (folder / name).read_text() for name in names)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def parent(folder: Path, command: list[str], nproc: int, **options: float) -> subprocess.Popen[str]:
    """`launch` in a process of its own, so that it can be signalled."""
    code = (
        "import sys; from pathlib import Path; from megatron_r1.cluster.local import launch\n"
        f"sys.exit(launch({command!r}, {nproc}, Path({str(folder / 'logs')!r}), **{options!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT EXTRA"
    command = script(tmp_path, f"mark(' '.join(os.environ[n] for n in {names.split()!r}))")
    before = signal.getsignal(signal.SIGTERM)
    assert launch(command, 3, tmp_path / "logs", {**os.environ, "EXTRA": "x"}) == 0
    found = sorted(path.name.split(".", 1)[1] for path in tmp_path.glob("?.*"))
    port = found[0].split()[5]
    assert found == [f"{r} {r} 3 3 127.0.0.1 {port} x" for r in range(3)]
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 1024 < int(port) < lowest_outgoing  # no outgoing connection takes it before rank 0 listens
    assert signal.getsignal(signal.SIGTERM) == before


def test_rank_zero_has_the_terminal_and_the_others_have_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = script(tmp_path, "print('out', R, flush=True); print('err', R, file=sys.stderr)")
    assert launch(command, 2, tmp_path / "logs") == 0
    assert capfd.readouterr() == ("out 0\n", "err 0\n")
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "out 1\nerr 1\n"
    assert not (tmp_path / "logs" / "rank-0.log").exists()


def test_a_failing_rank_ends_the_others_and_is_quoted(tmp_path: Path) -> None:
    command = script(
        tmp_path,
        """
        if R == 1:
            for i in range(30): print("line", i)
            sys.exit(7)
        time.sleep(60)
        """,
    )
    errors = io.StringIO()
    start = time.monotonic()
    assert launch(command, 3, tmp_path / "logs", grace_seconds=0.3, errors=errors) == 7
    assert time.monotonic() - start < 10
    text = errors.getvalue()
    assert "rank 1 of 3 died: exit status 7" in text
    assert "  | line 10\n" in text and "line 29" in text
    assert "line 9\n" not in text  # the last 20 lines only
    assert "also failed" not in text  # those the launcher killed did not fail


def test_the_others_may_end_by_themselves_within_the_grace(tmp_path: Path) -> None:
    body = "sys.exit(3) if R == 0 else (time.sleep(0.3), mark('saved'))"
    errors = io.StringIO()
    assert launch(script(tmp_path, body), 2, tmp_path / "logs", grace_seconds=20, errors=errors) == 3
    assert (tmp_path / "1.saved").exists()
    assert "rank 0 of 2 died: exit status 3" in errors.getvalue()
    assert "its output is above" in errors.getvalue()


def test_a_rank_killed_by_a_signal_is_named(tmp_path: Path) -> None:
    errors = io.StringIO()
    command = script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if R == 1 else time.sleep(60)")
    assert launch(command, 2, tmp_path / "logs", grace_seconds=0.1, errors=errors) == 128 + 9
    assert "rank 1 of 2 died: killed by SIGKILL (often the kernel, out of memory)" in errors.getvalue()
    assert "it wrote nothing to" in errors.getvalue()


def test_a_users_mistake_is_passed_on_without_a_report(tmp_path: Path) -> None:
    errors = io.StringIO()
    command = script(tmp_path, "print('cure', R, file=sys.stderr); sys.exit(2)")
    assert launch(command, 2, tmp_path / "logs", errors=errors) == 2
    assert errors.getvalue() == ""


def test_a_users_mistake_counts_more_than_a_rank_that_lost_its_peer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
    if R == 0:
        time.sleep(0.3)
        print("megatron-r1: error: mend it", file=sys.stderr)
    sys.exit(2 if R == 0 else 1)
    """
    assert launch(script(tmp_path, body), 2, tmp_path / "logs") == 2
    assert capfd.readouterr().err == "megatron-r1: error: mend it\n"


def test_a_users_mistake_that_only_a_hidden_rank_saw_is_shown(tmp_path: Path) -> None:
    errors = io.StringIO()
    command = script(tmp_path, "(print('the cure'), sys.exit(2)) if R == 1 else time.sleep(60)")
    assert launch(command, 2, tmp_path / "logs", grace_seconds=0.1, errors=errors) == 2
    assert errors.getvalue() == "megatron-r1: the cure\n"


SAVES = """
def stop(*_):
    mark("saved"); time.sleep(0.2); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
mark("ready")
while True: time.sleep(0.02)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_reaches_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    running = parent(tmp_path, script(tmp_path, SAVES), 2)
    wait_for(lambda: marked(tmp_path, "0.ready", "1.ready"), "the ranks")
    running.send_signal(number)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 128 + number
    assert marked(tmp_path, "0.saved", "1.saved")
    assert "asking 2 rank(s) to save and end" in errors
    assert "died" not in errors


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    deaf = """
    signal.signal(signal.SIGTERM, lambda *_: mark("deaf"))
    mark("ready")
    while True: time.sleep(0.02)
    """
    running = parent(tmp_path, script(tmp_path, deaf), 2)
    wait_for(lambda: marked(tmp_path, "0.ready", "1.ready"), "the ranks")
    running.terminate()
    wait_for(lambda: marked(tmp_path, "0.deaf", "1.deaf"), "the first signal")
    assert running.poll() is None
    running.terminate()
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 143
    assert "second stop signal (SIGTERM): killing 2 rank(s)" in errors
    assert not alive(int((tmp_path / "0.ready").read_text()))


def test_ranks_that_do_not_stop_are_killed_at_the_deadline(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); mark('ready')\nwhile True: time.sleep(0.02)"
    running = parent(tmp_path, script(tmp_path, deaf), 2, stop_seconds=0.3)
    wait_for(lambda: marked(tmp_path, "0.ready", "1.ready"), "the ranks")
    running.terminate()
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 143
    assert "rank(s) 0, 1 did not end within the deadline" in errors


def test_ctrl_c_does_not_reach_the_ranks_directly(tmp_path: Path) -> None:
    command = script(tmp_path, "os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1); mark('survived')")
    assert launch(command, 1, tmp_path / "logs") == 0
    assert marked(tmp_path, "0.survived")


def test_no_rank_outlives_a_killed_parent(tmp_path: Path) -> None:
    running = parent(tmp_path, script(tmp_path, "mark('ready'); time.sleep(120)"), 2)
    wait_for(lambda: marked(tmp_path, "0.ready", "1.ready"), "the ranks")
    pids = [int((tmp_path / f"{rank}.ready").read_text()) for rank in range(2)]
    assert all(alive(pid) for pid in pids)
    running.kill()
    running.communicate(timeout=20)
    wait_for(lambda: not any(alive(pid) for pid in pids), "the ranks' death", 5.0)


def test_a_command_that_does_not_exist_leaves_no_rank(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        launch([str(tmp_path / "no-such-program")], 2, tmp_path / "logs")
