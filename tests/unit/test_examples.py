"""Every recipe in examples/ is dry-run on tiny stand-ins of what its user brings, so that none can rot.

The stand-ins have the columns that the recipe asks for, a tokenizer, and folders in place of the weights; the README
beside the recipe must name each of them and the number of processes.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_r1 import cli
from megatron_r1.config.data import ConversationsConfig, LabelsConfig, PairsConfig, PromptsConfig
from megatron_r1.config.load import load
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*/recipe*.toml"), key=str)
FULL_SIZE = ("distill_llama_8b", "distill_qwen2.5_7b", "r1_671b", "r1_moonlight_16b", "r1_zero_671b")


def named(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def tables(table: Any) -> Iterator[BaseModel]:
    """The table and every one inside it."""
    if isinstance(table, BaseModel):
        yield table
        for name in type(table).model_fields:
            yield from tables(getattr(table, name))
    elif isinstance(table, list | dict):
        for item in table.values() if isinstance(table, dict) else table:
            yield from tables(item)


def row_for(table: BaseModel) -> dict[str, Any] | None:
    """A row that the table can read; None for a table that reads no file."""
    if isinstance(table, PromptsConfig) and table.source == "jsonl":
        row = {table.question_key: "What is 3+4?", table.answer_key: "A" if table.verifier == "choice" else "7"}
        return row if table.language_key is None else row | {table.language_key: "en"}
    if isinstance(table, PairsConfig):
        return {table.prompt_key: "Hello", table.chosen_key: "Good day", table.rejected_key: "What?"}
    if isinstance(table, LabelsConfig):
        return {table.prompt_key: "Hello", table.response_key: "Good day", table.label_key: 1}
    if isinstance(table, ConversationsConfig):
        answer = {"role": "assistant", "content": "7", table.reasoning_key: "3+4=7"}
        return {table.messages_key: [{"role": "user", "content": "3+4=?"}, answer]}
    return None


def write_tokenizer(folder: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def write_inputs(config: RunConfig) -> list[Path]:
    """Everything that the recipe reads and no stage of it writes; returns the paths."""
    written = []
    for table in tables(config):
        row, path = row_for(table), getattr(table, "path", None)
        if row is not None and path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row) + "\n", encoding="utf-8")
            written.append(path)
    for stage in config.stage:
        sources = [stage.init_from, getattr(stage, "teacher", None)]
        sources += [reward.init_from for reward in getattr(stage, "reward", [])]
        for folder in [Path(source) for source in sources if source is not None and "/" in source]:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").write_text('{"files": {}}')  # as a checkpoint of training, without its files
            written.append(folder)
        like = getattr(stage, "like", None)
        if like is not None:
            like.mkdir(parents=True, exist_ok=True)
            (like / "config.json").write_text(json.dumps(architecture(config.model_of(stage), 2)))
            written.append(like)
    if config.tokenizer.path is not None:
        write_tokenizer(config.tokenizer.path)
        written.append(config.tokenizer.path)
    return written


@pytest.fixture
def transformer_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes for GPUs may ask for it; a dry run only looks whether it is there."""
    stub = tmp_path / "site" / "transformer_engine"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(stub.parent))


def copy(recipe: Path, folder: Path) -> Path:
    """With what lies beside it: recipes call functions of files there."""
    shutil.copytree(recipe.parent, folder / recipe.parent.name)
    return folder / recipe.parent.name / recipe.name


def test_the_full_size_recipes_are_there() -> None:
    found = {recipe.parent.name for recipe in RECIPES}
    assert found >= {"quickstart", *FULL_SIZE}
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for folder in found:
        assert f"{folder}/" in index, f"examples/README.md does not list {folder}"


@pytest.mark.parametrize("recipe", RECIPES, ids=named)
def test_a_dry_run_of_every_recipe(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], transformer_engine: None
) -> None:
    path = copy(recipe, tmp_path)
    config = load(path)
    readme = (recipe.parent / "README.md").read_text(encoding="utf-8")
    for given in write_inputs(config):
        assert str(given.relative_to(path.parent)) in readme, f"the README does not name {given.name}"
    status = cli.main(["run", str(path), "--dry-run", "--run-dir", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert tomllib.loads(printed.out)["name"] == config.name
    world = config.parallel.world_size
    assert f"# layout: {world} process(es)" in printed.out
    if recipe.parent.name in FULL_SIZE:
        assert f"{world} GPUs" in readme, f"the README does not say {world} GPUs"
        assert "not run" in readme


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.parent.name in FULL_SIZE], ids=named)
def test_megatron_accepts_the_models_of_every_recipe(recipe: Path, world: World) -> None:
    """Under the recipe's layout, uneven pipeline stages included; nothing is built."""
    from megatron_r1.model.megatron_config import transformer_config

    config = load(recipe)
    for model in (config.model, *config.models.values()):
        arch = architecture(model, 2)
        made = transformer_config(arch, model, config.parallel, on_cpu=True)
        assert made.pipeline_model_parallel_size == config.parallel.pipeline
        first, last = made.num_layers_in_first_pipeline_stage, made.num_layers_in_last_pipeline_stage
        stages = config.parallel.pipeline - (first is not None) - (last is not None)
        assert (arch["num_hidden_layers"] - (first or 0) - (last or 0)) % max(1, stages) == 0


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.parent.name in FULL_SIZE], ids=named)
def test_every_replica_samples_as_many_prompts(recipe: Path) -> None:
    config = load(recipe)
    layout: ParallelConfig = config.parallel
    replicas = layout.world_size // (layout.tensor * layout.pipeline)
    for stage in config.stage:
        asked = {"grpo": lambda s: s.grpo.prompts, "distill": lambda s: s.questions}.get(stage.kind)
        assert asked is None or asked(stage) % replicas == 0, stage.name
