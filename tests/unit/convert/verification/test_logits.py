"""transformers and Megatron compute the same logits from the two sides of a conversion, and a changed weight shows."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.cli import main
from megatron_r1.config.errors import UserError
from megatron_r1.convert.conversion import import_conversion, run
from megatron_r1.convert.formats.torch_dist import read_torch_dist
from megatron_r1.convert.verification import logits
from megatron_r1.convert.verification.report import Report
from megatron_r1.convert.verification.verify import verify
from tests.reference.synthetic_hf import write_family


@pytest.fixture(scope="module")
def in_fp32(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a folder of a family with `hf` and `megatron` in it, in float32."""
    root = tmp_path_factory.mktemp("fp32")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            write_family(folder / "hf", family, dtype=torch.float32)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", lambda handle: None)
                run(import_conversion(folder / "hf"), folder / "megatron")
        return folder

    return make


def check(target: Path, source: Path | None) -> Report:
    return verify(target, source, like=None, predictions=True, logits=True, workers=1, progress=lambda count: None)


def compared(hf: Path, megatron: Path, world: Any) -> logits.Logits:
    """`compare_logits` in this process, in a world that runs already."""
    tokens = logits.random_tokens(json.loads((hf / "config.json").read_text()))
    theirs, notes = logits.transformers_logits(hf, tokens)
    ours = logits.megatron_logits(megatron, hf, tokens, world, predictions=True)
    assert theirs.std() > 0.1, "the logits say something"
    return logits.difference(ours, theirs, notes)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "decoder.layers.self_attention.linear_proj.weight"),
        ("deepseek_v3", "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"),
    ],
)
def test_logits(family: str, key: str, in_fp32: Callable[[str], Path], world: Any, tmp_path: Path) -> None:
    folder = in_fp32(family)
    found = compared(folder / "hf", folder / "megatron", world)
    assert found.tokens == 256 and found.ok
    assert found.largest <= 1e-4 and found.magnitude > 1
    damaged = Path(shutil.copytree(folder / "megatron", tmp_path / "megatron"))
    chunk = read_torch_dist(damaged).tensors[key].chunks[2]
    with open(chunk.file, "r+b") as file:
        file.seek(chunk.start)
        file.write(torch.full((64,), 0.5).numpy().tobytes())
    worse = compared(folder / "hf", damaged, world)
    assert not worse.ok and worse.largest > 10 * worse.bound


def test_the_norms_of_latent_attention(in_fp32: Callable[[str], Path], world: Any, tmp_path: Path) -> None:
    """transformers gives them 1e-6 whatever rms_norm_eps says: the comparison corrects that and says so."""
    hf = Path(shutil.copytree(in_fp32("deepseek_v3") / "hf", tmp_path / "hf"))
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    found = compared(hf, hf, world)
    assert found.largest <= 1e-4
    assert "rms_norm_eps 0.001" in found.notes[0]


def test_weights_that_transformers_would_draw(in_fp32: Callable[[str], Path], tmp_path: Path) -> None:
    hf = Path(shutil.copytree(in_fp32("llama") / "hf", tmp_path / "hf"))
    tensors = {n: value for file in hf.glob("*.safetensors") for n, value in load_file(file).items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"does not find model\.layers\.1\.mlp\.up_proj\.weight"):
        logits.transformers_logits(hf, torch.zeros(1, 2, dtype=torch.int64))


def test_the_whole_command_with_logits(
    in_fp32: Callable[[str], Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, whatever ranks the environment names; stdout is the result alone."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    folder, before = in_fp32("llama"), dict(os.environ)
    arguments = ["convert", "verify", str(folder / "megatron"), str(folder / "hf"), "--logits", "--json"]
    assert main(arguments) == 0
    shown = capfd.readouterr()
    report = json.loads(shown.out)
    assert report["ok"] and report["checks"][-1]["state"] == "ok"
    assert report["checks"][-1]["largest"] <= 1e-4
    assert [line for line in shown.err.splitlines() if not line.startswith("verify ")] == []
    assert dict(os.environ) == before


def die(hf: Path, megatron: Path, predictions: bool) -> None:
    """What the kernel does where memory runs out."""
    print("a last word", flush=True)
    os._exit(9)


def test_a_killed_process(in_fp32: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_compute", die)
    folder = in_fp32("llama")
    report = check(folder / "megatron", folder / "hf")
    assert not report.ok
    assert report.checks[-1].state == "failed"
    assert "memory" in report.checks[-1].summary and "a last word" in report.checks[-1].summary


def test_logits_that_cannot_be_compared(
    in_fp32: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = in_fp32("llama")
    with pytest.raises(UserError, match="SOURCE"):
        check(folder / "hf", None)
    with pytest.raises(UserError, match="both are hf"):
        check(folder / "hf", folder / "hf")
    write_family(tmp_path, "llama", fp8=True)
    with pytest.raises(UserError, match="cast --dtype bf16"):
        check(tmp_path, folder / "megatron")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: argparse.Namespace(available=1_000_000))
    with pytest.raises(UserError, match=r"0\.0 GB are available"):
        check(folder / "megatron", folder / "hf")
