"""The `eval` stage: a checkpoint judged on held-out problems, of its own or of shared benchmarks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron_r1.config.stages import AskedProblems, EvalStage
from megatron_r1.observe.metrics import MetricsWriter
from megatron_r1.observe.progress import Progress
from megatron_r1.observe.rollouts import RolloutWriter
from megatron_r1.train.context import RunContext
from megatron_r1.train.engines import build_engine
from megatron_r1.train.evaluate import Evaluation, evaluate, heldout_prompts
from megatron_r1.train.exclusions import check_never_trained_on
from megatron_r1.train.frozen import FrozenModel
from megatron_r1.train.start import load_start

_RECORD_SECONDS = 5.0  # between two updates of stages.json


def run_evaluation(stage: EvalStage, context: RunContext, start: Path | None) -> dict[str, Any]:
    """Load the checkpoint once, ask every problem set, write metrics and completions.

    Returns the metrics of all sets, and of each the completions by style: "styles", or "styles/<benchmark>".
    """
    sets = [(asked, heldout_prompts(asked, context.tokenizer)) for asked in context.config.problem_sets(stage)]
    check_never_trained_on([prompt for _, prompts in sets for prompt in prompts], start)
    model = FrozenModel(context.arch, context.model, context.world)
    if start is not None:
        load_start(start, model)
    engine = build_engine(model, context)
    found: list[tuple[AskedProblems, Evaluation]] = []
    with _Sampled(stage, sum(len(prompts) * asked.table.k for asked, prompts in sets), context) as sampled:
        for asked, prompts in sets:
            sampled.next_set(len(prompts) * asked.table.k)
            result = evaluate(
                *(asked, prompts, engine, context.world, context.config.seed, stage.verifier_workers), sampled.update
            )
            found.append((asked, result))
    metrics = {name: value for _, result in found for name, value in result.metrics.items()}
    if context.world.rank == 0:
        folder = context.run.stage(stage.name).path
        with MetricsWriter(folder, context.attempt) as writer:
            writer.truncate_after(-1)  # an attempt that was killed here may have written already
            writer.write(0, metrics)
        groups = [group for _, result in found for group in result.groups]
        benchmarks = [asked.benchmark for asked, result in found for _ in result.groups if asked.benchmark]
        RolloutWriter(folder).write(0, groups, benchmarks=benchmarks or None)
    styles = {f"styles/{asked.benchmark}" if asked.benchmark else "styles": r.styles for asked, r in found}
    return {**metrics, **styles}


class _Sampled:
    """How many completions there are, over all problem sets and replicas: on the terminal and in stages.json."""

    def __init__(self, stage: EvalStage, total: int, context: RunContext) -> None:
        self._stage, self._run, self._first = stage, context.run, context.world.rank == 0
        self._total, self._before, self._of_set = total, 0, 0
        self._progress = Progress(stage.name, total, enabled=self._first)
        self._record(0)

    def __enter__(self) -> _Sampled:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.close()
        if kind is None:
            self._record(self._total)

    def next_set(self, completions: int) -> None:
        """The problem sets so far are done; the next asks for so many completions."""
        self._before += self._of_set
        self._of_set = completions

    def update(self, done: int, total: int) -> None:
        """This replica has `done` of its `total` completions of the set; all are about as far."""
        now = self._before + self._of_set * done // total
        self._progress.update(now, {})
        if time.monotonic() - self._recorded > _RECORD_SECONDS:
            self._record(now)

    def _record(self, done: int) -> None:
        self._recorded = time.monotonic()
        if self._first:
            self._run.update_stage(self._stage.name, steps_done=done, steps=self._total)
