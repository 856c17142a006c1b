"""What departs from the paper is listed, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.config.departures import PRESET_STUDENTS, Departure, departures
from megatron_r1.config.load import load
from megatron_r1.config.optim import STUDENTS
from megatron_r1.model.presets import preset_names
from tests.unit.config.recipes import MINIMAL, write


def found(folder: Path, *overrides: str) -> dict[str, tuple[str, str]]:
    changes = ["model.precision=fp8-blockwise", *overrides]
    return {d.key: (d.paper, d.here) for d in departures(load(write(folder), changes))}


def test_the_papers_recipe_departs_in_nothing(tmp_path: Path) -> None:
    assert found(tmp_path) == {}


@pytest.mark.parametrize(
    ("key", "value", "paper", "here"),
    [
        ("optimizer.lr", "1e-3", "3e-06", "0.001"),
        ("grpo.loss.kl_coefficient", "0.01", "0.001", "0.01"),
        ("grpo.loss.clip_high", "0.28", "10", "0.28"),
        ("grpo.group_size", "8", "16", "8"),
        ("grpo.prompts", "64", "512", "64"),
        ("grpo.minibatches", "4", "16", "4"),
        ("grpo.epochs", "2", "1", "2"),
        ("grpo.loss.reference_every", "0", "400", "0"),
        ("grpo.loss.aggregation", "token-mean", "sequence-mean", "token-mean"),
        ("grpo.loss.dual_clip", "3.0", "none", "3"),
        ("grpo.loss.ratio", "sequence", "token", "sequence"),
        ("grpo.advantage.scale", "none", "std", "none"),
        ("grpo.no_signal", "drop", "keep", "drop"),
        (
            "grpo.overlong",
            "{max_length=10,buffer=2}",
            "none",
            "max_length = 10, buffer = 2, factor = 1",
        ),
        ("sampling.temperature", "0.7", "1", "0.7"),
        ("sampling.max_new_tokens", "64", "32768", "64"),
        ("sampling.stop", "['x']", "none", "['x']"),
        ("prompts.template", "plain", "r1-zero", "plain"),
        ("grpo.routing_replay", "rollout", "none", "rollout"),
        ("grpo.mtp_loss", "0.1", "0", "0.1"),
        ("grpo.expert_bias", "updated", "frozen", "updated"),
        ("grpo.correction.method", "tis", "none", "tis"),
    ],
)
def test_one_departure_at_a_time(tmp_path: Path, key: str, value: str, paper: str, here: str) -> None:
    assert found(tmp_path, f"stage.1.{key}={value}") == {f"stage.r1.zero.{key}": (paper, here)}


def test_clip_low_moves_both_sides(tmp_path: Path) -> None:
    assert set(found(tmp_path, "stage.1.grpo.loss.clip_low=0.2")) == {
        "stage.r1.zero.grpo.loss.clip_low",
        "stage.r1.zero.grpo.loss.clip_high",
    }


def test_a_kl_term_that_is_off_is_one_departure(tmp_path: Path) -> None:
    off = found(tmp_path, "stage.1.grpo.loss.kl=none", "stage.1.grpo.loss.reference_every=0")
    assert off == {"stage.r1.zero.grpo.loss.kl": ("k3", "none")}
    zero = found(tmp_path, "stage.1.grpo.loss.kl_coefficient=0.0", "stage.1.grpo.loss.reference_every=0")
    assert zero == {"stage.r1.zero.grpo.loss.kl_coefficient": ("0.001", "0")}


def test_only_the_proportion_of_the_reward_weights_matters(tmp_path: Path) -> None:
    both = [f"stage.1.reward.{i}.weight=0.5" for i in (0, 1)]
    assert found(tmp_path, *both) == {}
    assert found(tmp_path, both[1]) == {
        "stage.r1.zero.reward": ("accuracy x 1, format x 1", "accuracy x 1, format x 0.5")
    }
    alone = MINIMAL.replace('[[stage.reward]]\nkind = "format"\n', "")
    path = write(tmp_path, alone, "alone.toml")
    assert [d.here for d in departures(load(path))] == ["fp32", "accuracy x 1"]


def test_precision_is_compared_where_there_is_reinforcement_learning(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp8-emulated"):
        here = found(tmp_path, f"model.precision={precision}")
        assert here == {"model.precision": ("fp8-blockwise", precision)}
    start, _, rest = MINIMAL.partition('[[stage]]\nkind = "grpo"')
    only_pretraining = write(tmp_path, start, "pretraining.toml")
    assert rest and departures(load(only_pretraining)) == []


def test_evaluation_is_compared_with_the_papers_evaluation(tmp_path: Path) -> None:
    assert found(tmp_path, "stage.final.sampling.temperature=1.0") == {"stage.final.sampling.temperature": ("0.6", "1")}


SFT = """
name = "demo"
model.preset = "deepseek-v3"
tokenizer.kind = "byte"

