"""On-policy distillation: the expected gradient is that of the reverse KL divergence; a step against full logits."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1.algorithms.policy_loss import policy_loss
from megatron_r1.algorithms.weights import Denominators, token_weights
from megatron_r1.config.model import ModelConfig, TokenizerConfig
from megatron_r1.config.optim import OptimizerConfig, SamplingConfig
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.model.parked import Parked
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.types import Completion, Group, Prompt, Sample
from tests.reference.log_probs import slow_log_probs

VOCAB, LENGTH = 3, 2
CHAR = build_tokenizer(TokenizerConfig(kind="char"))


class Toy:
    """Two-token sequences over three tokens: a distribution for the first, one for each second after a first."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.first = torch.randn(VOCAB, generator=draw, dtype=torch.float64).requires_grad_()
        self.second = torch.randn(VOCAB, VOCAB, generator=draw, dtype=torch.float64).requires_grad_()

    def log_probs(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """[LENGTH] of one sequence."""
        a, b = tokens
        return torch.stack([self.first.log_softmax(0)[a], self.second[a].log_softmax(0)[b]])


def test_the_expected_gradient_is_that_of_the_reverse_kl() -> None:
    """Every sequence, weighted by its probability; the prefix's own probability is not differentiated."""
    from megatron_r1.train.distill import REVERSE_KL

    student, teacher = Toy(1), Toy(2)
    parameters = [student.first, student.second]
    mask, zero = torch.ones(1, LENGTH), torch.zeros(1, dtype=torch.float64)
    one = Denominators(sequences=1, tokens=LENGTH)
    expected = [torch.zeros_like(p) for p in parameters]
    value = {"kl_k1": 0.0, "kl_k3": 0.0}
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        log_probs = student.log_probs(tokens)
        probability = float(log_probs.sum().exp().detach())
        weights = token_weights(mask, torch.tensor([LENGTH]), one, REVERSE_KL, dtype=torch.float64)
        reference = teacher.log_probs(tokens).detach()[None]
        result = policy_loss(log_probs[None], None, zero, mask, weights, REVERSE_KL, reference)
        for total, gradient in zip(expected, torch.autograd.grad(result.loss, parameters), strict=True):
            total += probability * gradient
        for name in value:
            value[name] += probability * float(result.metrics[name]) / LENGTH
    # By definition: KL of the first token, and of the second in each state, reached with the student's probability.
    pairs = [(student.first, teacher.first, 1.0)]
    reached = student.first.softmax(0).detach().tolist()
    pairs += [(student.second[a], teacher.second[a], reached[a]) for a in range(VOCAB)]
    divergence = torch.zeros((), dtype=torch.float64)
    for ours, theirs, weight in pairs:
        p, q = ours.log_softmax(0), theirs.log_softmax(0)
        divergence = divergence + weight * (p.exp() * (p - q)).sum()
    exact = torch.autograd.grad(divergence / LENGTH, parameters)
    for found, wanted in zip(expected, exact, strict=True):
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    # Both estimates that are logged are unbiased.
    assert value == pytest.approx({name: float(divergence.detach()) / LENGTH for name in value}, rel=1e-12)


def model_of(preset: str) -> tuple[ModelConfig, dict[str, Any]]:
    model = ModelConfig(preset=preset)
    return model, architecture(model, CHAR.vocab_size)


def samples() -> list[Sample]:
    texts = [("3+4=?", "7"), ("Why?", "<think>3,4</think>"), ("1-9=?", "-8, I think")]
    made = []
    for question, answer in texts:
        ids = CHAR.encode(question)
        made.append(Sample(token_ids=[*ids, *CHAR.encode(answer), CHAR.eos_id], prompt_length=len(ids)))
    return made


def slow(model: Any, sample: Sample, temperature: float) -> torch.Tensor:
    """[R] log-probs of the response from the full logits of the sequence alone, differentiable."""
    ids = sample.token_ids
    logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], None)
    targets = torch.tensor([ids[sample.prompt_length :]])
    return slow_log_probs(logits[:, sample.prompt_length - 1 : -1], targets, CHAR.vocab_size, temperature)[0][0]


