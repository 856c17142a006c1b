"""Values of a reward model: those of the training objective's own forward, whatever shares a row, and cut answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_r1.checkpoint import folders
from megatron_r1.checkpoint import io as checkpoint_io
from megatron_r1.config.data import PairsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, TokenizerConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.data.preference_pairs import PreferencePairs
from megatron_r1.data.tokenizers import Tokenizer, build_tokenizer
from megatron_r1.model.presets import Architecture, architecture
from megatron_r1.model.scalar_head import HEAD
from megatron_r1.parallel.world import World
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.reward_objective import RewardObjective
from megatron_r1.train.reward_scoring import RewardScorer
from megatron_r1.train.trainer import Trainer

TEMPLATE = "Q: {prompt} A: "
POSITIONS = 64
TEXTS = [("1+2=?", "3", "three, or <answer>3</answer>"), ("9-4=?", "5.", "4"), ("7=?", "seven " * 5, "7")]


@dataclass(frozen=True)
class Trained:
    """A reward model of a stage, with its checkpoint."""

    trainer: Trainer
    checkpoint: Path
    model: ModelConfig
    arch: Architecture
    tokenizer: Tokenizer

    def scorer(self, world: World, checkpoint: Path | None = None, micro_batch_tokens: int = 4096) -> RewardScorer:
        return RewardScorer.load(
            checkpoint or self.checkpoint,
            self.model,
            self.arch,
            world,
            self.tokenizer,
            template=TEMPLATE,
            micro_batch_tokens=micro_batch_tokens,
            packed=True,
            parked=True,
        )


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = build_tokenizer(TokenizerConfig(kind="char"))
    model = ModelConfig(preset="tiny-dense", override={"max_position_embeddings": POSITIONS})
    arch = architecture(model, tokenizer.vocab_size)
    trainer = Trainer(arch, model, world, OptimizerConfig(lr=1e-3), 10, train_mtp=False, scalar_head=True)
    head = trainer.models[0].scalar_head.weight
    head.data.copy_(0.1 * torch.randn(head.shape, generator=torch.Generator().manual_seed(5)))
    checkpoint_io.save(folder / "checkpoints", trainer, {}, None, keep=1)
    return Trained(trainer, folder / "checkpoints" / "step-00000000", model, arch, tokenizer)


def test_values_are_those_of_training(trained: Trained, world: World, tmp_path: Path) -> None:
    """Row by row: the sums of the stage's own objective on a pair from a file, one pair a batch."""
    file = tmp_path / "pairs.jsonl"
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in TEXTS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = PreferencePairs(PairsConfig(path=file, template=TEMPLATE), trained.tokenizer)
    scorer = trained.scorer(world)
    written = [scorer.sequence(question, answer) for question, *answers in TEXTS for answer in answers]
    assert not any(cut for _, cut in written)
    values = scorer.values([sample for sample, _ in written])
    batcher = Batcher(world, 4096, pad_id=0, together=2)
    for number in range(len(TEXTS)):
        pair = pairs[number]
        assert [sample.token_ids for sample, _ in written[2 * number : 2 * number + 2]] == [
            pair.chosen.token_ids,
            pair.rejected.token_ids,
        ]
        tokens = len(pair.chosen.token_ids) + len(pair.rejected.token_ids)
        sums = trained.trainer.measure(batcher([pair.chosen, pair.rejected]), RewardObjective(1, tokens, world))
        found = values[2 * number : 2 * number + 2]
        assert found == pytest.approx([sums["chosen"], sums["rejected"]], abs=1e-6)
    assert len({round(value, 3) for value in values}) == len(values), "all differ, or the test shows nothing"


def test_what_shares_a_micro_batch_does_not_matter(trained: Trained, world: World) -> None:
    samples = [trained.scorer(world).sequence(q, a)[0] for q, *answers in TEXTS for a in answers]
    together = trained.scorer(world).values(samples)
    apart = trained.scorer(world, micro_batch_tokens=1).values(samples)
    backwards = trained.scorer(world).values(samples[::-1])[::-1]
    assert apart == pytest.approx(together, abs=1e-6)
    assert backwards == pytest.approx(together, abs=1e-6)
    assert trained.scorer(world).values([]) == []


def test_a_long_answer_is_cut_and_keeps_its_end(trained: Trained, world: World) -> None:
    scorer = trained.scorer(world)
    whole, cut = scorer.sequence("1=?", "x" * 200)
    prompt = trained.tokenizer.encode("Q: 1=? A: ")
    room = POSITIONS - len(prompt) - 1
    assert cut and whole.token_ids == [*prompt, *trained.tokenizer.encode("x" * room), trained.tokenizer.eos_id]
    fits, longer = scorer.sequence("1=?", "x" * room)
    assert not longer and fits.token_ids == whole.token_ids
    assert scorer.values([whole]) == scorer.values([fits])
    question, cut = scorer.sequence("x" * 100, "yes")
    assert cut and len(question.token_ids) == POSITIONS and question.response_length == 1


def test_only_a_reward_model_scores(trained: Trained, world: World, tmp_path: Path) -> None:
    assert folders.HEAD == HEAD
    language_model = Trainer(trained.arch, trained.model, world, OptimizerConfig(lr=1e-3), 10)
    checkpoint_io.save(tmp_path, language_model, {}, None, keep=1)
    for path in (folders.folder(tmp_path, 0), tmp_path):
        with pytest.raises(UserError, match=r"holds no reward model: .* no scalar head .*kind \"reward_model\""):
            trained.scorer(world, path)
