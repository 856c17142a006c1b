"""What bf16 and blockwise FP8 do to losses and log-probs, on a model small enough for a CPU.

    python benchmarks/fp8_effect.py --steps 1000

Pre-trains tiny-moe on generated sums in fp32, bf16 and fp8-emulated (both kinds of scales) from the same weights on the
same batches, and compares the loss curves; a second fp32 run whose start is moved by a relative 1e-6 shows how far
curves part by rounding alone. Then the fp32 run's weights score held-out documents in each precision: the
differences in log-prob are what a trainer and a rollout engine of different precision would disagree by. Prints a
table, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from typing import Any

import torch
from machine import commit, machine

from megatron_r1.config.data import CorpusConfig
from megatron_r1.config.model import ModelConfig, ParallelConfig, TokenizerConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.data.text_batches import TextBatches
from megatron_r1.data.tokenizers import Tokenizer, build_tokenizer
from megatron_r1.model.presets import architecture
from megatron_r1.parallel import world as worlds
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.objectives import LanguageModelObjective
from megatron_r1.train.trainer import Trainer

NOISE = "fp32, start moved by 1e-6"
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    NOISE: {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp8, fp32 scales": {"precision": "fp8-emulated", "fp8_scales": "fp32"},
    "fp8, power-of-2 scales": {"precision": "fp8-emulated", "fp8_scales": "power-of-2"},
}
CORPUS = CorpusConfig.model_validate(
    {"task": "chain_sum", "options": {"terms": [2, 6], "digits": 1}, "styles": {"steps": 0.6, "plain": 0.4}}
)
COLUMNS = ("loss", "loss_difference", "mean_difference", "largest_difference", "kl_k3", "seconds_a_step")
LAST = 20  # steps that the final loss is a mean of


def main() -> None:
    """Train and score in every precision, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=300, help="held-out documents that are scored")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="rows besides fp32")
    arguments = parser.parse_args()
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    world = worlds.start(ParallelConfig(), seed=arguments.seed)
    tokenizer = build_tokenizer(TokenizerConfig(kind="char"))
    start = build(world, tokenizer, "fp32", arguments.steps).models[0].state_dict()
    start = {name: value.clone() for name, value in start.items() if torch.is_tensor(value)}
    trained: dict[str, Any] = {}
    exact = torch.empty(0)  # the fp32 scores, the first
    rows: dict[str, dict[str, float]] = {}
    losses: dict[str, list[float]] = {}
    for kind in ("fp32", *(kind for kind in arguments.kinds if kind != "fp32")):
        trainer = build(world, tokenizer, kind, arguments.steps)
        load(trainer, moved(start) if kind == NOISE else start)
        losses[kind], seconds = train(trainer, world, tokenizer, arguments.steps, arguments.seed)
        trained = trained or {k: v.clone() for k, v in trainer.models[0].state_dict().items() if torch.is_tensor(v)}
        load(trainer, trained)
        scores = score(trainer, tokenizer, arguments.documents, arguments.seed + 1)
        exact = scores if kind == "fp32" else exact
        rows[kind] = {**compare(exact, scores), **curve(losses["fp32"], losses[kind]), "seconds_a_step": seconds}
    print(table(rows))
    print(json.dumps({"steps": arguments.steps, "rows": rows, "machine": machine(), "commit": commit()}))
    worlds.stop()


def build(world: worlds.World, tokenizer: Tokenizer, kind: str, steps: int) -> Trainer:
    """A trainer of tiny-moe in this precision; the router's bias stands still, as in reinforcement learning."""
    model = ModelConfig(preset="tiny-moe", mtp=False, **KINDS[kind])
    optimizer = OptimizerConfig(lr=2e-3, min_lr=2e-4, schedule="cosine", warmup_steps=20, weight_decay=0.01)
    arch = architecture(model, tokenizer.vocab_size)
    return Trainer(arch, model, world, optimizer, steps, train_mtp=False, expert_bias_frozen=True)


def load(trainer: Trainer, weights: dict[str, Any]) -> None:
    """These weights, and master weights made from them."""
    trainer.models[0].load_state_dict(weights, strict=False)
    trainer.optimizer.reload_model_params()


def moved(weights: dict[str, Any]) -> dict[str, Any]:
    """The weights with a relative noise of 1e-6: what rounding alone makes of a training run."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: value * (1 + 1e-6 * torch.randn(value.shape, generator=draw)) if value.is_floating_point() else value
        for name, value in weights.items()
    }


def train(
    trainer: Trainer, world: worlds.World, tokenizer: Tokenizer, steps: int, seed: int
) -> tuple[list[float], float]:
    """Loss of every step, and the median seconds of one."""
    texts = TextBatches([CORPUS], tokenizer, batch_tokens=1024, steps=steps, seed=seed, exclude=frozenset())
    batcher = Batcher(world, 4096, tokenizer.pad_id)
    losses, seconds = [], []
    for step in range(steps):
        batch = batcher(texts.take(step))
        began = time.perf_counter()
        sums = trainer.train_step(batch, LanguageModelObjective()).sums
        seconds.append(time.perf_counter() - began)
        losses.append(sums["nll"] / sums["tokens"])
    return losses, statistics.median(seconds)


@torch.no_grad()
def score(trainer: Trainer, tokenizer: Tokenizer, documents: int, seed: int) -> torch.Tensor:
    """Log-probs of the learned tokens of held-out documents, float64."""
    model = trainer.models[0].eval()
    texts = TextBatches([CORPUS], tokenizer, batch_tokens=1024, steps=documents, seed=seed, exclude=frozenset())
    samples = [sample for step in range(documents) for sample in texts.take(step)][:documents]
    found = []
    for sample in samples:
        ids = torch.tensor([sample.token_ids])
        logits = model(ids, torch.arange(ids.shape[1])[None], None).double().log_softmax(-1)
        log_probs = logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        found.append(log_probs[sample.prompt_length - 1 :] if sample.prompt_length else log_probs)
    return torch.cat(found)


def compare(reference: torch.Tensor, scores: torch.Tensor) -> dict[str, float]:
    """Differences in log-prob per token, and the k3 estimate of the divergence between the two policies."""
    d = scores - reference
    return {
        "mean_difference": float(d.abs().mean()),
        "largest_difference": float(d.abs().max()),
        "kl_k3": float((d.exp() - d - 1).mean()),
    }


def curve(reference: list[float], losses: list[float]) -> dict[str, float]:
    """Final loss, and its relative distance from the fp32 run's."""
    last, base = statistics.fmean(losses[-LAST:]), statistics.fmean(reference[-LAST:])
    return {"loss": last, "loss_difference": last / base - 1}


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table, one row a precision."""
    lines = ["| precision | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {kind} | " + " | ".join(f"{row[c]:.3g}" for c in COLUMNS) + " |" for kind, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
