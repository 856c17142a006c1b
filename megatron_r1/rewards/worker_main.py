"""One killable verifier process, the other end of `rewards/workers.py`.

Started as `python -P -m megatron_r1.rewards.worker_main <parent pid> <address space in bytes>`. A
fresh interpreter started by exec, so it holds none of the trainer's memory, CUDA state or locks and
imports neither torch nor the trainer's main module.

Protocol. Jobs come in on stdin as frames: 4 bytes big-endian length, then a pickle of (verifier,
answer, prompt, deadline in seconds); the parent wrote them, so unpickling is safe. Replies go out
on the first stdout as lines of ASCII JSON, at most 16 KiB each: {"started": true} once the verifier
is imported, from where the deadline counts, then {"status", "extracted", "detail"}; or only
{"missing": text} if the verifier's package is not installed. What verifiers print goes to stderr,
which the parent keeps in an unnamed file.

No orphans. A worker that waits looks once a second whether its parent is still its parent, besides
the end of file on stdin (which never comes if another child of the trainer inherited the pipe). A
worker that works cannot look: one big-integer operation may hold the interpreter for hours. So a
kernel timer without a Python handler ends it two seconds after the parent should have.
PR_SET_PDEATHSIG is no cure: it fires when the *thread* that started the child ends.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import select
import signal
import struct
import sys
from typing import Any

from megatron_r1.rewards.accuracy import describe, guarded, prepare

LOAD_SECONDS = 120.0
"""What a verifier's imports may take (sympy from a cold network file system)."""
_GRACE_SECONDS = 2.0
_FILE_BYTES = 64 << 20  # what a verifier may write to stderr or anywhere else
_MAX_EXTRACTED = 512


def main(arguments: list[str]) -> int:
    """Serve jobs until stdin ends or the parent is gone. Returns 0."""
    parent, address_space = int(arguments[0]), int(arguments[1])
    for limit, most in (
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
    ):
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    jobs, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    while (frame := _next_frame(jobs, parent)) is not None:
        if not _serve(frame, replies):
            break
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return 0


def _serve(frame: bytes, replies: int) -> bool:
    """Do one job and reply. Returns whether the process is fit for another one."""
    signal.setitimer(signal.ITIMER_REAL, LOAD_SECONDS + _GRACE_SECONDS)
    try:
        job = pickle.loads(frame)
    except Exception as error:  # metadata of a class that this interpreter cannot import
        return _give_up(replies, error)
    verifier, answer, prompt, deadline = job
    try:
        prepare(verifier, prompt)
    except ImportError as error:
        _reply(replies, {"missing": describe(error)})
        return True
    except Exception as error:
        return _give_up(replies, error)
    _reply(replies, {"started": True})
    signal.setitimer(signal.ITIMER_REAL, deadline + _GRACE_SECONDS)
    verdict = guarded(verifier, answer, prompt)
    extracted = None if verdict.extracted is None else verdict.extracted[:_MAX_EXTRACTED]
    _reply(replies, {"status": verdict.status, "extracted": extracted, "detail": verdict.detail[:200]})
    # Memory that ran out once is fragmented, and a broken recursion may leave half-built caches.
    return not verdict.detail.startswith(("MemoryError", "RecursionError"))


def _give_up(replies: int, error: Exception) -> bool:
    _reply(replies, {"started": True})
    _reply(replies, {"status": "unknown", "extracted": None, "detail": describe(error)})
    return True


def _next_frame(jobs: int, parent: int) -> bytes | None:
    """Wait for a job. Returns None at the end of stdin or when the parent is gone."""
    waiting = select.poll()
    waiting.register(jobs, select.POLLIN)
    while not waiting.poll(1000):
        if os.getppid() != parent:
            return None
    header = _read_exactly(jobs, 4)
    return None if header is None else _read_exactly(jobs, struct.unpack(">I", header)[0])


def _read_exactly(source: int, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(source, size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _reply(replies: int, message: dict[str, Any]) -> None:
    line = json.dumps(message).encode("ascii") + b"\n"
    while line:
        line = line[os.write(replies, line) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
