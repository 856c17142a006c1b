"""What the loops share around their steps: resume, metrics and progress, checkpoints, stopping, the finite check."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_r1.checkpoint import folders
from megatron_r1.checkpoint import io as checkpoint_io
from megatron_r1.config.errors import RunFailed
from megatron_r1.config.stages import TrainStage
from megatron_r1.model.reference import Reference
from megatron_r1.observe.metrics import MetricsWriter, read_metrics
from megatron_r1.observe.progress import Progress
from megatron_r1.train.context import RunContext
from megatron_r1.train.dump import dump_batch
from megatron_r1.train.exclusions import record_exclusions
from megatron_r1.train.start import load_start
from megatron_r1.train.stopping import Stopped
from megatron_r1.train.trainer import StepResult, Trainer
from megatron_r1.types import Sample

logger = logging.getLogger(__name__)

_RECORD_SECONDS = 5.0  # between two updates of stages.json


class NonFinite(RunFailed):
    """The loss or the gradient is NaN or infinite; the batch is on disk and the last checkpoint is untouched."""


class StageLoop:
    """A context manager around one training stage. Only rank 0 writes metrics and progress."""

    def __init__(
        self, stage: TrainStage, context: RunContext, trainer: Trainer, reference: Reference | None = None
    ) -> None:
        self.stage, self.context, self.trainer, self.reference = stage, context, trainer, reference
        self.folder = context.run.stage(stage.name)
        self._last: dict[str, float] = {}  # latest value of every metric
        self._metrics: MetricsWriter | None = None
        self._progress: Progress | None = None
        self._saved_step = -1
        self._recorded = time.monotonic()

    def __enter__(self) -> StageLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._metrics is not None:
            self._metrics.close()

    def resume(self, start: Path | None) -> dict[str, Any] | None:
        """Load the newest checkpoint of this stage and return the loop's state, or start anew and return None.

        Anew: with the weights of `start`, or the freshly drawn ones. Metrics written after the checkpoint are
        dropped, since those steps will be taken again.
        """
        path = folders.latest(self.folder.checkpoints)
        state = None
        if path is not None:
            state = checkpoint_io.load(path, self.trainer, self.reference)
            self._saved_step = self.trainer.step
            logger.info("stage %s goes on from %s", self.stage.name, path)
        elif start is not None:
            load_start(start, self.trainer)
            if self.reference is not None:
                self.reference.replace(0)
        if self.context.world.rank == 0:
            record_exclusions(self.folder.path, self.context.heldout, start, resumed=path is not None)
            self._metrics = MetricsWriter(self.folder.path, self.context.attempt)
            self._metrics.truncate_after(self.trainer.step)
            for row in read_metrics(self.folder.metrics):  # a resumed stage's result is that of the whole stage
                self._last.update(row)
            self._progress = Progress(self.stage.name, self.stage.steps, self.trainer.step)
        return state

    def closing(self, *names: str) -> dict[str, float]:
        """These metrics of the last step, where it had them: the stage's result."""
        return {name: self._last[name] for name in names if name in self._last}

    def rollout_progress(self, done: int, total: int) -> None:
        """Show how far the sampling of the phase is."""
        if self._progress is not None:
            self._progress.phase("rollout", done, total)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record the metrics of the optimizer step just taken."""
        self._last.update(metrics)
        step = self.trainer.step
        if self._progress is not None:
            self._progress.update(step, metrics)
        if time.monotonic() - self._recorded > _RECORD_SECONDS:
            self._record_steps_done()
        due = step % self.stage.log_every == 0 or step == self.stage.steps or "rollout/tokens" in metrics
        if self._metrics is not None and due:
            self._metrics.write(step, metrics)

    def end_of_step(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save when due; save and raise Stopped when all ranks agree that they were asked to stop. Collective."""
        stop = self.context.stop.agreed()
        due = self.trainer.step % self.stage.checkpoint.every == 0 or self.trainer.step == self.stage.steps
        if (due or stop) and self._saved_step != self.trainer.step:
            began = time.monotonic()
            checkpoint_io.save(
                self.folder.checkpoints, self.trainer, state(), self.reference, keep=self.stage.checkpoint.keep
            )
            self._saved_step = self.trainer.step
            logger.debug("checkpoint of step %d in %.1f s", self.trainer.step, time.monotonic() - began)
            self._record_steps_done()
        if stop and self.trainer.step < self.stage.steps:
            raise Stopped(f"stage {self.stage.name} stopped after step {self.trainer.step}; its state is saved")

    def _record_steps_done(self) -> None:
        self._recorded = time.monotonic()
        if self.context.world.rank == 0:
            self.context.run.update_stage(self.stage.name, steps_done=self.trainer.step)

    def check_finite(self, result: StepResult, samples: list[Sample]) -> None:
        """Raise NonFinite, with the batch written to the stage's folder, when the step was not finite."""
        if result.is_finite:
            return
        dump = self.folder.path / f"nonfinite-step-{self.trainer.step:06d}.json"
        if self.context.world.rank == 0:
            about = {"sums": result.sums, "grad_norm": result.grad_norm}
            dump_batch(dump, samples, self.context.tokenizer, about)
        raise NonFinite(
            f"stage {self.stage.name}, step {self.trainer.step}: the loss or the gradient norm is not finite "
            f"(gradient norm {result.grad_norm}, sums {result.sums}). The batch is in {dump}; the newest checkpoint "
            "is from before it. Lower optimizer.lr or look at the batch, then run the same command again"
        )
