"""`VerifierPool`: hostile answers, dying workers, dying parents; nothing hangs and nothing is left
behind.

Misbehaviour on demand comes from a stand-in for the package `reasoning_gym`, put on the workers'
path.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.rewards.workers import Job, VerifierPool
from megatron_r1.types import Prompt, Verdict

STAND_IN = """
import os, subprocess, sys, time
if os.environ.get("STAND_IN_MISSING"):
    raise ImportError("no such package")
time.sleep(float(os.environ.get("STAND_IN_IMPORT_SECONDS", "0")))

class Odd(BaseException):
    pass

def equal(answer, entry): return 1.0 if answer == entry["answer"] else 0.5
def raises(answer, entry): raise KeyError("cell")
def odd(answer, entry): raise Odd("not an Exception")
def leaves(answer, entry): sys.exit(3)
def dies(answer, entry): os._exit(7)
def crashes(answer, entry): os.kill(os.getpid(), 11)
def hoards(answer, entry): bytearray(8 << 30)
def babbles(answer, entry):
    print("x" * 1_000_000)
    os.write(1, b'{"status": "correct", "extracted": null, "detail": ""}\\n')
    return 0.0
def verbose(answer, entry): raise ValueError("x" * 1_000_000)
def sleeps(answer, entry):
    child = subprocess.Popen(["sleep", "600"])
    with open(entry["file"] + ".part", "w") as file: file.write(str(child.pid))
    os.rename(entry["file"] + ".part", entry["file"])
    time.sleep(600)
def modules(answer, entry):
    heavy = {"torch", "megatron", "transformers", "pydantic", "__mp_main__"} & set(sys.modules)
    return 1.0 if not heavy and "pytest" not in sys.modules else 0.0
def environment(answer, entry): return float(os.environ["CUDA_VISIBLE_DEVICES"] == "")

def get_score_answer_fn(task):
    return globals()[task]
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "reasoning_gym.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def math(answer: str, reference: str = "42") -> Job:
    prompt = Prompt(id="m", question="?", text="?", token_ids=[1], answer=reference, verifier="math")
    return Job(verifier="math", answer=answer, prompt=prompt)


