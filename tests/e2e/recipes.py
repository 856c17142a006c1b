"""A recipe whose whole run takes seconds, and how the end-to-end tests run, watch, kill and compare runs of it.

The recipe is made so that what it tests cannot be right by accident: rewards differ within a group; checkpoints of
the `r1-zero` stage (steps 3 and 6) fall between the two minibatches of a rollout phase (phases begin at steps 0, 2
and 4); the KL reference in the first of them is needed by the phase after it and is not the policy of that step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "eval-base", "r1-zero", "eval-r1-zero")
PRETRAIN_EVERY, GRPO_EVERY, GRPO_STEPS = 24, 3, 6

RECIPE = """\
name = "tiny"
seed = 1

[model]
preset = "tiny-moe"

[model.override]
hidden_size = 32
intermediate_size = 64
moe_intermediate_size = 16
num_hidden_layers = 2
first_k_dense_replace = 1
num_attention_heads = 2
num_key_value_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
n_routed_experts = 4
num_experts_per_tok = 2
n_group = 2
topk_group = 1
num_nextn_predict_layers = 1
initializer_range = 0.05
max_position_embeddings = 128

[tokenizer]
kind = "char"

[[stage]]
name = "pretrain"
kind = "pretrain"
steps = 60
batch_tokens = 512
optimizer = { lr = 1e-2, schedule = "cosine", warmup_steps = 2, weight_decay = 0.01 }
checkpoint = { every = 24, keep = 2 }

[[stage.corpus]]
options = { terms = 2 }
styles = { direct = 1.0 }
share = 0.5

[[stage.corpus]]
options = { terms = 2 }
styles = { direct = 0.6, plain = 0.4 }
share = 0.5

[[stage]]
name = "eval-base"
kind = "eval"
problems = 4
k = 2
prompts = { source = "generator", task = "chain_sum", options = { terms = 2 }, size = 4, seed = 9, template = "plain" }
sampling = { max_new_tokens = 10 }

[[stage]]
name = "r1-zero"
kind = "grpo"
from = "pretrain"
steps = 6
optimizer = { lr = 3e-3, warmup_steps = 1 }
checkpoint = { every = 3, keep = 3 }
prompts = { source = "generator", task = "chain_sum", options = { terms = 2 }, template = "plain" }
sampling = { temperature = 1.3, max_new_tokens = 10 }
reward = [{ kind = "accuracy" }, { kind = "format", weight = 0.5 }]

[stage.grpo]
prompts = 4
group_size = 4
minibatches = 2
routing_replay = "rollout"
mtp_loss = 0.1

[stage.grpo.loss]
clip_low = 0.2
kl_coefficient = 0.1
reference_every = 5

[[stage]]
name = "eval-r1-zero"
kind = "eval"
from = "r1-zero"
problems = 4
k = 2
prompts = { source = "generator", task = "chain_sum", options = { terms = 2 }, size = 4, seed = 9, template = "plain" }
sampling = { max_new_tokens = 10 }
"""


def write_recipe(folder: Path) -> Path:
    """The recipe as a file in `folder`."""
    path = folder / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def command(*arguments: str | Path) -> list[str]:
    """The command line of `megatron-r1 <arguments>`."""
    return [sys.executable, "-m", "megatron_r1.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """This process's environment without the variables of a rank, and with the package on the path."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONWARNINGS")}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def finish(*arguments: str | Path, cwd: Path = ROOT, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `megatron-r1 <arguments>` to its end."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def start(*arguments: str | Path, output: Path) -> subprocess.Popen[bytes]:
    """Start `megatron-r1 <arguments>` as the leader of a session of its own, both outputs into a file."""
    with output.open("ab") as stream:
        return subprocess.Popen(
            command(*arguments), cwd=ROOT, env=environment(), stdout=stream, stderr=stream, start_new_session=True
        )


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str, seconds: float = 120
) -> None:
    """Return once the condition holds; fail if the process ends or the time is up before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode} before {what}"
        assert time.monotonic() < deadline, f"{what} did not come in {seconds} s"
        time.sleep(0.001)


def living(session: int) -> list[str]:
    """Command lines of the processes of a session that are not dead."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state not in "ZX":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has just ended
            continue
    return found


def steps(stage: Path) -> list[int]:
    """Steps in a stage's metrics.jsonl so far."""
    file = stage / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def metrics(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Every line of every stage, without what a clock makes."""
    return {stage: [_timeless(row) for row in lines(run / stage)] for stage in STAGES}


def lines(stage: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl."""
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "time" and not k.startswith("time/") and "per_second" not in k}


def rollouts(run: Path, stage: str = "r1-zero") -> dict[str, list[dict[str, Any]]]:
    """File name -> its rows."""
    from megatron_r1.observe.rollouts import read_rollouts

    return {path.name: read_rollouts(path) for path in sorted((run / stage / "rollouts").iterdir())}


def checkpoints(run: Path, stage: str) -> list[str]:
    """Names of a stage's checkpoint folders, unfinished ones included."""
    folder = run / stage / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Every whole tensor of a checkpoint: weights, optimizer state, KL reference. Read by torch alone."""
    import torch
    from torch.distributed import checkpoint as torch_checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = torch_checkpoint.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in stored.items()
        if isinstance(item, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that there is no process group, as asked
        torch_checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found


def loop_state(checkpoint: Path) -> dict[str, Any]:
    """What the loop saved: the data cursor, the phase in progress."""
    import torch

    return dict(torch.load(checkpoint / "common.pt", weights_only=False)["loop"])


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished runs differ: metrics, completions or any tensor of the last checkpoints. Empty: nothing."""
    import torch

    found = []
    a, b = metrics(one), metrics(other)
    for stage in STAGES:
        if [row["step"] for row in a[stage]] != [row["step"] for row in b[stage]]:
            found.append(f"{stage}: steps {[row['step'] for row in b[stage]]}")
            continue
        for x, y in zip(a[stage], b[stage], strict=True):
            names = sorted(k for k in x.keys() | y.keys() if x.get(k) != y.get(k))
            found += [f"{stage}, step {x['step']}, {k}: {x.get(k)!r} != {y.get(k)!r}" for k in names]
    for stage in ("eval-base", "r1-zero", "eval-r1-zero"):
        if rollouts(one, stage) != rollouts(other, stage):
            found.append(f"{stage}: completions")
    for stage in ("pretrain", "r1-zero"):
        last = checkpoints(one, stage)[-1]
        x, y = (tensors(run / stage / "checkpoints" / last) for run in (one, other))
        found += [f"{stage}, {last}: tensors {sorted(x.keys() ^ y.keys())}"] if x.keys() != y.keys() else []
        found += [f"{stage}, {last}: {k}" for k in x.keys() & y.keys() if not torch.equal(x[k], y[k])]
    return found
