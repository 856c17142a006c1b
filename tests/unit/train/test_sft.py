"""The loss of fine-tuning against a masked cross-entropy written out by hand, and against its gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_r1.config.model import ModelConfig, TokenizerConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.config.stages import SftStage
from megatron_r1.data.batching import make_micro_batches
from megatron_r1.data.conversations import ConversationBatches, open_batches
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from tests.reference.log_probs import slow_log_probs

CHAR = build_tokenizer(TokenizerConfig(kind="char"))
TALK = [("3+4=?", "7"), ("Why?", "<think>3,4</think><answer>7</answer>"), ("Thanks", "You are welcome.")]


def batches(folder: Path) -> ConversationBatches:
    """Conversations of 1, 2 and 3 turns."""
    rows = []
    for turns in (1, 2, 3):
        messages = []
        for question, answer in TALK[:turns]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"source": "jsonl", "path": path, "shuffle": False}
    stage = SftStage(name="s", kind="sft", steps=1, format="r1", template="plain", data=data)
    return open_batches(stage, CHAR, 128)


def expected_loss(model: torch.nn.Module, turns_at: tuple[int, ...] = (1, 2, 3)) -> torch.Tensor:
    """Mean over all answers' characters and ends, from the full logits of each conversation alone."""
    losses = []
    for turns in turns_at:
        ids: list[int] = []
        learned: list[int] = []
        for question, answer in TALK[:turns]:
            ids += CHAR.encode(question)
            said = [*CHAR.encode(answer), CHAR.eos_id]
            learned += range(len(ids), len(ids) + len(said))
            ids += said
        logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], None)
        log_probs = slow_log_probs(logits[:, :-1], torch.tensor([ids[1:]]), CHAR.vocab_size, 1.0)[0][0]
        losses.append(-log_probs[[place - 1 for place in learned]])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 90, 10_000])
def test_the_loss_is_the_mean_over_all_learned_tokens(
    world: World, tmp_path: Path, packed: bool, max_tokens: int
) -> None:
    from megatron_r1.train.language_model import heldout_loss
    from megatron_r1.train.micro_batches import Batcher
    from megatron_r1.train.objectives import LanguageModelObjective
    from megatron_r1.train.trainer import Trainer

    model = ModelConfig(preset="tiny-dense")
    arch = architecture(model, CHAR.vocab_size)
    trainer = Trainer(arch, model, world, OptimizerConfig(lr=1e-3, clip_grad=0.0), steps=2)
    bare = trainer.models[0]
    loss = expected_loss(bare)
    gradients = torch.autograd.grad(loss, list(bare.parameters()))
    samples = batches(tmp_path).take(3)
    held = heldout_loss(samples, trainer, Batcher(world, max_tokens, 0, packed))
    assert held == pytest.approx(float(loss.detach()), rel=1e-5)
    result = trainer.train_step(
        make_micro_batches(samples, max_tokens, 0, packed=packed)[0], LanguageModelObjective(0.1)
    )
    assert result.sums["tokens"] == 2 + (2 + 9) + (2 + 9 + 17)  # answers, ends, tags of one token each
    assert result.sums["nll"] / result.sums["tokens"] == pytest.approx(float(loss.detach()), rel=1e-5)
    # No mean of the conversations' own means.
    each = sum(float(expected_loss(bare, (turns,)).detach()) for turns in (1, 2, 3)) / 3
    assert each != pytest.approx(float(loss.detach()), rel=1e-3)
    for (name, parameter), gradient in zip(bare.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.main_grad, gradient, rtol=1e-4, atol=2e-6, msg=name)