@pytest.mark.parametrize("memory", ["host", "device"])
def test_a_step_follows_the_teacher_of_another_architecture(
    world: World, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    """The teacher's log-probs, the loss and every gradient, against full logits of both models."""
    from megatron_r1.train import distill
    from megatron_r1.train.micro_batches import Batcher
    from megatron_r1.train.trainer import Trainer

    temperature = 0.8
    model, arch = model_of("tiny-dense")
    trainer = Trainer(arch, model, world, OptimizerConfig(lr=1e-3, clip_grad=0.0), steps=2)
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=20)
    fields = {"name": "d", "teacher": "t", "teacher_model": "big", "teacher_memory": memory}
    stage: Any = SimpleNamespace(**fields, sampling=sampling, micro_batch_tokens=40, packing=True)
    monkeypatch.setattr(distill, "load_start", lambda path, model: None)  # its fresh weights do
    context = _Context(world)
    teacher = distill.Teacher(stage, context)  # type: ignore[arg-type]
    learned = samples()
    teacher.annotate(learned)
    with torch.no_grad():
        expected = [slow(teacher.model.models[0], sample, temperature) for sample in learned]
    for sample, values in zip(learned, expected, strict=True):
        found = torch.tensor(sample.reference_log_probs, dtype=torch.float64)
        torch.testing.assert_close(found, values, rtol=0, atol=1e-5)

    bare = trainer.models[0]
    gaps = torch.cat([slow(bare, s, temperature) - q for s, q in zip(learned, expected, strict=True)])
    loss = (gaps.square() / 2).mean()
    gradients = torch.autograd.grad(loss, list(bare.parameters()))
    result, _ = distill._optimize(learned, stage, trainer, Batcher(world, 40, 0))
    assert result.sums["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    metrics = distill._metrics(result)
    assert metrics["distill/reverse_kl"] == pytest.approx(float(gaps.mean().detach()), rel=1e-4)
    k3 = float((torch.expm1(-gaps) + gaps).mean().detach())
    assert metrics["distill/reverse_kl_k3"] == pytest.approx(k3, rel=1e-4)
    for (name, parameter), gradient in zip(bare.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.main_grad, gradient, rtol=1e-3, atol=2e-5, msg=name)


class _Context:
    """What a teacher asks of the run's context."""

    def __new__(cls, world: World) -> Any:
        from megatron_r1.train.context import RunContext

        model, arch = model_of("tiny-dense")
        config: Any = SimpleNamespace(models={"big": ModelConfig(preset="tiny-moe")}, model=model)
        unused: Any = None
        return RunContext(
            config=config,
            arch=arch,
            model=model,
            world=world,
            tokenizer=CHAR,
            run=unused,
            stop=unused,
            heldout=frozenset(),
            attempt=1,
            checkpoint=lambda source: unused,
        )


def test_a_parked_model_is_on_the_device_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every move is a copy here, as between two memories: one into the host's, one for each block."""
    linear = torch.nn.Linear(3, 2)
    linear.register_buffer("count", torch.tensor([5.0]))
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    original = places(linear)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self.clone())
    parked = Parked([linear], torch.device("cpu"))
    host = places(linear)
    assert not set(host) & set(original)
    with pytest.raises(RuntimeError, match="inside"), parked.in_place():
        assert not set(places(linear)) & set(host)
        assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
        raise RuntimeError("inside")
    assert places(linear) == host
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())


def places(module: torch.nn.Module) -> list[int]:
    return [value.data_ptr() for value in module.state_dict().values()]


def test_what_the_teacher_thinks_of_a_completion() -> None:
    from megatron_r1.train.distill import _advantages

    prompt = Prompt(id="p", question="?", text="?", token_ids=[5], answer="7", verifier="integer")
    completions = [completion([7, 8]), completion([9])]
    made = [
        Sample(token_ids=[5, 7, 8], prompt_length=1, rollout_log_probs=[-1.0, -2.0], reference_log_probs=[-2.0, -5.0]),
        Sample(token_ids=[5, 9], prompt_length=1, rollout_log_probs=[-3.0], reference_log_probs=[-0.5]),
    ]
    assert _advantages([Group(prompt=prompt, completions=completions)], made) == [[-2.0, 2.5]]


def completion(ids: list[int], text: str = "") -> Completion:
    return Completion(
        token_ids=ids, log_probs=[-1.0] * len(ids), finish_reason="stop", weight_versions=(0, 0), text=text
    )


def test_prompts_without_a_verifier_have_no_accuracy(world: World) -> None:
    from megatron_r1.rewards.workers import VerifierPool
    from megatron_r1.train.distill import _judge, _rollout_metrics

    texts = ["<think>a</think><answer>7</answer>", "<answer>8</answer>"]
    groups = []
    for verifier in ("integer", "none"):
        prompt = Prompt(id=verifier, question="?", text="?", token_ids=[5], answer="7", verifier=verifier)
        groups.append(Group(prompt=prompt, completions=[completion([7, 8, 9], text) for text in texts]))
    with VerifierPool(1) as pool:
        _judge(pool, groups)
    spent = {"time/rollout": 2.0, "time/reward": 0.5}
    mixed = _rollout_metrics(groups, spent, world)
    assert (mixed["reward/accuracy"], mixed["reward/format"]) == (0.5, 0.5)
    assert (mixed["rollout/tokens"], mixed["rollout/tokens_per_second"], mixed["time/reward"]) == (12, 6.0, 0.5)
    alone = _rollout_metrics(groups[1:], spent, world)
    assert "reward/accuracy" not in alone and alone["reward/format"] == 0.5
