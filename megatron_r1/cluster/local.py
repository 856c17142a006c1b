"""Start the ranks of a run on this machine and watch them until all have ended.

The parent imports no torch, holds no state of the run, and promises: no rank outlives it, a stop
signal reaches every rank so that it can save, one dead rank ends the others instead of leaving them
to wait in a collective, and the message says which rank died, of what, and what it said last.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, TextIO

from megatron_r1.cluster.ranks import FIRST_PORT, PORTS

USER_ERROR = 2  # exit status of a rank that has already told the user what to mend
TAIL_LINES = 20
TAIL_BYTES = 64 * 1024
POLL_SECONDS = 0.02
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class _Stop:
    """Stop signals the parent has received."""

    signals: list[int] = field(default_factory=list)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(number)


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path | None  # None for rank 0, which writes to the terminal


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago.

    Rank 0 listens on it only seconds later, when it has imported torch. So it is none of the ports that the kernel
    hands to outgoing connections, of which other runs on this machine make many.
    """
    draw = random.SystemRandom()
    for _ in range(100):
        port = draw.randrange(FIRST_PORT, FIRST_PORT + PORTS)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free TCP port found from {FIRST_PORT} to {FIRST_PORT + PORTS - 1}")


def launch(
    command: Sequence[str],
    nproc: int,
    log_dir: Path,
    env: Mapping[str, str] | None = None,
    *,
    grace_seconds: float = 5.0,
    stop_seconds: float = 600.0,
    errors: TextIO | None = None,
) -> int:
    """Run `command` as `nproc` ranks and wait for all of them.

    Each rank gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR=127.0.0.1 and
    MASTER_PORT. Rank 0 shares the terminal; rank R > 0 writes stdout and stderr to
    `log_dir/rank-R.log`. Ranks ignore SIGINT, so that Ctrl-C reaches them once, as the parent's
    SIGTERM; SIGTERM asks them to save and end, a second signal kills them.

    Args:
        command: what each rank runs.
        nproc: ranks, at least 1.
        log_dir: folder for the logs; made if missing.
        env: the ranks' environment before the variables above are set; None: this process's.
        grace_seconds: after one rank failed, how long the others may take to end by themselves.
        stop_seconds: after a stop signal, how long the ranks may take to save.
        errors: where messages go; None: stderr.

    Returns:
        0 if every rank ended with 0. Else the status of the first rank that failed (128 + N if
        signal N killed it), or 128 + N after a stop by signal N. Status 2 of a rank is passed on
        without a report: the user has read it.
    """
    if nproc < 1:
        raise ValueError(f"nproc must be at least 1, got {nproc}")
    log_dir.mkdir(parents=True, exist_ok=True)
    stop = _Stop()
    previous = _install(stop)
    ranks: list[_Rank] = []
    try:
        world = {
            **(os.environ if env is None else env),
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        for number in range(nproc):
            ranks.append(_start(command, number, world, log_dir))
        return _watch(ranks, stop, grace_seconds, stop_seconds, errors or sys.stderr)
    finally:
        _kill(ranks)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _install(stop: _Stop) -> dict[int, signal._HANDLER]:
    """Take over the stop signals; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, stop) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}


def _start(command: Sequence[str], number: int, world: Mapping[str, str], log_dir: Path) -> _Rank:
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)

    def in_child() -> None:
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != parent:
            os._exit(1)  # the parent died before the kernel could be told to kill this rank with it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    log = log_dir / f"rank-{number}.log" if number else None
    output: IO[bytes] | None = log.open("wb") if log else None
    try:
        process = subprocess.Popen(
            list(command),
            env={**world, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            preexec_fn=in_child,
        )
    finally:
        if output:
            output.close()
    return _Rank(number, process, log)


def _watch(ranks: list[_Rank], stop: _Stop, grace: float, patience: float, errors: TextIO) -> int:
    """Wait for the ranks; deal with stop signals, dead ranks and deadlines."""
    failed: list[_Rank] = []
    deadline: float | None = None
    signals_seen = 0
    while True:
        alive = [rank for rank in ranks if rank.process.poll() is None]
        failed += [rank for rank in ranks if rank.process.returncode and rank not in failed]
        if len(stop.signals) > signals_seen:
            deadline = _pass_on(alive, stop, deadline, patience, errors)
            signals_seen = len(stop.signals)
        if not alive:
            break
        if failed and not stop.signals and deadline is None:
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            if stop.signals:
                names = ", ".join(str(rank.number) for rank in alive)
                _say(
                    errors,
                    f"rank(s) {names} did not end within the deadline after the stop signal: killed",
                )
            _kill(alive)
            break
        time.sleep(POLL_SECONDS)
    return _status(ranks, failed, stop, errors)


def _pass_on(alive: list[_Rank], stop: _Stop, deadline: float | None, patience: float, errors: TextIO) -> float:
    """First stop signal: ask every rank to save and end. Second: kill. Returns the deadline."""
    name = signal.Signals(stop.signals[-1]).name
    if len(stop.signals) > 1:
        _say(errors, f"second stop signal ({name}): killing {len(alive)} rank(s)")
        _kill(alive)
        return deadline or time.monotonic()
    _say(errors, f"{name}: asking {len(alive)} rank(s) to save and end; once more kills them")
    for rank in alive:
        rank.process.terminate()
    return time.monotonic() + patience


def _status(ranks: list[_Rank], failed: list[_Rank], stop: _Stop, errors: TextIO) -> int:
    """The exit status of the run, and the report of a failure."""
    if stop.signals:
        # A rank that had no handler yet dies of the SIGTERM itself, a late one of our SIGKILL: both
        # are the stop.
        broken = [rank for rank in failed if rank.process.returncode not in (-signal.SIGTERM, -signal.SIGKILL)]
        for rank in broken:
            _report(rank, len(ranks), errors)
        return _code(broken[0]) if broken else 128 + stop.signals[0]
    if not failed:
        return 0
    told = [rank for rank in failed if rank.process.returncode == USER_ERROR]
    if told:  # any other has lost a peer in the middle of a collective
        logs = [rank.log for rank in told if rank.log is not None]
        if len(logs) == len(told):  # rank 0, which has the terminal, said nothing
            _say(errors, "\n".join(_tail(logs[0])))
        return USER_ERROR
    first = failed[0]
    _report(first, len(ranks), errors)
    others = [f"rank {rank.number} ({_cause(rank)})" for rank in failed[1:]]
    if others:
        _say(errors, f"also failed, probably in consequence: {', '.join(others)}")
    return _code(first)


def _report(rank: _Rank, world: int, errors: TextIO) -> None:
    _say(errors, f"rank {rank.number} of {world} died: {_cause(rank)}")
    if rank.log is None:
        _say(errors, "its output is above")
        return
    lines = _tail(rank.log)
    if not lines:
        _say(errors, f"it wrote nothing to {rank.log}")
        return
    _say(errors, f"last lines of {rank.log}:")
    _say(errors, "\n".join(f"  | {line}" for line in lines))


def _cause(rank: _Rank) -> str:
    code = rank.process.returncode
    if code is None or code >= 0:
        return f"exit status {code}"
    hint = " (often the kernel, out of memory)" if code == -signal.SIGKILL else ""
    try:
        return f"killed by {signal.Signals(-code).name}{hint}"
    except ValueError:  # a real-time signal has no name
        return f"killed by signal {-code}"


def _code(rank: _Rank) -> int:
    code = rank.process.returncode
    return 128 - code if code < 0 else code


def _tail(log: Path) -> list[str]:
    """The last lines of a log, however long it is."""
    with log.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    return text.splitlines()[-TAIL_LINES:]


def _kill(ranks: list[_Rank]) -> None:
    """Kill what still lives, and reap it."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
    for rank in ranks:
        rank.process.wait()


def _say(errors: TextIO, text: str) -> None:
    print(f"megatron-r1: {text}" if not text.startswith("  ") else text, file=errors, flush=True)
