"""A mistake costs one readable message and exit status 2, and leaves nothing half-written."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Finished
from tests.e2e.recipes import PRETRAIN_EVERY, checkpoints, differences, finish, write_recipe

DATA = 'stage.r1-zero.prompts={ source = "jsonl", path = "data.jsonl" }'

# What is given on the command line after the recipe, and what the message must say.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "wrong key": (["stage.r1-zero.stepz=3"], ["stage.r1-zero.stepz: unknown key", "did you mean 'steps'?"]),
    "wrong type": (['stage.r1-zero.steps="six"'], ["stage.r1-zero.steps: expected an integer", '"six"']),
    "wrong value": (["stage.r1-zero.steps=-1"], ["stage.r1-zero.steps: got -1", "> 0"]),
    "TP and heads": (["parallel.tensor=4"], ["tensor (4) must divide num_attention_heads (2; allowed: 1, 2)"]),
    "EP and experts": (["parallel.expert=3"], ["expert (3) must divide the number of routed experts (4"]),
    "PP and layers": (["parallel.pipeline=3"], ["pipeline is 3, more than the 2 layers"]),
    "PP does not divide": (
        ["parallel.pipeline=2", "model.override.num_hidden_layers=3"],
        ["pipeline (2) must divide num_hidden_layers (3; allowed: 1, 3)"],
    ),
    "nproc and layout": (["--nproc", "3", "parallel.tensor=2"], ["must divide the number of processes (3)", "e.g. 4"]),
    "nproc and prompts": (["--nproc", "3"], ["grpo.prompts = 4", "3 data- and context-parallel replicas"]),
    "template": (['stage.r1-zero.prompts.template="Solve it."'], ["'Solve it.' has no {prompt}"]),
    "vocabulary": (["model.override.vocab_size=50"], ["tokenizer has 102 tokens", "vocab_size is 50"]),
    "preset": (['model.preset="tiny-mow"'], ["there is no 'tiny-mow'", "did you mean 'tiny-moe'?"]),
    "Megatron field": (
        ["model.megatron.attention_dropuot=0.1"],
        ["[model.megatron] attention_dropuot", "no such field", "did you mean attention_dropout"],
    ),
    "Megatron type": (
        ['model.megatron.attention_dropout="lots"'],
        ["[model.megatron] attention_dropout: got 'lots'", "float"],
    ),
    "Megatron choice": (
        ['model.megatron.recompute_granularity="most"'],
        ["[model.megatron] recompute_granularity: got 'most'", "'full', 'selective'"],
    ),
    "reserved field": (["model.megatron.num_layers=3"], ["[model.megatron] num_layers", "set it there"]),
    "from a later stage": (
        ['stage.pretrain.from="r1-zero"'],
        ["need each other", "pretrain needs r1-zero needs pretrain"],
    ),
    "from an unknown stage": (['stage.r1-zero.from="pretrian"'], ["did you mean 'pretrain'?"]),
    "from no folder": (['stage.r1-zero.from="./nowhere"'], ["nowhere", "neither a stage of this recipe"]),
    "from an evaluation": (['stage.r1-zero.from="eval-base"'], ["an eval stage makes no weights"]),
    "no data file": ([DATA], ["data.jsonl' does not exist"]),
    "replay on a dense model": (
        ['model={ preset = "tiny-dense" }'],
        ['stage.r1-zero.grpo.routing_replay = "rollout": this architecture is dense', 'set it to "none"'],
    ),
    "mtp_loss without MTP": (
        ["model.mtp=false"],
        ["stage.r1-zero.grpo.mtp_loss = 0.1 without effect", "model.mtp = false"],
    ),
    "nothing to replay": (
        ['stage.r1-zero.grpo.routing_replay="trainer"', "stage.r1-zero.grpo.minibatches=1"],
        ["stage.r1-zero.grpo: routing_replay", "nothing to replay", "epochs = 1"],
    ),
    "padded rows with allgather": (
        ['parallel.dispatcher="allgather"', "stage.pretrain.packing=false"],
        ["stage.pretrain.packing = false", "set packing = true, or use alltoall"],
    ),
    "experts without sequence parallelism": (
        ["parallel.tensor=2", "parallel.sequence=false"],
        ["sequence is false with tensor above 1", "set sequence = true"],
    ),
    "correction method": (
        ['stage.r1-zero.grpo.correction.method="tiss"'],
        ['stage.r1-zero.grpo.correction.method: got "tiss"', "did you mean 'tis'"],
    ),
    "metric of a limit": (
        ['stage.r1-zero.grpo.mismatch_limit=[{ metric = "policy/kl", above = 1.0 }]'],
        ["stage.r1-zero.grpo.mismatch_limit", "metric: got", "policy/engine_gap"],
    ),
    "rows longer than a micro-batch": (
        ["parallel.context=4", "stage.pretrain.micro_batch_tokens=3"],
        ["stage.pretrain.micro_batch_tokens = 3", "parallel.context = 4", "set micro_batch_tokens = 8 or more"],
    ),
    "router z-loss": (
        ["model.megatron.moe_z_loss_coeff=0.001"],
        ["[model.megatron] moe_z_loss_coeff = 0.001", "wrongly", "the expert bias balances the load"],
    ),
    "recompute method without recompute": (
        ['model.recompute_method="block"'],
        ["recompute = 'none' takes no `recompute_method`", 'belongs to "full"'],
    ),
}
if importlib.util.find_spec("transformer_engine") is None:  # what is refused without it
    BLOCKS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
    HEADS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    MISTAKES |= {
        "fp8 without Transformer Engine": (
            [
                'model.precision="fp8-blockwise"',
                *(f"model.override.{key}=128" for key in BLOCKS),
                *(f"model.override.{key}=64" for key in HEADS),
            ],
            ['model.precision = "fp8-blockwise" needs Transformer Engine', "megatron-r1[gpu]", '"fp8-emulated"'],
        ),
        "norms recomputed without Transformer Engine": (
            ['model.recompute="selective"', 'model.recompute_modules=["layernorm"]'],
            ['model.recompute_modules: "layernorm" does not work without Transformer Engine', 'or recompute = "full"'],
        ),
        "attention backend without Transformer Engine": (
            ['model.megatron.attention_backend="flash"'],
            ['[model.megatron] attention_backend = "flash" is Transformer Engine\'s', "leave it out"],
        ),
    }

BAD_DATA = {
    "empty file": ("", ["data.jsonl holds no rows"]),
    "no question column": ('{"q": "1+2=?", "answer": "3"}\n', ["data.jsonl:1: no column 'question'", "'q', 'answer'"]),
    "no JSON": ('{"question": "1+2=?", "answer": "3"}\n{"question": \n', ["data.jsonl:2: not valid JSON"]),
    "a character without a token": ('{"question": "1\u00d72=?", "answer": "2"}\n', ["no token for '\u00d7'"]),
    "a prompt longer than the model": (
        '{"question": "1+2=?", "answer": "3"}\n',
        ["stage.r1-zero.prompts: prompt data.jsonl:0", "max_position_embeddings = 128", 'template = "plain"'],
    ),
}


def check_refused(process: subprocess.CompletedProcess[str], words: list[str], run: Path) -> None:
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("megatron-r1: error: "), process.stderr
    assert process.stderr.count("megatron-r1:") == 1, process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in process.stderr
    assert not run.exists(), "something was written"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_before_anything_starts(mistake: str, tmp_path: Path) -> None:
    arguments, words = MISTAKES[mistake]
    process = finish("run", write_recipe(tmp_path), *arguments, "--run-dir", tmp_path / "run", cwd=tmp_path)
    check_refused(process, words, tmp_path / "run")


@pytest.mark.parametrize("mistake", BAD_DATA)
def test_bad_data_is_found_before_anything_starts(mistake: str, tmp_path: Path) -> None:
    content, words = BAD_DATA[mistake]
    (tmp_path / "data.jsonl").write_text(content, encoding="utf-8")
    process = finish("run", write_recipe(tmp_path), DATA, "--run-dir", tmp_path / "run", cwd=tmp_path)
    check_refused(process, words, tmp_path / "run")


def test_a_missing_recipe(tmp_path: Path) -> None:
    process = finish("run", "missing.toml", "--run-dir", tmp_path / "run", cwd=tmp_path)
    check_refused(process, ["missing.toml does not exist"], tmp_path / "run")


@pytest.mark.parametrize("damage", ["truncated", "missing file", "no manifest", "unreadable manifest"])
def test_a_damaged_checkpoint(damage: str, reference: Finished, tmp_path: Path) -> None:
    last = checkpoints(reference.folder, "pretrain")[-1]
    source = tmp_path / "copy" / last
    shutil.copytree(reference.folder / "pretrain" / "checkpoints" / last, source)
    shard = next(source.glob("*.distcp"))
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing file":
        shard.unlink()
    elif damage == "no manifest":
        (source / "manifest.json").unlink()
    else:
        (source / "manifest.json").write_text("{")
    words = {
        "truncated": [f"{source} is damaged: {shard.name} has", f"instead of {shard_size(reference, last, shard)}"],
        "missing file": [f"{source} is damaged: {shard.name} is missing"],
        "no manifest": [f"{source}", "has no manifest.json"],
        "unreadable manifest": [f"{source} is damaged: manifest.json"],
    }[damage]
    process = finish("run", reference.recipe, f'stage.r1-zero.from="{source}"', "--run-dir", tmp_path / "run")
    check_refused(process, words, tmp_path / "run")


def shard_size(reference: Finished, checkpoint: str, shard: Path) -> int:
    return (reference.folder / "pretrain" / "checkpoints" / checkpoint / shard.name).stat().st_size


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "file").write_text("kept")
    for run, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        process = finish("run", recipe, "--run-dir", run)
        check_refused(process, [f"the run directory {run} cannot be written: {reason}", "--run-dir"], tmp_path / "none")
    assert (tmp_path / "file").read_text() == "kept"


def test_what_only_megatron_can_judge_is_one_message_too(tmp_path: Path) -> None:
    """Found by the ranks, so the run directory exists by then, but before the first stage: nothing has run."""
    run = tmp_path / "run"
    impossible = 'model.megatron={ recompute_granularity = "full" }'  # without recompute_method
    process = finish("run", write_recipe(tmp_path), impossible, "--run-dir", run)
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("megatron-r1:") == 1, process.stderr
    assert "megatron-r1: error: Megatron-Core refuses this model and layout" in process.stderr
    assert "recompute_method" in process.stderr
    assert "Traceback" not in process.stderr
    check_nothing_ran(run)


def test_what_only_the_device_can_judge_is_found_before_the_first_stage(tmp_path: Path) -> None:
    """The last training stage asks for a GPU: the stages before it do not run first."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU")
    run = tmp_path / "run"
    offload = "stage.r1-zero.optimizer.megatron={ optimizer_cpu_offload = true, optimizer_offload_fraction = 1.0 }"
    process = finish("run", write_recipe(tmp_path), offload, "--run-dir", run)
    assert process.returncode == 2, process.stderr
    assert "stage.r1-zero.optimizer.megatron: optimizer_cpu_offload moves" in process.stderr
    check_nothing_ran(run)


def check_nothing_ran(run: Path) -> None:
    assert checkpoints(run, "pretrain") == []
    assert not (run / "stages.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(reference: Finished, small_disk: Path) -> None:
    run = small_disk / "run"
    full = finish("run", reference.recipe, "--run-dir", run)
    assert full.returncode == 2, full.stderr
    assert full.stderr.count("megatron-r1:") == 1, full.stderr
    assert "megatron-r1: error: cannot write" in full.stderr
    assert "No space left on device" in full.stderr
    assert "ree some space" in full.stderr
    assert "Traceback" not in full.stderr
    complete = [name for name in checkpoints(run, "pretrain") if not name.endswith(".writing")]
    assert complete == [f"step-{PRETRAIN_EVERY:08d}"]

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    mended = finish("run", reference.recipe, "--run-dir", run)
    assert mended.returncode == 0, mended.stderr
    assert differences(reference.folder, run) == []
