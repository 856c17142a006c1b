"""The parent's handle on one killable verifier process: start it, talk to it without ever blocking,
kill it.

Used only by `rewards/workers.py`; the process itself runs `rewards/worker_main.py`, whose docstring
has the protocol.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_r1
from megatron_r1.rewards.worker_main import LOAD_SECONDS
from megatron_r1.types import Prompt

logger = logging.getLogger(__name__)

_CHUNK = 16 << 10
_MAX_REPLY = 64 << 10  # bytes; an honest reply has less than 16 KiB


class WorkerProcess:
    """One process and its pipes. `job` is the index of the job it has, None while it is idle."""

    def __init__(self, memory_bytes: int) -> None:
        self.job: int | None = None
        self.started = False  # the verifier is imported and works on the job
        self.until = 0.0  # time.monotonic() at which the parent's patience ends
        self.served = 0  # jobs answered
        self._outbox = memoryview(b"")
        self._inbox = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        command = [sys.executable, "-P", "-m", "megatron_r1.rewards.worker_main"]
        self.process = subprocess.Popen(
            [*command, str(os.getpid()), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(),
            start_new_session=True,  # a group to kill as one, out of reach of the terminal's Ctrl-C
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._jobs = self.process.stdin.fileno()
        self._replies = self.process.stdout.fileno()
        os.set_blocking(self._jobs, False)  # a worker that does not read must not stop the parent

    def give(self, index: int, payload: bytes, selector: selectors.BaseSelector) -> None:
        """Hand over job `index`, whose `payload` comes from `pack`, and have the selector watch for
        the reply.
        """
        assert self.job is None, "a worker does one job at a time"
        self.job = index
        self.started = False
        self.until = time.monotonic() + LOAD_SECONDS
        self._outbox = memoryview(struct.pack(">I", len(payload)) + payload)
        selector.register(self._replies, selectors.EVENT_READ, self)
        self.send(selector)

    def send(self, selector: selectors.BaseSelector) -> None:
        """Write what the pipe takes of the job; the selector reports when it takes more."""
        try:
            while self._outbox:
                self._outbox = self._outbox[os.write(self._jobs, self._outbox) :]
        except BlockingIOError:
            if self._jobs not in selector.get_map():
                selector.register(self._jobs, selectors.EVENT_WRITE, self)
            return
        except BrokenPipeError:  # it is dead, which the end of its replies will tell
            self._outbox = memoryview(b"")
        if self._jobs in selector.get_map():
            selector.unregister(self._jobs)

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that are complete. Raises EOFError if the worker is gone, ValueError
        on nonsense.
        """
        chunk = os.read(self._replies, _CHUNK)
        if not chunk:
            raise EOFError("the worker closed its replies")
        *lines, self._inbox = (self._inbox + chunk).split(b"\n")
        if len(self._inbox) > _MAX_REPLY:
            raise ValueError(f"a reply over {_MAX_REPLY} bytes")
        return [json.loads(line) for line in lines]

    def rest(self, selector: selectors.BaseSelector) -> None:
        """End the job: stop watching the pipes."""
        self.job = None
        for descriptor in (self._replies, self._jobs):
            if descriptor in selector.get_map():
                selector.unregister(descriptor)

    def kill(self) -> str:
        """SIGKILL the process group, reap it, close the pipes. Returns the end of its stderr."""
        with contextlib.suppress(ProcessLookupError):
            # Before the reaping, which frees the group's number for others.
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            # Stuck in the kernel (a dead network file system) with the signal pending.
            logger.warning("verifier worker %d does not die of SIGKILL", self.process.pid)
        size = os.fstat(self._stderr.fileno()).st_size
        tail = os.pread(self._stderr.fileno(), 2000, max(0, size - 2000))
        for pipe in (self.process.stdin, self.process.stdout, self._stderr):
            if pipe is not None:
                pipe.close()
        return tail.decode("utf-8", "replace").strip()


def pack(verifier: str, answer: str, prompt: Prompt, deadline: float) -> bytes:
    """Return a job as the worker reads it. Raises whatever pickle raises for metadata that cannot
    leave the process.

    The prompt's text and tokens, which no verifier reads, stay here: a long prompt would cost more
    than its judgement.
    """
    return pickle.dumps((verifier, answer, replace(prompt, text="", token_ids=[]), deadline))


def _environment() -> dict[str, str]:
    """The worker's environment: ours, with the package on the path, one thread, no GPU, and
    reproducible hashes.
    """
    root = str(Path(megatron_r1.__file__).resolve().parent.parent)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    own = {
        "PYTHONPATH": path,
        "PYTHONHASHSEED": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "Agg",
    }
    return {**os.environ, **one_thread, **own}
