"""What a GRPO step costs beyond the arithmetic: this project's step against the same one by hand on bare Megatron-Core.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --size larger
    python benchmarks/step_overhead.py --nproc 2
    python benchmarks/step_overhead.py --nproc 2 --expert 2

Sides: `ours` is `Batcher` and `Trainer.train_step(PolicyObjective)` as the GRPO loop calls them: log-probs from the
log-prob head, entropy, KL, clip and mismatch metrics, routing statistics, sums over ranks. `bare` is `Bare` below, what
one would write for this model and nothing else: Megatron's own GPTModel with full logits and torch.log_softmax, a
clipped policy loss with k3 KL, Megatron's schedule, DistributedDataParallel, distributed Adam and learning-rate
schedule, and of metrics the loss. Both start from the same weights, cut the same samples into the same packed rows
(`data/batching.py`) and use the same configuration and layer spec; neither runs the multi-token-prediction layer
(`ours` holds it, frozen).

--size tiny: the tiny-moe preset with a vocabulary of characters. larger: hidden 256, 4 layers, 8192 entries, where
arithmetic dominates. Each rank has one thread.

The sides take --steps steps in turn in the same processes, first one first, then the other, after --warm-up steps that
do not count. seconds: median over the steps of the processor time of all ranks together, which other work on the
machine disturbs least; wall: the same of the slowest rank's clock. ratio: ours / bare of the processor time;
paired_ratio: the median over pairs of steps of theirs. Cutting the batch is in both sides' time; batching_seconds says
how much it is, all ranks together. After the first step every gradient is compared: the largest difference, relative
to that parameter's largest entry.

Prints a table, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from machine import ROOT, commit, machine

from megatron_r1.cluster.local import launch

SIDES = ("ours", "bare")
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 100},
    "larger": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "moe_intermediate_size": 192,
    },
}
LR, WEIGHT_DECAY, BETA2, CLIP_GRAD = 1e-5, 0.01, 0.95, 1.0
CLIP_LOW, CLIP_HIGH, KL_COEFFICIENT = 0.2, 0.28, 0.001


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--nproc", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--expert", type=int, default=1, help="expert-parallel size")
    parser.add_argument("--samples", type=int, default=64, help="of an optimizer step, 20 to 120 tokens each")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=50, help="timed steps of either side")
    parser.add_argument("--warm-up", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.nproc == 1 or "RANK" in os.environ:
        warnings.filterwarnings("ignore")
        run(arguments)
        return
    command = [sys.executable, __file__, *sys.argv[1:]]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryDirectory() as logs:
        sys.exit(launch(command, arguments.nproc, Path(logs), env={**environment, "OMP_NUM_THREADS": "1"}))


def run(arguments: argparse.Namespace) -> None:
    """One rank: both sides in turn, compared and timed."""
    import torch

    from megatron_r1.config.model import ModelConfig, ParallelConfig
    from megatron_r1.model.presets import architecture
    from megatron_r1.parallel import world as worlds

    torch.set_num_threads(1)
    layout = ParallelConfig(data=arguments.nproc, expert=arguments.expert)
    world = worlds.start(layout, seed=1234)
    overrides = SIZES[arguments.size]
    model = ModelConfig(preset="tiny-moe", override=dict(overrides))
    arch = architecture(model, overrides["vocab_size"])
    ours, bare = Ours(arch, model, world, arguments), Bare(arch, world, arguments)
    start_alike(ours, bare)
    samples = [draw_samples(arguments.samples, int(arch["vocab_size"]), seed) for seed in range(4)]

    first = {"ours": ours.step(samples[0]), "bare": bare.step(samples[0])}
    differences = compare(ours, bare, first)
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    calls: dict[str, Callable[..., Any]] = {"ours": ours.step, "bare": bare.step}
    for number in range(arguments.warm_up + arguments.steps):
        for side in SIDES if number % 2 else SIDES[::-1]:
            torch.distributed.barrier()
            cpu, clock = time.process_time(), time.perf_counter()
            calls[side](samples[number % len(samples)])
            if number >= arguments.warm_up:
                times[side].append((time.process_time() - cpu, time.perf_counter() - clock))
    batching = []
    for chosen in samples * 5:
        cpu = time.process_time()
        micro_batches = len(ours.batcher(chosen))
        batching.append(time.process_time() - cpu)
    ranks: list[Any] = [None] * arguments.nproc
    torch.distributed.all_gather_object(ranks, (times, differences, statistics.median(batching)))
    if world.rank == 0:
        report(arguments, ranks, micro_batches)
    worlds.stop()


class Ours:
    """The step that the GRPO loop takes."""

    def __init__(self, arch: dict[str, Any], model: Any, world: Any, arguments: argparse.Namespace) -> None:
        from megatron_r1.config.grpo import CorrectionConfig, LossConfig
        from megatron_r1.config.optim import OptimizerConfig
        from megatron_r1.train.micro_batches import Batcher
        from megatron_r1.train.trainer import Trainer

        optimizer = OptimizerConfig(lr=LR, weight_decay=WEIGHT_DECAY, beta2=BETA2, clip_grad=CLIP_GRAD)
        self.trainer = Trainer(arch, model, world, optimizer, steps=1000, train_mtp=False)
        self.batcher = Batcher(world, arguments.micro_batch_tokens, pad_id=0)
        self.loss = LossConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, kl_coefficient=KL_COEFFICIENT)
        self.correction = CorrectionConfig()
        self.world = world

    def step(self, samples: list[Any]) -> tuple[float, float]:
        """(loss, gradient norm)."""
        from megatron_r1.algorithms.weights import count
        from megatron_r1.train.objectives import PolicyObjective

        objective = PolicyObjective(self.loss, self.correction, (), count(samples), 128, 1.0, self.world)
        batches = self.batcher(samples, self.trainer.mtp_depths)
        result = self.trainer.train_step(batches, objective)
        return result.sums["loss"], result.grad_norm

    @property
    def model(self) -> Any:
        """The model without its wrappers."""
        return self.trainer.models[0]


class Bare:
    """The same step by hand, for this model under data and expert parallelism."""

    def __init__(self, arch: dict[str, Any], world: Any, arguments: argparse.Namespace) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from megatron_r1.config.model import ModelConfig
        from megatron_r1.model.megatron_config import transformer_config
        from megatron_r1.model.specs import decoder_spec

        self.world, self.max_tokens = world, arguments.micro_batch_tokens
        config = transformer_config(arch, ModelConfig(preset="tiny-moe", mtp=False), world.layout, on_cpu=True)
        self.model = GPTModel(
            config,
            decoder_spec(config, None),
            vocab_size=arch["vocab_size"],
            max_sequence_length=arch["max_position_embeddings"],
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
        )
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.chunk = DistributedDataParallel(config, ddp, self.model)
        self.chunk.broadcast_params()
        settings = OptimizerConfig(
            optimizer="adam",
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            adam_beta2=BETA2,
            clip_grad=CLIP_GRAD,
            use_distributed_optimizer=True,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.chunk], use_gloo_process_groups=False)
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=LR,
            min_lr=0.0,
            lr_warmup_steps=0,
            lr_decay_steps=1000,
            lr_decay_style="constant",
            start_wd=WEIGHT_DECAY,
            end_wd=WEIGHT_DECAY,
            wd_incr_steps=1000,
            wd_incr_style="constant",
        )
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads

    def step(self, samples: list[Any]) -> tuple[float, float]:
        """(loss, gradient norm)."""
        import torch
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_r1.data.batching import make_micro_batches

        world = self.world
        shards = make_micro_batches(
            samples, self.max_tokens, 0, packed=True, shards=world.data_size, only_shard=world.data_rank
        )
        batches = shards[world.data_rank]
        tokens = sum(sample.response_length for sample in samples)
        self.chunk.train()
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=partial(forward_step, len(samples), tokens),
            data_iterator=iter(batches),
            model=self.chunk,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens_BT.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        loss = torch.stack(losses).sum()
        torch.distributed.all_reduce(loss)
        _, grad_norm, _ = self.optimizer.step()
        self.schedule.step(1)
        return float(loss), float(grad_norm)


def forward_step(sequences: int, tokens: int, batches: Iterator[Any], model: Any) -> tuple[Any, Callable[..., Any]]:
    """Logits [1, T, V] of a packed row, and the function that makes a loss of them."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    batch = next(batches)
    ends = torch.tensor(batch.bounds, dtype=torch.int32)
    longest = int(ends.diff().max())
    rows = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=ends,
        cu_seqlens_kv_padded=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    logits_1TV = model(batch.tokens_BT, batch.positions_BT, None, packed_seq_params=rows)
    return logits_1TV, partial(policy_loss, batch, sequences, tokens)


