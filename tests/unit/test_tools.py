"""The scripts of tools/ are the commands they are named after, and say what to do where the package is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.cli import main
from tests.e2e.recipes import ROOT, environment
from tests.reference.synthetic_hf import write_family

# Script -> the beginning of what --help prints.
TOOLS = {
    "bf16_cast_fp8": "usage: megatron-r1 convert cast",
    "convert_hf_to_torch_dist": "usage: megatron-r1 convert import",
    "convert_torch_dist_to_hf": "usage: megatron-r1 convert export",
    "fp8_cast_bf16": "usage: megatron-r1 convert cast",
    "inspect_checkpoint": "usage: megatron-r1 convert inspect",
    "verify_checkpoint": "usage: megatron-r1 convert verify",
}


def tool(name: str, *arguments: str | Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, from another folder than its own."""
    command = [sys.executable, *options, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd="/", env=environment(), capture_output=True, text=True, timeout=120)


def test_these_are_the_scripts() -> None:
    assert {path.stem for path in (ROOT / "tools").glob("[!_]*.py")} == set(TOOLS)


@pytest.mark.parametrize("name", TOOLS)
def test_help(name: str) -> None:
    found = tool(name, "--help")
    assert found.returncode == 0 and found.stdout.startswith(TOOLS[name]), found.stderr


@pytest.mark.parametrize("name", TOOLS)
def test_without_the_package(name: str) -> None:
    found = tool(name, "--help", options=("-E", "-S"))  # neither PYTHONPATH nor site-packages
    assert found.returncode == 2 and not found.stdout
    assert found.stderr.endswith(f"megatron_r1 is not installed: run `pip install -e .` in {ROOT}\n"), found.stderr


def test_a_model_through_all_of_them(tmp_path: Path) -> None:
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    write_family(hf, "deepseek_v3", fp8=True)
    for name, *arguments in (
        ("convert_hf_to_torch_dist", hf, megatron),
        ("convert_torch_dist_to_hf", megatron, back),
        ("fp8_cast_bf16", back, tmp_path / "bf16"),
        ("bf16_cast_fp8", tmp_path / "bf16", tmp_path / "fp8"),
    ):
        found = tool(name, *arguments)
        assert found.returncode == 0 and "checksums in manifest.json" in found.stdout, found.stderr
    for file in hf.glob("*.safetensors*"):
        assert (back / file.name).read_bytes() == file.read_bytes()
    found = tool("inspect_checkpoint", megatron, "--json")
    assert json.loads(found.stdout)["kind"] == "torch_dist", found.stderr
    found = tool("verify_checkpoint", tmp_path / "fp8", tmp_path / "bf16", "--json")
    assert found.returncode == 0 and json.loads(found.stdout)["ok"], found.stdout
    assert main(["convert", "cast", str(tmp_path / "bf16"), str(tmp_path / "same"), "--dtype", "fp8"]) == 0
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (
        tmp_path / "fp8" / "model.safetensors"
    ).read_bytes()
