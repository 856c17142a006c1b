"""On-policy distillation: the student samples, the teacher says how likely each of its tokens should have been.

The loss is the reverse KL divergence to the teacher, KL(student || teacher), of every token of the student's own
samples (generalised knowledge distillation, arXiv 2306.13649, on-policy and with the reverse divergence). Its gradient
is estimated from the sampled tokens alone: with d = log student - log teacher it is the mean of d times the gradient
of log student, which differentiating the k2 estimator d^2 / 2 gives (`algorithms/kl.py`). A token answers for its own
divergence only, not for where it leads: that is -d as a reward with discount 0.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from megatron_r1.algorithms.mismatch import mismatch_metrics
from megatron_r1.algorithms.weights import count
from megatron_r1.config.grpo import CorrectionConfig, LossConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.stages import DistillStage
from megatron_r1.config.validate import check_teacher
from megatron_r1.data.prompt_mix import PromptMix
from megatron_r1.model.parked import Parked
from megatron_r1.observe.rollouts import RolloutWriter
from megatron_r1.parallel.world import World
from megatron_r1.rewards.accuracy import ACCEPT, JUDGE
from megatron_r1.rewards.mixer import Scorer
from megatron_r1.rewards.workers import VerifierPool
from megatron_r1.train.context import RunContext
from megatron_r1.train.engines import build_engine
from megatron_r1.train.frozen import FrozenModel
from megatron_r1.train.log_probs import compute_log_probs
from megatron_r1.train.loop import StageLoop
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.objectives import PolicyObjective
from megatron_r1.train.phase import distinct, phase_seed, sample_round, to_sample
from megatron_r1.train.phase_metrics import group_metrics
from megatron_r1.train.start import load_start
from megatron_r1.train.trainer import StepResult, Trainer
from megatron_r1.types import Group, Sample

REVERSE_KL = LossConfig(aggregation="token-mean", kl="k2", kl_coefficient=1.0, reference_every=0)
"""The policy loss of samples without advantages: the KL term alone, mean over all tokens of the step."""
_VERIFIER_WORKERS = 4
_MEASURED = (RewardConfig(kind="accuracy"), RewardConfig(kind="format"))
_JUDGED = ("reward/accuracy", "reward/majority", "reward/format", "verdict/unknown")


def distill(stage: DistillStage, context: RunContext, start: Path | None) -> dict[str, float]:
    """Run or resume the stage; returns the main metrics of its last step. Collective.

    start: checkpoint whose weights the student begins with; None: fresh ones.
    """
    world = context.world
    trainer = Trainer(
        context.arch,
        context.model,
        world,
        stage.optimizer,
        stage.steps,
        train_mtp=False,
        expert_bias_frozen=True,
    )
    teacher = Teacher(stage, context)
    batcher = Batcher.of(stage, context)
    engine = build_engine(trainer, context)
    prompts = PromptMix(stage.prompts, context.tokenizer, context.config.seed, context.heldout)
    with StageLoop(stage, context, trainer) as loop, VerifierPool(_VERIFIER_WORKERS) as pool:
        state = loop.resume(start)
        if state is not None:
            prompts.restore(state["prompts"])
        rollouts = RolloutWriter(loop.folder.path)
        if world.rank == 0:
            rollouts.truncate_after(trainer.step)
        while trainer.step < stage.steps:
            began = time.monotonic()
            # 1. the student samples; where a rule can tell, its answers are judged, to be looked at
            engine.update_weights(trainer.step)
            asked = distinct(prompts.take(stage.questions, trainer.step, stage.steps))
            seed = phase_seed(context.config.seed, trainer.step)
            spent = {"time/rollout": 0.0, "time/reward": 0.0}
            judge = partial(_judge, pool)
            groups = sample_round(
                asked, stage.n, stage.sampling, engine, world, seed, judge, loop.rollout_progress, spent
            )
            # 2. the teacher's log-probs of the student's tokens
            samples = [to_sample(group.prompt, completion, 0.0) for group in groups for completion in group.completions]
            spent["time/teacher_log_probs"] = teacher.annotate(samples)
            if world.rank == 0:
                rollouts.write(trainer.step, groups, _advantages(groups, samples))
            # 3. one optimizer step towards them
            result, seconds = _optimize(samples, stage, trainer, batcher)
            loop.check_finite(result, samples)
            metrics = {**_rollout_metrics(groups, spent, world), **_metrics(result), "time/train": seconds}
            loop.log({**metrics, "time/step": time.monotonic() - began})
            loop.end_of_step(lambda: {"prompts": prompts.state()})
        return loop.closing("distill/reverse_kl", "reward/accuracy", "reward/format", "rollout/length")


class Teacher:
    """A frozen model of its own architecture, in the layout of the student. With teacher_memory = "host" its weights
    are on the device during its pass only.

    Raises UserError for a teacher that the student's tokens do not fit.
    """

    def __init__(self, stage: DistillStage, context: RunContext) -> None:
        model, arch = context.model_named(stage.teacher_model)
        check_teacher(stage.name, context.arch, arch)
        self.model = FrozenModel(arch, model, context.world)
        load_start(context.checkpoint(stage.teacher), self.model)
        self.batcher = Batcher.of(stage, dataclasses.replace(context, model=model, arch=arch))
        self.temperature = stage.sampling.temperature
        self.parked = Parked(self.model.models, context.world.device) if stage.teacher_memory == "host" else None

    def annotate(self, samples: list[Sample]) -> float:
        """Fill in the samples' reference log-probs, at the temperature of sampling; returns its seconds. Collective."""
        began = time.monotonic()
        with nullcontext() if self.parked is None else self.parked.in_place():
            scored = compute_log_probs(self.model, samples, self.batcher, temperature=self.temperature)
        for sample, found in zip(samples, scored, strict=True):
            sample.reference_log_probs = found.log_probs
        return time.monotonic() - began