def policy_loss(batch: Any, sequences: int, tokens: int, logits_1TV: Any) -> tuple[Any, Any, Any]:
    """The paper's objective over the M learned tokens; Megatron divides by their number over the whole batch."""
    import torch

    mask = batch.where_NL >= 0
    log_probs_M = torch.log_softmax(logits_1TV[0], -1)[batch.where_NL[mask], batch.targets_NL[mask]]
    advantages_M = batch.advantages_N.repeat_interleave(batch.learned_N)
    weights_M = (1 / (sequences * batch.learned_N)).repeat_interleave(batch.learned_N)
    ratio = (log_probs_M - batch.old_log_probs_NL[mask]).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    drift = batch.reference_log_probs_NL[mask] - log_probs_M
    kl = drift.expm1() - drift
    terms = -torch.minimum(ratio * advantages_M, clipped * advantages_M) + KL_COEFFICIENT * kl
    loss = (terms * weights_M).sum()
    return loss * tokens, mask.sum().to(torch.int), loss.detach()


def draw_samples(number: int, vocabulary: int, seed: int) -> list[Any]:
    """Responses of 20 to 120 tokens with their prompts, which are short; with all log-probs that the loss can read."""
    from megatron_r1.types import Sample

    draw = random.Random(seed)
    made = []
    for _ in range(number):
        length, prompt = draw.randint(20, 120), draw.randint(3, 12)
        old = [-4.6 + draw.gauss(0, 0.1) for _ in range(length - prompt)]
        made.append(
            Sample(
                token_ids=[draw.randrange(2, vocabulary) for _ in range(length)],
                prompt_length=prompt,
                advantage=draw.gauss(0, 1),
                old_log_probs=old,
                reference_log_probs=[x + draw.gauss(0, 0.1) for x in old],
                rollout_log_probs=[x + draw.gauss(0, 0.01) for x in old],
            )
        )
    return made


