"""The `export` stage: a checkpoint becomes a Hugging Face folder in the run directory."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.config.run import ExportStage
from megatron_r1.convert.conversion import Conversion, check_source, export_conversion, finished, run
from megatron_r1.convert.journal import foreign_files
from megatron_r1.convert.manifest import JOURNAL, MANIFEST, fp8_blocks, some
from megatron_r1.observe.progress import Progress
from megatron_r1.train.context import RunContext
from megatron_r1.train.exclusions import record_export
from megatron_r1.train.stopping import Stopped

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0  # between two looks at whether rank 0 is done, or was asked to stop


def run_export(stage: ExportStage, context: RunContext, start: Path | None) -> dict[str, Any]:
    """Write `<stage>/hf` from the checkpoint `start`; returns counts. Rank 0 writes, the others wait. Collective.

    An export that was killed goes on with the files that are not done; a finished one of the same checkpoint is only
    checked. Raises UserError on all ranks for a checkpoint that cannot be exported.
    """
    if start is None:
        raise UserError(f"stage {stage.name!r} exports nothing: set `from` to a stage or a checkpoint folder")
    target = context.run.stage(stage.name).hf
    writer = _Writer(stage, context, start, target) if context.world.rank == 0 else None
    if writer is not None:
        writer.start()
    while True:
        # The others must not wait in one collective for as long as an export takes: it would run into its time limit.
        box = [None if writer is None else writer.look()]
        dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            break
        if context.stop.agreed():
            raise Stopped(f"stopped in stage {stage.name}; finished files stay")
    outcome = box[0]
    if isinstance(outcome, (UserError, RunFailed)):
        raise outcome
    return dict(outcome)


class _Writer(threading.Thread):
    """Exports beside the main thread, which answers the other ranks meanwhile."""

    def __init__(self, stage: ExportStage, context: RunContext, start: Path, target: Path) -> None:
        super().__init__(daemon=True)  # a stopped run does not wait for it
        self.stage, self.context, self.begin, self.target = stage, context, start, target
        self.outcome: Any = None

    def run(self) -> None:
        """Export, whatever comes of it."""
        try:
            self.outcome = self._export()
        except (UserError, RunFailed) as error:
            self.outcome = error
        except BaseException as error:  # the other ranks have to learn of it
            logger.exception("the export failed")
            self.outcome = RunFailed(f"stage {self.stage.name}: the export failed: {type(error).__name__}: {error}")

    def look(self) -> Any:
        """What came of it, as soon as it is known; None after a while otherwise."""
        self.join(_LOOK_SECONDS)
        return self.outcome

    def _export(self) -> dict[str, Any]:
        config = self.context.config
        conversion = export_conversion(
            self.begin,
            like=self.stage.like or _model_folder(config.model.config),
            tokenizer=config.tokenizer.path if config.tokenizer.kind == "huggingface" else None,
            dtype=self.stage.dtype,
            scales=self.stage.scales,
            predictions=config.model.mtp is not False,
            shard_bytes=int(self.stage.shard_gb * 1e9),
        )
        for note in conversion.notes:
            logger.info("stage %s: %s", self.stage.name, note)
        if strays := foreign_files(self.target):
            raise UserError(
                f"stage {self.stage.name!r}: {self.target} holds {some(strays)}, which no export wrote, and loaders "
                "may read it with the model. Move it away, then start the run again"
            )
        check_source(conversion, workers=self.stage.workers)
        self._write(conversion)
        record_export(self.target.parent, self.begin)
        blocks = fp8_blocks(self.target)
        logger.info("stage %s: %s%s", self.stage.name, self.target, f": {blocks}" if blocks else "")
        tensors = sum(1 for file in conversion.plan.files for _ in file.targets)
        counts = {"export/tensors": tensors, "export/bytes": conversion.plan.bytes}
        if blocks:
            counts |= {"export/fp8_blocks_kept": blocks.kept, "export/fp8_blocks_new": blocks.new}
        return {**counts, "folder": str(self.target)}

    def _write(self, conversion: Conversion) -> None:
        total, done, lock = max(conversion.plan.bytes, 1), 0, threading.Lock()
        with Progress(self.stage.name, 100) as progress:

            def advance(count: int) -> None:
                nonlocal done
                with lock:
                    before, done = done, done + count
                    if 100 * before // total < 100 * done // total:
                        progress.update(100 * done // total, {})

            # An earlier attempt's files stay, or are replaced where another checkpoint or setting made them.
            unfinished = (self.target / JOURNAL).is_file() or not (self.target / MANIFEST).is_file()
            resume = unfinished or finished(conversion, self.target)
            run(
                conversion,
                self.target,
                workers=self.stage.workers,
                resume=resume,
                overwrite=not resume,
                progress=advance,
            )


def _model_folder(config: Path | None) -> Path | None:
    return config if config is not None and config.is_dir() else None