[[stage]]
kind = "sft"
name = "mix"
epochs = 2
data = { source = "jsonl", path = "mix.jsonl" }
"""


def fine_tuning(folder: Path, *overrides: str) -> dict[str, tuple[str, str]]:
    return {d.key: (d.paper, d.here) for d in departures(load(write(folder, SFT), overrides))}


def test_the_papers_fine_tuning_departs_in_nothing(tmp_path: Path) -> None:
    assert fine_tuning(tmp_path) == fine_tuning(tmp_path, "stage.mix.epochs=2.5") == {}
    stage = load(write(tmp_path, SFT)).stage[0]
    assert stage.kind == "sft"
    assert (stage.optimizer.lr, stage.optimizer.min_lr, stage.optimizer.schedule) == (5e-5, 5e-6, "cosine")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optimizer.lr", "1e-3", {"optimizer.lr": ("5e-05", "0.001")}),  # the floor follows: a tenth of it
        ("optimizer.min_lr", "0.0", {"optimizer.min_lr": ("5e-06", "0")}),
        ("optimizer.schedule", "constant", {"optimizer.schedule": ("cosine", "constant")}),
        ("batch", "64", {"batch": ("128", "64")}),
        ("max_length", "4096", {"max_length": ("32768", "4096")}),
        ("epochs", "1", {"epochs": ("2 to 3", "1")}),
        ("epochs", "3.5", {"epochs": ("2 to 3", "3.5")}),
    ],
)
def test_one_departure_of_fine_tuning(
    tmp_path: Path, key: str, value: str, expected: dict[str, tuple[str, str]]
) -> None:
    found = fine_tuning(tmp_path, f"stage.mix.{key}={value}")
    assert found == {f"stage.mix.{name}": values for name, values in expected.items()}


def test_steps_instead_of_epochs_are_a_departure(tmp_path: Path) -> None:
    path = write(tmp_path, SFT.replace("epochs = 2", "steps = 9"))
    assert [str(d) for d in departures(load(path))] == [
        "stage.mix.epochs: steps = 9 (paper: 2 to 3; R1's fine-tunings and distillation)"
    ]


def test_a_student_is_compared_with_its_distillation(tmp_path: Path) -> None:
    student = ["model.preset=qwen2.5-7b", "stage.mix.batch=64", "stage.mix.optimizer={lr=8e-5}"]
    assert fine_tuning(tmp_path, *student) == {}
    found = fine_tuning(tmp_path, student[0])
    assert found == {"stage.mix.batch": ("64", "128"), "stage.mix.optimizer.lr": ("8e-05", "5e-05")}


def test_a_named_student_departs_in_nothing(tmp_path: Path) -> None:
    """Whatever the preset, and also where it belongs to a table of its own."""
    assert fine_tuning(tmp_path, 'stage.mix.student="llama-70b"') == {}
    assert fine_tuning(tmp_path, 'stage.mix.student="qwen-1.5b"', "model.preset=llama-3.1-8b") == {}
    found = fine_tuning(
        tmp_path, 'stage.mix.student="qwen-14b"', "stage.mix.optimizer={lr=5e-5}", "stage.mix.batch=128"
    )
    assert found == {"stage.mix.batch": ("64", "128"), "stage.mix.optimizer.lr": ("7e-05", "5e-05")}
    apart = ['models.small.preset="llama-3.1-8b"', 'stage.mix.model="small"']
    assert fine_tuning(tmp_path, *apart) == {"stage.mix.batch": ("64", "128")}  # its rate is that of V3-Base


def test_every_student_has_a_preset_and_the_papers_rate(tmp_path: Path) -> None:
    assert set(PRESET_STUDENTS.values()) == set(STUDENTS) and set(PRESET_STUDENTS) <= set(preset_names())
    for preset, student in PRESET_STUDENTS.items():
        key = f'stage.mix.student="{student}"'
        assert fine_tuning(tmp_path, key, f"model.preset={preset}") == {}


SECOND = (
    '[{kind="accuracy",domains=["reasoning"]},{kind="format"},{kind="language"},'
    '{kind="model",name="helpful",from="./rm",domains=["helpful"],last_steps=400},'
    '{kind="model",name="harmless",from="./rm",domains=["harmless"],last_steps=400}]'
)
SUMS = 'source="generator",task="chain_sum",template="deepseek"'
GENERAL = f'[{{{SUMS}}},{{{SUMS},domain="helpful"}},{{{SUMS},domain="harmless"}}]'


def test_the_second_rl_stage_is_compared_with_the_papers(tmp_path: Path) -> None:
    keys = [f"stage.1.prompts={GENERAL}", f"stage.1.reward={SECOND}"]
    assert found(tmp_path, *keys, "stage.1.sampling.temperature=0.7") == {}
    assert found(tmp_path, *keys) == {"stage.r1.zero.sampling.temperature": ("0.7", "1")}
    always = keys[1].replace(",last_steps=400}]", "}]")
    assert found(tmp_path, keys[0], always, "stage.1.sampling.temperature=0.7") == {
        "stage.r1.zero.reward.harmless.last_steps": ("400", "none")
    }


def test_each_source_of_prompts_is_compared(tmp_path: Path) -> None:
    two = '[{source="generator",task="chain_sum"},{source="generator",task="chain_sum",template="plain"}]'
    assert found(tmp_path, f"stage.1.prompts={two}") == {"stage.r1.zero.prompts.1.template": ("r1-zero", "plain")}


def test_a_departure_reads_as_a_sentence() -> None:
    departure = Departure(key="stage.a.optimizer.lr", paper="3e-06", here="0.001", why="reason")
    assert str(departure) == "stage.a.optimizer.lr: 0.001 (paper: 3e-06; reason)"


CHAT = 'stage.1.prompts.template="deepseek"'


def test_the_template_of_later_rl_stages_is_the_chat_formats(tmp_path: Path) -> None:
    """R1-Zero's is that of table 1; the stages after the cold start answer in DeepSeek's chat format."""
    language = 'stage.1.reward=[{kind="accuracy"},{kind="language"}]'
    assert found(tmp_path, language) == {"stage.r1.zero.prompts.template": ("deepseek", "r1-zero")}
    assert found(tmp_path, CHAT) == {"stage.r1.zero.prompts.template": ("r1-zero", "deepseek")}


def test_reward_models_are_weighed_one_by_one(tmp_path: Path) -> None:
    """The weight of the first would be hidden behind the last one's."""
    keys = [f"stage.1.prompts={GENERAL}", "stage.1.sampling.temperature=0.7"]
    reward = SECOND.replace('name="helpful",', 'name="helpful",weight=3.0,')
    assert found(tmp_path, *keys, f"stage.1.reward={reward}") == {
        "stage.r1.zero.reward": (
            "accuracy x 1, format x 1, language x 1, helpful x 1, harmless x 1",
            "accuracy x 1, format x 1, language x 1, helpful x 3, harmless x 1",
        )
    }


