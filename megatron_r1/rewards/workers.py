"""Killable verifier processes: no answer of the model can hang or bloat the trainer.

Stands between `rewards/mixer.py` and the verifiers that `rewards/accuracy.py` marks KILLABLE. Each
worker is a fresh interpreter (`rewards/worker_main.py`) in a session of its own; it does one job at
a time, and when the job's wall-clock deadline has passed, its process group gets SIGKILL and a new
worker takes its place. In-process time-outs cannot do this: SIGALRM works on the main thread only
and waits for the end of a big-integer operation.
"""

from __future__ import annotations

import logging
import selectors
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from megatron_r1.config.errors import UserError
from megatron_r1.rewards.accuracy import describe
from megatron_r1.rewards.canonical import vote_key
from megatron_r1.rewards.worker_process import WorkerProcess, pack
from megatron_r1.types import Prompt, Verdict

logger = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 3
_PACKAGES = {"math": "math-verify[antlr4_13_2]", "reasoning_gym": "reasoning-gym"}


@dataclass(kw_only=True, slots=True)
class Job:
    """One answer to judge. Example: Job(verifier="math", answer="1/2", prompt=prompt)."""

    verifier: str  # key in `rewards.accuracy.VERIFIERS`
    answer: str  # what `extract_answer` found
    prompt: Prompt


class VerifierPool:
    """Up to `workers` verifier processes, started when the first job needs them.

    `deadline`: wall-clock seconds a job may take, the imports of its verifier not counted.
    `memory_bytes`: address space of a worker. Use it as a context manager, or call `close`. Calls
    from several threads take turns.
    """

    def __init__(self, workers: int, deadline: float = 1.0, *, memory_bytes: int = 2 << 30) -> None:
        if workers < 1 or deadline <= 0:
            raise ValueError(f"workers must be >= 1 and deadline > 0, not {workers} and {deadline}")
        self.limit = workers
        self.memory_bytes = memory_bytes
        self.failed_starts = 0  # in a row
        self._deadline = deadline
        self._workers: list[WorkerProcess] = []
        self._closed = False
        self._lock = threading.Lock()

    @property
    def pids(self) -> list[int]:
        """Process ids of the live workers; empty until a job needed one."""
        return [worker.process.pid for worker in self._workers]

    def verify_many(self, jobs: Sequence[Job], deadline: float | None = None) -> list[Verdict]:
        """Judge all jobs, `workers` at a time, and return their verdicts in the order of the jobs.

        A job that passes its deadline is `unknown` with the detail "deadline 1.0 s", one whose
        worker dies under it (killed for memory, segmentation fault) "worker died", one whose
        verifier raises "ValueError: ...". `deadline` (seconds) overrides the pool's own. Takes at
        most about len(jobs) / workers x deadline, plus the starts of workers (under a second each
        on an idle core).

        Raises UserError if a verifier's package is not installed, RuntimeError if workers do not
        start at all.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the verifier pool is closed")
            try:
                with selectors.DefaultSelector() as selector:
                    return _Batch(self, self._workers, jobs, deadline or self._deadline, selector).run()
            finally:  # after an exception or Ctrl-C no worker may keep a job that nobody awaits
                for worker in [w for w in self._workers if w.job is not None]:
                    self._workers.remove(worker)
                    worker.kill()

    def close(self) -> None:
        """Kill all workers. Idempotent."""
        with self._lock:
            self._closed = True
            while self._workers:
                self._workers.pop().kill()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Batch:
    """One call of `verify_many`: a single-threaded event loop over the pipes of the workers."""

    def __init__(
        self,
        pool: VerifierPool,
        workers: list[WorkerProcess],
        jobs: Sequence[Job],
        deadline: float,
        selector: selectors.BaseSelector,
    ) -> None:
        self.pool = pool
        self.workers = workers  # the pool's own list: workers outlive the batch
        self.jobs = jobs
        self.deadline = deadline
        self.selector = selector
        self.todo = deque(range(len(jobs)))
        self.verdicts: dict[int, Verdict] = {}

    def run(self) -> list[Verdict]:
        while len(self.verdicts) < len(self.jobs):
            self._assign()
            busy = [worker for worker in self.workers if worker.job is not None]
            if not busy:
                continue  # the last jobs could not be packed
            wait = min(worker.until for worker in busy) - time.monotonic()
            for key, events in self.selector.select(max(0.0, wait)):
                worker = key.data
                if events & selectors.EVENT_WRITE and worker.job is not None:
                    worker.send(self.selector)
                if events & selectors.EVENT_READ and worker.job is not None:
                    self._read(worker)
            now = time.monotonic()
            for worker in [w for w in self.workers if w.job is not None and w.until <= now]:
                self._lose(worker, f"deadline {self.deadline} s")
        return [self.verdicts[index] for index in range(len(self.jobs))]

    def _assign(self) -> None:
        """Give a job to every worker that is free, starting workers up to the pool's limit."""
        free = [worker for worker in self.workers if worker.job is None]
        while self.todo and (free or len(self.workers) < self.pool.limit):
            index = self.todo.popleft()
            job = self.jobs[index]
            try:
                payload = pack(job.verifier, job.answer, job.prompt, self.deadline)
            except Exception as error:  # metadata that cannot leave this process; said in the verdict
                self._unknown(index, describe(error))
                continue
            if not free:
                free.append(WorkerProcess(self.pool.memory_bytes))
                self.workers.append(free[-1])
            free.pop().give(index, payload, self.selector)

    def _read(self, worker: WorkerProcess) -> None:
        """Take in what a worker wrote: that it begins, its verdict, or the end of its life."""
        try:
            messages = worker.receive()
        except (EOFError, ValueError):
            self._lose(worker, "worker died")
            return
        for message in messages:
            assert worker.job is not None, "a worker replied without a job"
            job = self.jobs[worker.job]
            if "started" in message:
                worker.started = True
                worker.until = time.monotonic() + self.deadline
            elif "missing" in message:
                package = _PACKAGES.get(job.verifier, job.verifier)
                raise UserError(
                    f"prompt {job.prompt.id}: the verifier {job.verifier!r} needs a package that "
                    f"is not installed ({message['missing']}); pip install {package}, or give the "
                    "prompts another `verifier`"
                )
            else:
                if message["extracted"] is None:
                    message["extracted"] = vote_key(job.answer)
                self.verdicts[worker.job] = Verdict(**message)
                worker.served += 1
                self.pool.failed_starts = 0
                worker.rest(self.selector)

    def _lose(self, worker: WorkerProcess, detail: str) -> None:
        """Kill a worker that is dead or late. Its job is `unknown`, or waits again if the worker
        never began it.
        """
        assert worker.job is not None, "only a busy worker is watched"
        index = worker.job
        worker.rest(self.selector)
        self.workers.remove(worker)
        last_words = worker.kill()
        if worker.started:
            self._unknown(index, detail)
            return
        self.todo.appendleft(index)
        if worker.served:  # a sound one that was killed while idle, or retired after it ran out of memory
            return
        self.pool.failed_starts += 1
        logger.warning("a verifier worker failed to start: %s", last_words or "no message")
        if self.pool.failed_starts >= _MAX_FAILED_STARTS:
            raise RuntimeError(
                f"{self.pool.failed_starts} verifier workers in a row failed to start, with "
                f"{self.pool.memory_bytes >> 20} MiB of address space each; "
                f"the last one wrote: {last_words or 'nothing'}"
            )

    def _unknown(self, index: int, detail: str) -> None:
        extracted = vote_key(self.jobs[index].answer)
        self.verdicts[index] = Verdict(status="unknown", extracted=extracted, detail=detail)