def _optimize(
    samples: list[Sample], stage: DistillStage, trainer: Trainer, batcher: Batcher
) -> tuple[StepResult, float]:
    began = time.monotonic()
    objective = PolicyObjective(
        config=REVERSE_KL,
        correction=CorrectionConfig(),
        limits=(),
        denominators=count(samples),
        length_constant=stage.sampling.max_new_tokens,
        temperature=stage.sampling.temperature,
        world=trainer.world,
    )
    return trainer.train_step(batcher(samples), objective), time.monotonic() - began


def _judge(pool: VerifierPool, groups: list[Group]) -> None:
    """Accuracy where the prompts have a verifier, the format of all: measured, never learned from."""
    verified = [group for group in groups if _has_verifier(group)]
    Scorer(_MEASURED, pool).score_groups(verified)
    Scorer(_MEASURED[1:], pool).score_groups([group for group in groups if not _has_verifier(group)])


def _has_verifier(group: Group) -> bool:
    return group.prompt.verifier not in (ACCEPT, JUDGE)


def _advantages(groups: list[Group], samples: list[Sample]) -> list[list[float]]:
    """[N][n] what the teacher thinks of each completion: mean over its tokens of its log-prob less the student's."""
    found = iter(samples)
    return [[_mean_gap(next(found)) for _ in group.completions] for group in groups]


def _mean_gap(sample: Sample) -> float:
    teacher, student = sample.reference_log_probs or [], sample.rollout_log_probs or []
    return sum(t - s for t, s in zip(teacher, student, strict=True)) / max(1, len(teacher))


def _rollout_metrics(groups: list[Group], spent: dict[str, float], world: World) -> dict[str, float]:
    metrics = {k: v for k, v in group_metrics(groups).items() if k.startswith("rollout/") or k in _JUDGED}
    spent = {name: world.largest(seconds) for name, seconds in spent.items()}
    per_second = metrics["rollout/tokens"] / max(1e-9, spent["time/rollout"])
    return {**metrics, **spent, "rollout/tokens_per_second": per_second}


def _metrics(result: StepResult) -> dict[str, float]:
    sums = result.sums
    tokens = max(1.0, sums["tokens"])
    return {
        **mismatch_metrics(sums, result.maxima),
        **result.routing,
        "distill/reverse_kl": sums["kl_k1"] / tokens,
        "distill/reverse_kl_k3": sums["kl_k3"] / tokens,
        "loss/total": sums["loss"],
        "policy/entropy": sums["entropy"] / tokens,
        "optim/grad_norm": result.grad_norm,
        "optim/lr": result.lr,
    }