def start_alike(ours: Ours, bare: Bare) -> None:
    """Give `bare` the weights of `ours`."""
    import torch

    weights = ours.model.state_dict()
    with torch.no_grad():
        for name, tensor in (*bare.model.named_parameters(), *bare.model.named_buffers()):
            if name in weights:  # counters are not saved; both start at 0
                tensor.copy_(weights[name])
    bare.optimizer.reload_model_params()


def compare(ours: Ours, bare: Bare, first: dict[str, tuple[float, float]]) -> dict[str, float]:
    """How far the sides are apart after one step from equal weights."""
    theirs = dict(bare.model.named_parameters())
    found = {name: p for name, p in ours.model.named_parameters() if p.requires_grad}
    if theirs.keys() != found.keys():
        raise RuntimeError(f"the sides train different parameters: {sorted(theirs.keys() ^ found.keys())}")
    whole_gradients(ours.trainer.chunks[0])
    whole_gradients(bare.chunk)
    apart = 0.0
    for name, parameter in found.items():
        a, b = parameter.main_grad, theirs[name].main_grad
        largest = b.abs().max().item()
        apart = max(apart, (a - b).abs().max().item() / largest if largest else a.abs().max().item())
    (loss, norm), (bare_loss, bare_norm) = first["ours"], first["bare"]
    return {
        "gradient_difference": apart,
        "loss_difference": abs(loss - bare_loss),
        "grad_norm_difference": abs(norm - bare_norm) / bare_norm,
    }


def whole_gradients(chunk: Any) -> None:
    """Complete the gradient buffers, of which each rank's optimizer has only its own share reduced. Collective."""
    import torch

    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def report(arguments: argparse.Namespace, ranks: list[Any], micro_batches: int) -> None:
    """Print what all ranks measured."""
    cpu, wall = (
        {side: [join(times[side][i][which] for times, _, _ in ranks) for i in range(arguments.steps)] for side in SIDES}
        for which, join in ((0, sum), (1, max))
    )
    differences = {name: max(found[name] for _, found, _ in ranks) for name in ranks[0][1]}
    layout = " ".join(f"{k}{v}" for k, v in (("DP", arguments.nproc), ("EP", arguments.expert)) if v > 1) or "one"
    print(f"{machine()}; commit {commit()}")
    print(f"size {arguments.size}, layout {layout}, {arguments.samples} samples, {micro_batches} micro-batches a rank")
    print("| side | processor seconds a step, all ranks | quartiles | wall seconds |", "|---|---|---|---|", sep="\n")
    for side in SIDES:
        low, middle, high = statistics.quantiles(cpu[side], n=4)
        print(f"| {side} | {middle:.4f} | {low:.4f} to {high:.4f} | {statistics.median(wall[side]):.4f} |")
    median = {side: statistics.median(cpu[side]) for side in SIDES}
    wall_median = {side: statistics.median(wall[side]) for side in SIDES}
    result = {
        "ratio": median["ours"] / median["bare"],
        "paired_ratio": statistics.median(a / b for a, b in zip(cpu["ours"], cpu["bare"], strict=True)),
        "wall_ratio": wall_median["ours"] / wall_median["bare"],
        **{f"{side}_seconds": median[side] for side in SIDES},
        **{f"{side}_wall_seconds": wall_median[side] for side in SIDES},
        "batching_seconds": sum(batching for _, _, batching in ranks),
        **differences,
        "layout": layout,
        **vars(arguments),
        "micro_batches": micro_batches,
        "machine": machine(),
        "commit": commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
