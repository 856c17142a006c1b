"""A recipe is read, overridden, checked and written back; every mistake is named with its cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.load import dump, load
from tests.unit.config.recipes import MINIMAL, write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, list(overrides))
    return str(caught.value)


def test_values_and_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path))
    assert (config.name, config.seed, config.stage[0].steps) == ("demo", 1234, 5)
    assert config.stage[1].grpo.group_size == 16
    assert config.stage[2].sampling.temperature == 0.6


def test_overrides_use_toml_values_names_and_indices(tmp_path: Path) -> None:
    config = load(
        write(tmp_path),
        [
            "seed=7",
            "stage.r1.zero.grpo.prompts=32",  # the stage's name holds a dot
            "stage.0.optimizer.lr=1e-6",
            "stage.1.grpo.loss.clip_high=0.28",
            "stage.final.sampling.stop=['a', \"b=c\"]",
            "name=bare-string",
            "model.megatron.moe_router_dtype=fp64",
            "stage.r1.zero.reward.1.weight=0.5",
            "seed=8",  # the last one holds
        ],
    )
    assert config.seed == 8
    assert config.stage[1].grpo.prompts == 32
    assert config.stage[0].optimizer.lr == 1e-6
    assert config.stage[1].grpo.loss.epsilon_high == 0.28
    assert config.stage[2].sampling.stop == ["a", "b=c"]
    assert config.name == "bare-string"
    assert config.model.megatron == {"moe_router_dtype": "fp64"}
    assert [reward.weight for reward in config.stage[1].reward] == [1.0, 0.5]


def test_dump_round_trip_from_another_folder(tmp_path: Path) -> None:
    recipe = MINIMAL.replace('name = "r1.zero"', 'name = "r1.zero"\nfrom = "../weights/step-5"')
    config = load(
        write(tmp_path, recipe),
        ["stage.1.grpo.loss.clip_low=inf", "stage.1.prompts.options={a=[1,'x']}"],
    )
    elsewhere = tmp_path / "run"
    elsewhere.mkdir()
    again = load(write(elsewhere, dump(config), "resolved.toml"))
    assert again == config
    assert dump(again) == dump(config)
    assert 'from = "' in dump(config)
    assert "init_from" not in dump(config)


def test_paths_are_relative_to_the_file_or_for_overrides_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = 'source = "jsonl"\npath = "data/train.jsonl"'
    recipe = MINIMAL.replace('source = "generator"\ntask = "chain_sum"', files, 1)
    (tmp_path / "recipes").mkdir()
    path = write(tmp_path / "recipes", recipe)
    monkeypatch.chdir(tmp_path)
    assert load(path).stage[1].prompts[0].path == tmp_path / "recipes/data/train.jsonl"
    overridden = load(path, ["stage.1.prompts.path=other.jsonl", "stage.1.from=./ckpt"])
    assert overridden.stage[1].prompts[0].path == tmp_path / "other.jsonl"
    assert overridden.stage[1].init_from == str(tmp_path / "ckpt")


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    text = MINIMAL.replace("steps = 16", 'stesp = 16\nsteps = "16"').replace('kind = "format"', 'kind = "formal"')
    lines = message(write(tmp_path, text), "sede=3", "stage.0.optimizer.lr=-1").splitlines()
    assert lines[0].endswith("recipe.toml has 5 mistakes:")
    found = "\n".join(lines)
    assert "recipe.toml, stage.r1.zero.stesp: unknown key; did you mean 'steps'? (allowed here: " in found
    assert 'recipe.toml, stage.r1.zero.steps: expected an integer, got "16" (a string)' in found
    assert "stage.r1.zero.reward.1.kind: got \"formal\" (a string); did you mean 'format'?" in found
    assert "(allowed: accuracy, format, language, model)" in found
    assert "command line, sede: unknown key; did you mean 'seed'?" in found
    assert "command line, stage.base.optimizer.lr: got -1; allowed: > 0" in found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("steps = 5", "steps = 5.5", "stage.base.steps: expected an integer, got 5.5"),
        ("steps = 5", "steps = true", "stage.base.steps: expected an integer, got true"),
        ("steps = 5\n", "", "stage.base.steps: required, but not given: Optimizer steps in all."),
        ('name = "demo"', "name = 3", "name: expected a string in quotes"),
        ('name = "demo"', 'name = "a b"', 'name: got "a b" (a string); allowed: text that matches'),
        ('kind = "grpo"\n', "", "stage.r1.zero: has no `kind`"),
        ('kind = "grpo"', 'kind = "gpro"', "`kind`: got \"gpro\" (a string); did you mean 'grpo'?"),
        ('preset = "tiny-moe"', "", "model: give exactly one of `preset` and `config`"),
        ('name = "final"', 'name = "base"', "two stages are called 'base'"),
        ('task = "chain_sum"', "", "stage.r1.zero.prompts: source 'generator' needs `task`"),
        (
            "steps = 16",
            'steps = 16\nfrom = "bsae"',
            "from: 'bsae' is no stage; did you mean 'base'?",
        ),
        ('[model]\npreset = "tiny-moe"', 'model = "tiny-moe"', "model: expected a table"),
        (
            "lr = 3e-6",
            "lr = 3e-6\ngrpo.minibatches = 7",
            "minibatches (7) must divide prompts x group_size = 8192",
        ),
        (
            'kind = "format"',
            'kind = "language"\ndefault_language = "zh-CN"',
            """language 'zh-CN' is unknown; allowed are af, am, ar, """,
        ),
        ('kind = "format"', 'kind = "language"\ndefault_language = "zh-CN"', 'write "zh"'),
        ('kind = "format"', 'kind = "language"\nhan_per_word = 0', "han_per_word: got 0; allowed: > 0"),
        (
            'kind = "format"',
            'kind = "format"\nhan_per_word = 1.5',
            'han_per_word is for kind = "language"; this reward is "format"; remove it',
        ),
        ('name = "final"', 'name = "final"\ndefault_language = "xx"', "language 'xx' is unknown"),
        ('name = "final"', 'name = "final"\nhan_per_word = 1.5', "without effect: set default_language too"),
    ],
)
def test_single_mistakes(tmp_path: Path, old: str, new: str, expected: str) -> None:
    text = message(write(tmp_path, MINIMAL.replace(old, new, 1)))
    assert expected in text
    assert "has a mistake:" in text
    assert "pydantic" not in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "'seed' is no override; write key=value"),
        ("=3", "is no override"),
        ("seed=", "no value after"),
        ("stage.1.sampling.stop=[1", "is no valid TOML"),
        (
            "stage.bsae.steps=3",
            "stage has no element 'bsae'; did you mean 'base'? (allowed: base, r1.zero, final",
        ),
        ("stage.3.steps=3", "stage has no element '3'"),
        ("stage.base=3", "names a whole table"),
        ("name.x=3", "'name' is 'demo', no table"),
        ("model..preset=x", "empty part"),
        ("model.=x", "empty part"),
        ("seed=1\nname='x'", "command line, seed: expected an integer"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in message(write(tmp_path), override)


def test_unreadable_files(tmp_path: Path) -> None:
    write(tmp_path)
    assert "did you mean 'recipe.toml'? (TOML files there: recipe.toml)" in message(tmp_path / "recipes.toml")
    assert "nor does its folder" in message(tmp_path / "no" / "recipe.toml")
    assert "is a folder" in message(tmp_path)
    assert "no valid TOML" in message(write(tmp_path, "name = demo"))
    assert "(at line 1, column 8)" in message(write(tmp_path, "name = demo"))
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    assert "not UTF-8" in message(tmp_path / "latin.toml")


def test_the_file_of_a_function_is_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = '\n[[stage]]\nname = "cold"\nkind = "sample"\nfrom = "r1.zero"\n'
    stage += 'prompts = { source = "generator", task = "chain_sum", verifier = "judge" }\n'
    stage += 'judge = { call = "judges/mine.py:correct" }\nrewrite = { call = "package.module:rewrite" }\n'
    (tmp_path / "recipes").mkdir()
    path = write(tmp_path / "recipes", MINIMAL + stage)
    monkeypatch.chdir(tmp_path)
    config = load(path)
    assert config.stage[-1].judge.call == f"{tmp_path}/recipes/judges/mine.py:correct"
    assert config.stage[-1].rewrite.call == "package.module:rewrite"
    overridden = load(path, ["stage.cold.judge.call=../other.py:f"])
    assert overridden.stage[-1].judge.call == f"{tmp_path.parent}/other.py:f"
    assert load(write(tmp_path, dump(config), "resolved.toml")) == config
