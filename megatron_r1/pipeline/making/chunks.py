"""Prompts sampled chunk by chunk, each finished chunk a file: what `sample` and `preferences` stages share.

A stage that is killed goes on with the chunk it was in. Its answers are not sampled again if they were written
(rollouts/step-<chunk>.jsonl.gz); a judge is asked again for that one chunk. Finished chunks say how many prompts they
took, so that `chunk` may change in between.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.config.errors import UserError
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.stages import PreferencesStage, SampleStage
from megatron_r1.data.prompts import DEFAULT_SIZE
from megatron_r1.observe.metrics import MetricsWriter, read_metrics
from megatron_r1.observe.progress import Progress
from megatron_r1.observe.rollouts import RolloutWriter, read_rollouts
from megatron_r1.observe.rundir import StageDir, write_text
from megatron_r1.pipeline.making.aside import on_rank_0
from megatron_r1.pipeline.making.prompt_queue import PromptQueue
from megatron_r1.rewards.mixer import Scorer
from megatron_r1.rewards.workers import VerifierPool
from megatron_r1.rollout.engine import RolloutEngine
from megatron_r1.train.context import RunContext
from megatron_r1.train.engines import build_engine
from megatron_r1.train.frozen import FrozenModel
from megatron_r1.train.start import load_start
from megatron_r1.train.stopping import Stopped
from megatron_r1.types import Group, Prompt

logger = logging.getLogger(__name__)

SamplingStage = SampleStage | PreferencesStage


class Chunk(NamedTuple):
    """Some prompts and what was sampled of them."""

    number: int
    prompts: list[Prompt]
    held_out: int  # prompts of the chunk that were left out, as an evaluation asks them
    samples: list[list[dict[str, Any]]]  # [prompt][sample] rows as `observe/rollouts.py` writes them


class Outcome(NamedTuple):
    """What became of a chunk; JSON values."""

    rows: list[dict[str, Any]]  # for data.jsonl
    summary: dict[str, Any]  # as it is stored, it also has "asked": the prompts taken, held-out ones included


Work = Callable[[Chunk, list[dict[str, Any]]], Outcome]
"""Called on rank 0 with a chunk and the summaries of all earlier ones; a pure function of them, and of a judge."""


Metrics = Callable[[list[dict[str, Any]]], dict[str, float]]
"""Of the summaries up to a chunk: what is written as that chunk's."""


class ChunkFiles:
    """The chunks of a stage that are finished, <stage>/chunks/<number>.jsonl: a summary, then rows."""

    def __init__(self, stage_dir: Path) -> None:
        self.folder = stage_dir / "chunks"

    def path(self, number: int) -> Path:
        """File of a chunk."""
        return self.folder / f"{number:06d}.jsonl"

    def summaries(self) -> list[dict[str, Any]]:
        """Of the chunks finished so far; they are made in order."""
        found: list[dict[str, Any]] = []
        while (path := self.path(len(found))).is_file():
            with path.open(encoding="utf-8") as stream:
                found.append(json.loads(stream.readline()))
        return found

    def write(self, number: int, outcome: Outcome) -> None:
        """Write a chunk as a whole."""
        lines = [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in (outcome.summary, *outcome.rows)]
        write_text(self.path(number), "".join(f"{line}\n" for line in lines))

    def join(self, target: Path) -> None:
        """Write the rows of all chunks, in order, into one file as a whole."""
        temp = target.with_name(f".{target.name}.tmp")
        with temp.open("wb") as out:
            for number in range(len(self.summaries())):
                with self.path(number).open("rb") as stream:
                    stream.readline()
                    for line in stream:
                        out.write(line)
        temp.replace(target)


