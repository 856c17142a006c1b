"""An export stage through the command line: the folder it writes is the checkpoint, and a stage can start from it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_r1.convert.manifest import JOURNAL, MANIFEST, check_manifest
from megatron_r1.observe.metrics import read_metrics
from tests.e2e.recipes import RECIPE, finish, living, start, wait_until
from tests.reference.synthetic_hf import write_family

MORE = """
[[stage]]
name = "hf"
kind = "export"
from = "pretrain"
dtype = "fp32"

[[stage]]
name = "from-hf"
kind = "pretrain"
from = "hf"
steps = 2
batch_tokens = 512
optimizer = { lr = 1e-3 }
corpus = [{ options = { terms = 2 }, styles = { direct = 1.0 } }]

[[stage]]
name = "from-megatron"
kind = "pretrain"
from = "pretrain"
steps = 2
batch_tokens = 512
optimizer = { lr = 1e-3 }
corpus = [{ options = { terms = 2 }, styles = { direct = 1.0 } }]

[[stage]]
name = "judge"
kind = "eval"
from = "hf"
problems = 4
k = 2
prompts = { source = "generator", task = "chain_sum", options = { terms = 2 }, size = 4, seed = 9, template = "plain" }
sampling = { max_new_tokens = 10 }
"""
# Fewer prompts than the recipe's: the same questions held out everywhere, two ranks with their own experts.
LAYOUT = ["parallel.expert=2"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    pretrain = "\n[[stage]]\n".join(RECIPE.split("\n[[stage]]\n")[:2]).replace("steps = 60", "steps = 6")
    (folder / "recipe.toml").write_text(pretrain + MORE, encoding="utf-8")
    process = finish("run", folder / "recipe.toml", "--run-dir", folder / "run", *LAYOUT)
    assert process.returncode == 0, process.stderr
    assert "is unknown" not in process.stderr  # the evaluation followed the weights back through the export
    return folder / "run"


def test_the_stage_writes_what_the_command_writes(exported: Path, tmp_path: Path) -> None:
    (checkpoint,) = (exported / "pretrain" / "checkpoints").glob("step-*6")
    process = finish("convert", "export", checkpoint, tmp_path / "hf", "--dtype", "fp32")
    assert process.returncode == 0, process.stderr
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (exported / "hf" / "hf" / name).read_bytes()
    state = next(s for s in json.loads((exported / "stages.json").read_text())["stages"] if s["name"] == "hf")
    assert state["result"]["export/bytes"] == (tmp_path / "hf" / "model.safetensors").stat().st_size


def test_transformers_loads_it_without_a_missing_key(exported: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(exported / "hf" / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("model.layers.2.") for name in info["unexpected_keys"])  # multi-token prediction
    stored = load_file(exported / "hf" / "hf" / "model.safetensors")
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])


def test_a_stage_from_the_folder_trains_as_one_from_the_checkpoint(exported: Path) -> None:
    one, other = (
        [row["loss/lm"] for row in read_metrics(exported / name / "metrics.jsonl")]
        for name in ("from-hf", "from-megatron")
    )
    assert len(one) == 2 and one == other


def test_weights_of_another_model_are_refused_before_anything_starts(exported: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(exported / "hf" / "hf", wrong)
    (wrong / "manifest.json").unlink()
    tensors = load_file(wrong / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    process = finish(
        "run", exported / "recipe.toml", "--run-dir", tmp_path / "run", f'stage.from-megatron.from="{wrong}"', *LAYOUT
    )
    assert process.returncode == 2 and not (tmp_path / "run").exists()
    assert "model.norm.weight is [7] instead of [32]" in process.stderr, process.stderr


def test_an_export_like_another_model_is_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        (exported / "hf" / "hf" / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')
    )
    process = finish(
        "run", exported / "recipe.toml", "--run-dir", tmp_path / "run", f'stage.hf.like="{tmp_path}"', *LAYOUT
    )
    assert process.returncode == 2
    assert "another model than the one trained: hidden_size = 64 instead of 32" in process.stderr, process.stderr


def undone(run: Path) -> None:
    """Make the export stage one that is still to do; what it wrote stays."""
    file = run / "stages.json"
    content = json.loads(file.read_text())
    next(state for state in content["stages"] if state["name"] == "hf")["state"] = "running"
    file.write_text(json.dumps(content))


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Of the finished shards: what changes when one is written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")}


def test_an_export_that_is_killed_or_refused_goes_on(exported: Path, tmp_path: Path) -> None:
    """Two ranks, of which one writes: both end, whatever becomes of it."""
    run, recipe = tmp_path / "run", exported.parent / "recipe.toml"
    shutil.copytree(exported, run)
    undone(run)
    target, small = run / "hf" / "hf", "stage.hf.shard_gb=0.000001"  # a file a tensor
    arguments = ("run", recipe, "--run-dir", run, *LAYOUT, small, "stage.hf.workers=1")
    (target / "model.safetensors").write_bytes(b"of another plan")

    process = start(*arguments, output=tmp_path / "killed.log")
    wait_until(lambda: (target / JOURNAL).exists() and len(written(target)) > 3, process, "the export")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while living(process.pid):
        assert time.monotonic() < deadline, "a rank outlived the launcher"
        time.sleep(0.02)
    entered = [json.loads(line) for line in (target / JOURNAL).read_text().splitlines()]
    before = {name: written(target)[name] for name in (line["file"] for line in entered if "file" in line)}
    assert before and not (target / MANIFEST).exists()

    (target / "notes.txt").write_text("mine")
    refused = finish(*arguments)
    assert refused.returncode == 2, refused.stderr
    assert f"stage 'hf': {target} holds notes.txt, which no export wrote" in refused.stderr
    assert "Move it away, then start the run again" in refused.stderr and "--overwrite" not in refused.stderr
    (target / "notes.txt").rename(tmp_path / "notes.txt")

    last = finish(*arguments)
    assert last.returncode == 0, last.stderr
    after = written(target)
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    assert check_manifest(target) == []
    assert all_tensors(target).keys() == load_file(exported / "hf" / "hf" / "model.safetensors").keys()
    for name, value in load_file(exported / "hf" / "hf" / "model.safetensors").items():
        assert torch.equal(all_tensors(target)[name], value), name

    undone(run)
    again = finish(*arguments)
    assert again.returncode == 0, again.stderr
    assert written(target) == after  # finished and the same: nothing to write
    result = next(s for s in json.loads((run / "stages.json").read_text())["stages"] if s["name"] == "hf")["result"]
    assert result["export/tensors"] == len(all_tensors(target))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


FP8 = """
name = "fp8"
seed = 1