def test_a_reward_model_beside_the_rule_is_a_departure(tmp_path: Path) -> None:
    keys = [f"stage.1.prompts={GENERAL}", "stage.1.sampling.temperature=0.7"]
    reward = SECOND.replace('domains=["helpful"]', 'domains=["helpful","reasoning"]')
    assert found(tmp_path, *keys, f"stage.1.reward={reward}") == {
        "stage.r1.zero.reward.helpful.domains": ("those without the accuracy reward", "reasoning too")
    }


REWARD_MODELS = """
name = "demo"
model.preset = "deepseek-v3"
tokenizer.kind = "byte"

[[stage]]
kind = "preferences"
name = "pairs"
from = "./dev3"
prompts = { source = "jsonl", path = "helpful.jsonl", verifier = "none" }
judge = { server = { url = "http://x:1/v1", model = "m" } }

[[stage]]
kind = "preferences"
name = "labels"
form = "labels"
sees = "response"
from = "./dev3"
votes = 1
prompts = { source = "jsonl", path = "safety.jsonl", verifier = "none" }
judge = { server = { url = "http://x:1/v1", model = "m" } }

[[stage]]
kind = "reward_model"
name = "rm"
from = "./dev3"
epochs = 1
optimizer = { lr = 6e-6 }
pairs = { stage = "pairs" }
"""


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("seed=1", {}),
        ("stage.rm.optimizer.lr=1e-5", {"rm.optimizer.lr": ("6e-06", "1e-05")}),
        ("stage.rm.batch=64", {"rm.batch": ("256", "64")}),
        ("stage.rm.max_length=4096", {"rm.max_length": ("8192", "4096")}),
        ("stage.rm.epochs=2", {"rm.epochs": ("1", "2")}),
        ("stage.pairs.votes=1", {"pairs.votes": ("4", "1")}),
        ("stage.pairs.margin=0", {"pairs.margin": ("1", "0")}),
        ("stage.pairs.balance_length=false", {"pairs.balance_length": ("true", "false")}),
        ('stage.pairs.sees="response"', {"pairs.sees": ("summary", "response")}),
        ('stage.labels.sees="summary"', {"labels.sees": ("response", "summary")}),
    ],
)
def test_reward_models_and_their_data(tmp_path: Path, key: str, expected: dict[str, tuple[str, str]]) -> None:
    listed = {d.key: (d.paper, d.here) for d in departures(load(write(tmp_path, REWARD_MODELS), [key]))}
    assert listed == {f"stage.{name}": values for name, values in expected.items()}


def test_the_first_rl_stages_rewards_are_the_papers(tmp_path: Path) -> None:
    """Accuracy + language (R1's first version), or with the format that belongs to the rule rewards."""
    two = '{kind="accuracy"},{kind="language",default_language="zh",han_per_word=1.5}'
    for reward in (f"[{two}]", f'[{two},{{kind="format"}}]'):
        assert found(tmp_path, f"stage.1.reward={reward}", CHAT) == {}


@pytest.mark.parametrize("reward", ['[{kind="accuracy"},{kind="language",weight=0.5}]', '[{kind="language"}]'])
def test_other_language_rewards_depart(tmp_path: Path, reward: str) -> None:
    ((key, (paper, _)),) = found(tmp_path, f"stage.1.reward={reward}", CHAT).items()
    assert (key, paper) == ("stage.r1.zero.reward", "accuracy x 1, language x 1")
