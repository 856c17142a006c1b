"""What the worlds of the FP8 test compute: log-probs and one optimizer step of the same weights and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_r1.checkpoint import folders
from megatron_r1.checkpoint import io as checkpoint_io
from megatron_r1.config.model import ModelConfig, Precision
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.train.log_probs import compute_log_probs
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.objectives import LanguageModelObjective
from megatron_r1.train.trainer import Trainer
from tests.dist.workload import OPTIMIZER, TOKENIZER, samples


def score_and_step(world: World, root: str, precisions: list[Precision]) -> list[dict[str, Any]]:
    """For each precision: log-probs of every sample, then loss and gradient norm of a step. The first call saves."""
    found = []
    for precision in precisions:
        model = ModelConfig(preset="tiny-dense", precision=precision)
        trainer = Trainer(architecture(model, TOKENIZER.vocab_size), model, world, OPTIMIZER, steps=10)
        if folders.latest(Path(root)) is None:
            checkpoint_io.save(Path(root), trainer, {}, None, keep=1)
        checkpoint_io.load_weights(folders.folder(Path(root), 0), trainer)
        batcher = Batcher(world, 160, pad_id=0)
        scores = [s.log_probs for s in compute_log_probs(trainer, samples(), batcher, temperature=1.0)]
        result = trainer.train_step(batcher(samples()), LanguageModelObjective())
        found.append({"scores": scores, "loss": result.sums["nll"], "norm": result.grad_norm})
    return found
