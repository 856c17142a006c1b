"""PolicyModel: logits without labels, losses with them, whatever the extra prediction layers."""

from __future__ import annotations

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


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-dense"])
def test_labels_give_the_negative_log_probs_of_the_logits(world: World, preset: str) -> None:
    model = build(world, preset)
    with torch.no_grad():
        logits = model(TOKENS, POSITIONS, None)
        losses = model(TOKENS, POSITIONS, None, labels=LABELS, loss_mask=torch.ones(2, 12))
    assert logits.shape == (2, 12, VOCAB)
    expected, _ = slow_log_probs(logits, LABELS, VOCAB, 1.0)
    torch.testing.assert_close(losses.double(), -expected, rtol=0, atol=5e-6)


def test_the_loss_ignores_the_padding_of_the_vocabulary(world: World) -> None:
    model = build(world, "tiny-dense")
    model.unpadded_vocab = 60
    labels = LABELS.clamp(max=59)
    with torch.no_grad():
        logits = model(TOKENS, POSITIONS, None)
        losses = model(TOKENS, POSITIONS, None, labels=labels)
    expected, _ = slow_log_probs(logits, labels, 60, 1.0)
    torch.testing.assert_close(losses.double(), -expected, rtol=0, atol=5e-6)


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