def run_chunks(
    stage: SamplingStage,
    context: RunContext,
    start: Path,
    rewards: Sequence[RewardConfig],
    work: Work,
    metrics: Metrics,
) -> list[dict[str, Any]]:
    """Sample, score and work through every chunk that is not finished; returns all summaries, on all ranks. Collective.

    rewards: what samples are scored by.
    """
    sampler = _Sampler(stage, context, start, rewards)
    folder = context.run.stage(stage.name).path
    files, rank = ChunkFiles(folder), context.world.rank
    kept = "finished chunks and sampled answers are saved"
    done: list[dict[str, Any]] = on_rank_0(files.summaries, context, stage.name, kept)
    taken = sum(summary["asked"] for summary in done)
    queue = PromptQueue(stage.prompts, context.tokenizer, context.heldout, taken)
    if rank == 0:
        logger.info("stage %s: %s", stage.name, _plan(stage, queue.left, taken))
    # The chunk that an earlier attempt was in is as large as that attempt made it.
    sampled: int | None = on_rank_0(partial(_sampled, sampler.file(len(done))), context, stage.name, kept)
    prompts = queue.take(stage.chunk) if sampled is None else queue.take_asked(sampled)
    rest = queue.left
    total = 0 if rest is None else len(done) + bool(prompts) + -(-rest // stage.chunk)
    with _Output(stage.name, context, done, total, metrics) as output:
        while prompts:
            if context.stop.agreed():
                raise Stopped(f"stage {stage.name} stopped after chunk {len(done)}; finished chunks are saved")
            asked = [prompt for prompt in prompts if queue.asks(prompt)]
            sampler.sample(len(done), asked, output.phase)
            finish = _Finish(len(done), asked, len(prompts) - len(asked), sampler.file(len(done)), files, work, done)
            done.append(on_rank_0(finish, context, stage.name, kept))
            output.write(done)
            prompts = queue.take(stage.chunk)
        if rank == 0:
            files.join(context.run.stage(stage.name).data)
    return done


def _sampled(file: Path) -> int | None:
    """How many prompts the answers in a file are to; None where there is no file."""
    return sum(row["sample"] == 0 for row in read_rollouts(file)) if file.is_file() else None


def _plan(stage: SamplingStage, left: int | None, taken: int) -> str:
    """What the stage is about to ask, for the log: nobody has to guess how long a source without `size` is."""
    unsized = [f"{each.task} has no `size`" for each in stage.prompts if each.task is not None and each.size is None]
    said = "asks the prompts of a stream" if left is None else f"asks {left:,} prompts"
    said += f", {stage.n} answers each, in chunks of {stage.chunk}"
    said += f" ({', '.join(unsized)}: {DEFAULT_SIZE:,} prompts)" if unsized else ""
    return f"{said}; goes on after {taken:,} prompts that are done" if taken else said


@dataclass(frozen=True, slots=True)
class _Finish:
    """What rank 0 does with a sampled chunk."""

    number: int
    prompts: list[Prompt]
    held_out: int
    file: Path
    files: ChunkFiles
    work: Work
    earlier: list[dict[str, Any]]

    def __call__(self) -> dict[str, Any]:
        rows = read_rollouts(self.file)
        n = len(rows) // len(self.prompts) if self.prompts else 0
        samples = [rows[i * n : (i + 1) * n] for i in range(len(self.prompts))]
        if [row["prompt_id"] for row in rows] != [prompt.id for prompt in self.prompts for _ in range(n)]:
            raise UserError(f"{self.file} holds answers to other prompts than this recipe's; delete it and try again")
        outcome = self.work(Chunk(self.number, self.prompts, self.held_out, samples), self.earlier)
        summary = outcome.summary | {"asked": len(self.prompts) + self.held_out}
        self.files.write(self.number, Outcome(outcome.rows, summary))
        return summary


class _Sampler:
    """Samples and scores a chunk, over the replicas; builds the model when it is first needed."""

    def __init__(self, stage: SamplingStage, context: RunContext, start: Path, rewards: Sequence[RewardConfig]) -> None:
        self.stage, self.context, self.start, self.rewards = stage, context, start, list(rewards)
        self._folder: StageDir = context.run.stage(stage.name)
        self._engine: RolloutEngine | None = None

    def file(self, number: int) -> Path:
        """Where the samples of a chunk are."""
        return self._folder.rollout_file(number)

    def sample(self, number: int, prompts: list[Prompt], progress: Callable[[int, int], None]) -> None:
        """Write the chunk's samples, unless an earlier attempt did. Collective."""
        world = self.context.world
        if world.any(world.rank == 0 and self.file(number).is_file()):
            return
        groups = self._groups(prompts, progress) if prompts else []
        if world.rank == 0:
            RolloutWriter(self._folder.path).write(number, groups)

    def _groups(self, prompts: list[Prompt], progress: Callable[[int, int], None]) -> list[Group]:
        """Scored groups in the order of the prompts, on all ranks."""
        world, stage = self.context.world, self.stage
        if self._engine is None:
            model = FrozenModel(self.context.arch, self.context.model, world)
            load_start(self.start, model)
            self._engine = build_engine(model, self.context)
        # Every replica decodes equally many prompts, as shared experts ask; a repeated one counts once.
        share = -(-len(prompts) // world.replicas)
        mine = [prompts[(world.replica_rank + i * world.replicas) % len(prompts)] for i in range(share)]
        completions = self._engine.generate(mine, stage.n, stage.sampling, self.context.config.seed, progress)
        groups = [Group(prompt=p, completions=c) for p, c in zip(mine, completions, strict=True)]
        if world.is_leader:
            with VerifierPool(getattr(stage, "verifier_workers", 1)) as pool:
                Scorer(self.rewards, pool).score_groups(groups)
        for group in groups:
            for completion in group.completions:
                completion.log_probs = []  # nobody reads them, and they would travel to every rank
        parts = world.all_gather_replicas(world.broadcast_in_replica(groups))
        # By place, not by id: two files of one name give their rows the same ids.
        return [parts[i % world.replicas][i // world.replicas] for i in range(len(prompts))]


class _Output:
    """Metrics, progress and stages.json of a stage in chunks; a context manager, on every rank."""

    def __init__(
        self, name: str, context: RunContext, done: list[dict[str, Any]], total: int, metrics: Metrics
    ) -> None:
        self.name, self.context, self.total, self.metrics = name, context, total, metrics
        self._first = context.world.rank == 0
        self._before = list(done)

    def __enter__(self) -> _Output:
        self._progress = Progress(self.name, self.total, len(self._before), enabled=self._first)
        self._metrics = None
        if self._first:
            folder = self.context.run.stage(self.name)
            self._metrics = MetricsWriter(folder.path, self.context.attempt)
            self._metrics.truncate_after(len(self._before))
            # A kill may have fallen between a chunk's file and its line.
            written = max((row["step"] for row in read_metrics(folder.metrics)), default=0)
            for step in range(written + 1, len(self._before) + 1):
                self._metrics.write(step, self.metrics(self._before[:step]))
            self.context.run.update_stage(self.name, steps=self.total, steps_done=len(self._before))
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()

    def phase(self, done: int, total: int) -> None:
        """Progress of sampling inside a chunk."""
        self._progress.phase("sampling", done, total)

    def write(self, done: list[dict[str, Any]]) -> None:
        """These chunks are finished."""
        values = self.metrics(done)
        if self._metrics is not None:
            self._metrics.write(len(done), values)
            self.context.run.update_stage(self.name, steps_done=len(done))
        self._progress.update(len(done), values)