[model]
config = "{hf}"
precision = "bf16"

[tokenizer]
kind = "huggingface"
path = "{hf}"

[[stage]]
name = "more"
kind = "pretrain"
from = "{hf}"
steps = 1
batch_tokens = 256
optimizer = {{ lr = 1e-6 }}
corpus = [{{ options = {{ terms = 2 }}, styles = {{ direct = 1.0 }} }}]

[[stage]]
name = "hf"
kind = "export"
from = "more"
"""


@pytest.mark.slow
def test_fp8_weights_through_training_in_bf16(tmp_path: Path) -> None:
    """The blocks that one tiny step leaves alone keep their bytes; the others are near what they were."""
    hf = tmp_path / "model"
    write_family(hf, "deepseek_v3", fp8=True)
    (tmp_path / "recipe.toml").write_text(FP8.format(hf=hf), encoding="utf-8")
    process = finish("run", tmp_path / "recipe.toml", "--run-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    found, given = all_tensors(tmp_path / "run" / "hf" / "hf"), all_tensors(hf)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {n: (t.dtype, t.shape) for n, t in given.items()}
    for name, value in found.items():
        if value.dtype == torch.float8_e4m3fn:
            one, other = (dequantised(tensors, name) for tensors in (found, given))
            assert float((one - other).norm() / other.norm()) < 0.05, name
    config = json.loads((tmp_path / "run" / "hf" / "hf" / "config.json").read_text())
    assert config["quantization_config"] == json.loads((hf / "config.json").read_text())["quantization_config"]
    verified = finish("convert", "verify", tmp_path / "run" / "hf" / "hf", "--json")
    assert verified.returncode == 0, verified.stdout


def dequantised(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """float32 [R, C] of a tensor in 128x128 blocks."""
    codes = tensors[name].float()
    scale = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes * scale[: codes.shape[0], : codes.shape[1]]
