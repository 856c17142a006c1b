"""PolicyModel: logits without a query, log-probs of chosen tokens with one, whatever the extra prediction layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from tests.reference.log_probs import slow_log_probs

VOCAB = 96
TOKENS = torch.arange(2, 26).reshape(2, 12)
POSITIONS = torch.arange(12).expand(2, 12)
LABELS = TOKENS.flip(1)


def build(world: World, preset: str, **fields: object) -> torch.nn.Module:
    from megatron_r1.model.build import build_model

    config = ModelConfig(preset=preset, **fields)
    return build_model(architecture(config, VOCAB), config, world)[0].eval()


INDEX = torch.tensor([0, 5, 7, 11, 12, 20])  # flat positions b * 12 + t, in both rows


def query(labels: torch.Tensor = LABELS, **fields: Any) -> Any:
    from megatron_r1.model.gpt import TokenQuery

    return TokenQuery(INDEX, labels.flatten()[INDEX], **fields)


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-dense"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_query_gives_log_probs_and_entropy_of_the_logits(world: World, preset: str, temperature: float) -> None:
    model = build(world, preset)
    with torch.no_grad():
        logits = model(TOKENS, POSITIONS, None)
        log_probs, entropy = model(TOKENS, POSITIONS, None, query=query(temperature=temperature))
    assert logits.shape == (2, 12, VOCAB)
    expected = slow_log_probs(logits, LABELS, VOCAB, temperature)
    torch.testing.assert_close(log_probs.double(), expected[0].flatten()[INDEX], rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy.double(), expected[1].flatten()[INDEX], rtol=0, atol=5e-6)


def test_the_padding_of_the_vocabulary_does_not_count(world: World) -> None:
    model = build(world, "tiny-dense")
    model.unpadded_vocab = 60
    labels = LABELS.clamp(max=59)
    with torch.no_grad():
        logits = model(TOKENS, POSITIONS, None)
        log_probs, _ = model(TOKENS, POSITIONS, None, query=query(labels))
    expected, _ = slow_log_probs(logits, labels, 60, 1.0)
    torch.testing.assert_close(log_probs.double(), expected.flatten()[INDEX], rtol=0, atol=5e-6)


def test_the_look_ahead_loss_is_megatron_s_own(world: World) -> None:
    """Megatron's forward with labels adds the multi-token-prediction loss's gradient to the trunk's."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    model = build(world, "tiny-moe").train()
    labels = torch.cat([TOKENS[:, 1:], torch.zeros(2, 1, dtype=torch.int64)], dim=1)
    mask = torch.ones(2, 12)
    mask[:, :4] = mask[:, -1] = 0
    model.config.mtp_loss_scaling_factor = 0.3
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    stock = GPTModel._postprocess  # the one that PolicyModel replaces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "_postprocess", stock)
        (model(TOKENS, POSITIONS, None, labels=labels, loss_mask=mask) * mask).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    learned = mask.flatten().nonzero()[:, 0]
    ahead = learned[(learned % 12) >= 1] - 1
    from megatron_r1.model.gpt import TokenQuery

    asked = TokenQuery(learned, labels.flatten()[learned], ahead=((ahead, labels.flatten()[ahead + 1]),))
    log_probs, _ = model(TOKENS, POSITIONS, None, query=asked)
    (-log_probs[: len(learned)].sum() - 0.3 * log_probs[len(learned) :].sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and any(name.startswith("mtp.") for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_detached_look_ahead_trains_only_its_own_layers(world: World, recompute: str) -> None:
    model = build(world, "tiny-moe", recompute=recompute).train()
    ahead = ((INDEX[1:2], LABELS.flatten()[INDEX[1:2]]),)
    output = model(TOKENS, POSITIONS, None, query=query(ahead=ahead, detach_ahead=True))
    output[0, len(INDEX) :].sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(name.startswith("mtp.") for name in touched)
    assert any("eh_proj" in name for name in touched) and any("self_attention" in name for name in touched)
    with torch.no_grad():  # and it leaves the policy's own log-probs alone
        assert torch.equal(output[:, : len(INDEX)], model(TOKENS, POSITIONS, None, query=query()))


def test_prediction_layers_leave_the_logits_alone(world: World) -> None:
    with_layers = build(world, "tiny-moe", mtp=True)
    without = build(world, "tiny-moe", mtp=False)
    weights = {k: v for k, v in with_layers.state_dict().items() if not k.startswith("mtp.")}
    assert weights.keys() == without.state_dict().keys() and len(weights) < len(with_layers.state_dict())
    without.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(with_layers(TOKENS, POSITIONS, None), without(TOKENS, POSITIONS, None))


def test_logits_can_be_trained_without_the_prediction_layers(world: World) -> None:
    model = build(world, "tiny-moe", mtp=True)
    model(TOKENS, POSITIONS, None).logsumexp(-1).sum().backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    assert untouched and all(".experts." in name or name.startswith("mtp.") for name in untouched)
    assert {name for name, _ in model.named_parameters() if name.startswith("mtp.")} <= untouched


def test_the_vocabulary_is_padded_to_equal_shares() -> None:
    from megatron_r1.model.build import padded_vocab

    assert [padded_vocab({"vocab_size": 101}, size) for size in (1, 2, 4, 8)] == [101, 102, 104, 104]


def test_experts_are_marked_so_that_layouts_can_exchange_optimizer_state(world: World) -> None:
    marks = {name: getattr(p, "allreduce", True) for name, p in build(world, "tiny-moe").named_parameters()}
    assert {name for name, mark in marks.items() if not mark} == {name for name in marks if ".experts." in name}


def test_freshly_drawn_experts_all_differ(world: World) -> None:
    model = build(world, "tiny-moe")
    experts = [p for name, p in model.named_parameters() if ".experts." in name and "linear_fc1" in name]
    assert len(experts) >= 8
    assert len({p.detach().numpy().tobytes() for p in experts}) == len(experts)
    std = architecture(ModelConfig(preset="tiny-moe"), VOCAB)["initializer_range"]
    assert torch.stack(experts).std().item() == pytest.approx(std, rel=0.05)


def test_deepseek_on_a_gpu_without_transformer_engine_names_the_extra(world: World) -> None:
    import dataclasses

    from megatron_r1.config.errors import UserError
    from megatron_r1.model.build import build_model

    model = ModelConfig(preset="tiny-moe")
    on_gpu = dataclasses.replace(world, device=torch.device("cuda"))
    with pytest.raises(UserError, match=r"pip install 'megatron-r1\[gpu\]'"):
        build_model(architecture(model, 96), model, on_gpu)
