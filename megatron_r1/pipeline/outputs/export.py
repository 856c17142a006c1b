"""The `export` stage: a checkpoint becomes a Hugging Face folder in the run directory."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.stages import ExportStage
from megatron_r1.convert.conversion import Conversion, check_source, export_conversion, finished, run
from megatron_r1.convert.journal import foreign_files
from megatron_r1.convert.manifest import JOURNAL, MANIFEST, fp8_blocks, some
from megatron_r1.data.tokenizer_files import write_tokenizer_files
from megatron_r1.data.tokenizers import ByteTokenizer, CharTokenizer
from megatron_r1.observe.progress import Progress
from megatron_r1.pipeline.making.aside import on_rank_0
from megatron_r1.train.context import RunContext
from megatron_r1.train.exclusions import record_export

logger = logging.getLogger(__name__)


def run_export(stage: ExportStage, context: RunContext, start: Path | None) -> dict[str, Any]:
    """Write `<stage>/hf` from the checkpoint `start`; returns counts. Rank 0 writes, the others wait. Collective.

    An export that was killed goes on with the files that are not done; a finished one of the same checkpoint is only
    checked. Raises UserError on all ranks for a checkpoint that cannot be exported.
    """
    if start is None:
        raise UserError(f"stage {stage.name!r} exports nothing: set `from` to a stage or a checkpoint folder")
    target = context.run.stage(stage.name).hf
    export = _Export(stage, context, start, target)
    counts: dict[str, Any] = on_rank_0(export, context, stage.name, "finished files stay")
    return counts


class _Export:
    """What rank 0 does."""

    def __init__(self, stage: ExportStage, context: RunContext, start: Path, target: Path) -> None:
        self.stage, self.context, self.begin, self.target = stage, context, start, target

    def __call__(self) -> dict[str, Any]:
        conversion = export_conversion(
            self.begin,
            like=self.stage.like or _model_folder(self.context.model.config),
            tokenizer=self._tokenizer(),
            dtype=self.stage.dtype,
            scales=self.stage.scales,
            predictions=self.context.model.mtp is not False,
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

    def _tokenizer(self) -> Path | None:
        """Where the tokenizer's files are; those of a built-in one are written beside the export first."""
        own = self.context.tokenizer
        if isinstance(own, CharTokenizer | ByteTokenizer):
            folder = self.target.parent / "tokenizer"
            write_tokenizer_files(own, folder)
            if self.context.arch["model_type"] == "qwen2":
                logger.warning(
                    "stage %s: transformers 5 reads the tokenizer of any qwen2 folder with Qwen2Tokenizer, and the %s "
                    "tokenizer is none: load it with PreTrainedTokenizerFast.from_pretrained, not AutoTokenizer",
                    *(self.stage.name, own.name),
                )
            return folder
        given = self.context.config.tokenizer
        return given.path if given.kind == "huggingface" else None

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