def gym(task: str, answer: str = "8", **entry: Any) -> Job:
    prompt = Prompt(
        id="g",
        question="?",
        text="?",
        token_ids=[1],
        answer=None,
        verifier="reasoning_gym",
        metadata={"task": task, "entry": {"answer": "8", **entry}},
    )
    return Job(verifier="reasoning_gym", answer=answer, prompt=prompt)


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def workers_of(parent: int) -> list[int]:
    """Pids of the worker processes that were started by `parent`, whoever their parent is now."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it ended while we looked
            continue
        if b"megatron_r1.rewards.worker_main" in words and str(parent).encode() in words:
            found.append(int(entry.name))
    return [pid for pid in found if alive(pid)]


def until(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(result)


HOSTILE = [
    r"9^{9^{9^9}}",
    r"10^{10^{10}}",
    "99999999!",
    r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}",
    "(" * 200 + "1" + ")" * 200,  # nothing to compute, but the grammar is slower than linear
]
HARMLESS = ["9" * 512, "__import__('os').system('exit')", "$" * 512, "\\frac{" * 70]


def test_hostile_answers_cost_a_deadline_each_and_the_pool_serves_on() -> None:
    honest = math(r"\frac{84}{2}+0")
    with VerifierPool(2, deadline=0.7) as pool:
        assert pool.pids == []  # nothing is started before it is needed
        jobs = [job for answer in HOSTILE for job in (math(answer), honest)]
        begin = time.monotonic()
        verdicts = pool.verify_many(jobs)
        seconds = time.monotonic() - begin
        assert [v.detail for v in verdicts[::2]] == ["deadline 0.7 s"] * len(HOSTILE)
        assert {v.status for v in verdicts[::2]} == {"unknown"}
        assert verdicts[0].extracted == r"9^{9^{9^9}}"
        assert [v.status for v in verdicts[1::2]] == ["correct"] * len(HOSTILE)
        # Five deadlines over two workers and as many starts, of seconds each on a busy machine.
        assert 2.5 * 0.7 < seconds < 30
        assert len(pool.pids) <= 2
        harmless = pool.verify_many([math(answer) for answer in HARMLESS], deadline=10)
        assert [v.status for v in harmless] == ["wrong"] * len(HARMLESS)
        assert len(workers_of(os.getpid())) == len(pool.pids)
    assert workers_of(os.getpid()) == []


def test_order_is_kept_and_work_is_shared(stand_in: Path) -> None:
    answers = [str(i % 10) for i in range(300)]
    with VerifierPool(3) as pool:
        verdicts = pool.verify_many([gym("equal", answer) for answer in answers])
        assert [v.extracted for v in verdicts] == answers
        assert [v.status == "correct" for v in verdicts] == [answer == "8" for answer in answers]
        assert len(pool.pids) == 3
        assert pool.verify_many([]) == []


@pytest.mark.parametrize(
    ("task", "status", "detail"),
    [
        ("equal", "correct", ""),
        ("raises", "unknown", "KeyError: 'cell'"),
        ("odd", "unknown", "Odd: not an Exception"),
        ("leaves", "unknown", "SystemExit: 3"),
        ("dies", "unknown", "worker died"),
        ("crashes", "unknown", "worker died"),
        ("hoards", "unknown", "MemoryError:"),
        ("babbles", "wrong", ""),
        ("verbose", "unknown", "ValueError: " + "x" * 188),
        ("modules", "correct", ""),
        ("environment", "correct", ""),
        ("no_such_task", "unknown", "KeyError: 'no_such_task'"),
        ("game_of_life_halting", "unknown", "ValueError: the reasoning_gym task"),
    ],
)
def test_misbehaviour(stand_in: Path, task: str, status: str, detail: str) -> None:
    with VerifierPool(1, deadline=5.0) as pool:
        verdicts = pool.verify_many([gym(task), gym("equal"), gym("equal", "9")])
    assert verdicts[0].status == status
    assert verdicts[0].detail.startswith(detail) and len(verdicts[0].detail) <= 200
    assert [v.status for v in verdicts[1:]] == ["correct", "wrong"]  # 0.5 is no 1.0


def test_a_deadline_kills_the_whole_process_group(stand_in: Path, tmp_path: Path) -> None:
    file = tmp_path / "grandchild"
    with VerifierPool(1, deadline=0.7) as pool:
        [verdict] = pool.verify_many([gym("sleeps", file=str(file))])
        assert verdict == Verdict(status="unknown", extracted="8", detail="deadline 0.7 s")
        assert until(lambda: not alive(int(file.read_text())), 5)
        assert pool.verify_many([gym("equal")])[0].status == "correct"


def test_a_worker_killed_from_outside(stand_in: Path, tmp_path: Path) -> None:
    file = tmp_path / "started"
    with VerifierPool(1, deadline=60.0) as pool:
        verdicts: list[Verdict] = []
        jobs = [gym("sleeps", file=str(file)), gym("equal")]
        thread = threading.Thread(target=lambda: verdicts.extend(pool.verify_many(jobs)))
        thread.start()
        assert until(file.exists, 20)
        os.kill(pool.pids[0], signal.SIGKILL)
        thread.join(20)
        os.kill(int(file.read_text()), signal.SIGKILL)  # its child is ours to end in this case
        assert [(v.status, v.detail) for v in verdicts] == [
            ("unknown", "worker died"),
            ("correct", ""),
        ]
        # One that dies while it waits costs nobody a verdict; its thread may be gone, too.
        [idle] = pool.pids
        os.kill(idle, signal.SIGKILL)
        assert pool.verify_many([gym("equal")])[0].status == "correct"
        assert pool.pids != [idle]


def test_imports_do_not_count_against_the_deadline(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_IMPORT_SECONDS", "1.0")
    with VerifierPool(1, deadline=0.5) as pool:
        assert pool.verify_many([gym("equal")])[0].status == "correct"


def test_a_missing_package_is_the_users_to_install(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_MISSING", "1")
    with VerifierPool(1) as pool:
        with pytest.raises(UserError, match="pip install reasoning-gym"):
            pool.verify_many([gym("equal"), gym("equal")])
        assert pool.pids == []  # the worker that held the job is gone
        monkeypatch.delenv("STAND_IN_MISSING")
        assert pool.verify_many([gym("equal")])[0].status == "correct"


def test_workers_that_cannot_start_are_an_error_not_a_loop(stand_in: Path) -> None:
    words = "import os; os.write(2, b'no room'); os._exit(5)"
    (stand_in / "sitecustomize.py").write_text(words)
    message = "3 verifier workers in a row failed to start.* the last one wrote: no room"
    with VerifierPool(2) as pool, pytest.raises(RuntimeError, match=message):
        pool.verify_many([gym("equal"), gym("equal")])
    assert workers_of(os.getpid()) == []


def test_metadata_that_cannot_leave_is_unknown(stand_in: Path) -> None:
    with VerifierPool(1) as pool:
        lost, kept = pool.verify_many([gym("equal", thing=lambda: 0), gym("equal")])
        assert lost.status == "unknown" and "pickle" in lost.detail
        assert kept.status == "correct"
        assert pool.verify_many([gym("equal", thing=lambda: 0)])[0].status == "unknown"


def test_a_large_job_does_not_block(stand_in: Path) -> None:
    with VerifierPool(2) as pool:
        jobs = [gym("equal", padding="x" * 3_000_000) for _ in range(4)]
        assert [v.status for v in pool.verify_many(jobs)] == ["correct"] * 4


def test_a_closed_pool_says_so(stand_in: Path) -> None:
    pool = VerifierPool(1)
    pool.verify_many([gym("equal")])
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.verify_many([gym("equal")])


def test_no_worker_outlives_its_parent(stand_in: Path, tmp_path: Path) -> None:
    """SIGKILL for a parent with a busy and an idle worker, while a fork of it holds their pipes
    open.

    So no end of file tells them: the idle one must notice by itself, the busy one has a timer.
    """
    started = tmp_path / "started"
    script = f"""
        import os, sys, time
        from megatron_r1.rewards.workers import Job, VerifierPool
        from megatron_r1.types import Prompt
        def gym(task):
            metadata = {{"task": task, "entry": {{"answer": "8", "file": {str(started)!r}}}}}
            prompt = Prompt(id="g", question="", text="", token_ids=[1], answer=None,
                            verifier="reasoning_gym", metadata=metadata)
            return Job(verifier="reasoning_gym", answer="8", prompt=prompt)
        pool = VerifierPool(2, deadline=0.5)
        pool.verify_many([gym("equal"), gym("equal")])
        holder = os.fork()
        if holder == 0:
            time.sleep(60)
            os._exit(0)
        print(holder, *pool.pids, flush=True)
        pool.verify_many([gym("sleeps")], deadline=1.0)
    """
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((root, str(stand_in)))}
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert parent.stdout is not None
    holder, *pids = [int(word) for word in parent.stdout.readline().split()]
    try:
        assert len(pids) == 2 and all(map(alive, pids))
        assert until(started.exists, 20)
        parent.kill()
        parent.wait()
        assert until(lambda: not any(map(alive, pids)), 1.0 + 2.0 + 3.0)
    finally:
        for pid in (holder, *([int(started.read_text())] if started.exists() else [])):
            os.kill(pid, signal.SIGKILL)
        parent.stdout.close()
