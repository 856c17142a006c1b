"""`megatron-r1 convert`: what it refuses before anything is written, what a plan shows, the files around a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.cli import main
from megatron_r1.convert.manifest import JOURNAL, MANIFEST, check_manifest
from tests.reference.synthetic_hf import write_family, write_shards

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama in BF16, DeepSeek-V3 in FP8; both imported, the first exported again."""
    root = tmp_path_factory.mktemp("models")
    write_family(root / "llama", "llama")
    write_family(root / "v3", "deepseek_v3", fp8=True)
    for name in ("llama", "v3"):
        assert main(["convert", "import", str(root / name), str(root / f"{name}-megatron")]) == 0
    assert main(["convert", "export", str(root / "llama-megatron"), str(root / "llama-export")]) == 0
    return root


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may change."""
    return lambda name: Path(shutil.copytree(models / name, tmp_path / name))


class Told:
    """Exit status and output of one command."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str | Path) -> int:
        self.capsys.readouterr()
        status = main(["convert", *map(str, arguments)])
        self.out, self.err = self.capsys.readouterr()
        assert "Traceback" not in self.err
        return status


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Told:
    return Told(capsys)


def content(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


# ------------------------------------------------------------------------------------------- what would be destroyed


@pytest.mark.parametrize("also", [["--overwrite"], ["--resume"], []])
@pytest.mark.parametrize(
    "reading",
    [["--like", "llama-export"], ["--like", "llama-export/config.json"], ["--tokenizer", "llama-export"]],
)
def test_a_target_that_is_read_is_left_alone(
    reading: list[str], also: list[str], copy: Callable[[str], Path], tmp_path: Path, convert: Told
) -> None:
    megatron, target = copy("llama-megatron"), copy("llama-export")
    before = content(target)
    assert convert("export", megatron, target, reading[0], tmp_path / reading[1], *also) == 2
    assert f"{target} holds {tmp_path / reading[1]}, which this conversion reads" in convert.err
    assert content(target) == before


def test_links_to_what_is_read_are_followed(copy: Callable[[str], Path], tmp_path: Path, convert: Told) -> None:
    megatron, target = copy("llama-megatron"), copy("llama-export")
    (tmp_path / "link").symlink_to(target)
    before = content(target)
    assert convert("export", megatron, tmp_path / "link", "--like", target, "--overwrite") == 2
    assert convert("export", megatron, target, "--like", tmp_path / "link", "--overwrite") == 2
    assert content(target) == before
    # A snapshot whose files are links into the target, as a download cache has them.
    (tmp_path / "snapshot").mkdir()
    for file in target.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert convert("cast", tmp_path / "snapshot", target, "--dtype", "fp16", "--overwrite") == 2
    assert f"{target} holds" in convert.err and content(target) == before


def test_release_folders(models: Path, tmp_path: Path, convert: Told) -> None:
    target = tmp_path / "m"
    tracker = target / "latest_checkpointed_iteration.txt"
    (target / "iter_0001000").mkdir(parents=True)
    tracker.write_text("1000\n")
    for also in ([], ["--overwrite"], ["--resume"], ["--dry-run"]):
        assert convert("import", models / "llama", target, "--release", *also) == 2
        assert f"{tracker} says '1000'" in convert.err
    assert tracker.read_text() == "1000\n" and not (target / "release").exists()
    tracker.unlink()
    old = os.umask(0o077)
    try:
        assert convert("import", models / "llama", target, "--release") == 0
    finally:
        os.umask(old)
    assert tracker.read_text() == "release\n" and tracker.stat().st_mode & 0o777 == 0o644
    assert {(target / n).stat().st_mode & 0o777 for n in ("release", "release/hf")} == {0o755}
    tracker.unlink()  # killed before it was written
    assert convert("import", models / "llama", target, "--release", "--resume") == 0
    assert "nothing was written" in convert.out and tracker.read_text() == "release\n"
    assert convert("export", target, tmp_path / "back") == 0
    assert (tmp_path / "back/config.json").read_bytes() == (models / "llama-export/config.json").read_bytes()


def test_nothing_is_written_by_a_dry_run(models: Path, tmp_path: Path, convert: Told) -> None:
    assert convert("import", models / "llama", tmp_path / "m", "--release", "--dry-run") == 0
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------------------- a damaged source


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_a_flipped_bit_of_a_source_with_checksums_is_found(
    copy: Callable[[str], Path], tmp_path: Path, convert: Told
) -> None:
    for name, how in (("llama-export", ["cast", "--dtype", "fp16"]), ("llama-megatron", ["export"])):
        source = copy(name)
        target = tmp_path / f"{name}-out"
        damaged = next(file for file in sorted(source.iterdir()) if file.suffix in (".safetensors", ".distcp"))
        flip(damaged)
        assert convert(how[0], source, target, *how[1:]) == 2
        assert f"{source}: {damaged.name}: its content changed" in convert.err and "--trust-source" in convert.err
        assert not target.exists()
        assert convert(how[0], source, target, *how[1:], "--trust-source") == 0
        assert f"check {source}" not in convert.err
        flip(damaged)
        assert convert(how[0], source, target, *how[1:], "--overwrite") == 0
        assert f"check {source}: " in convert.err  # progress


def test_another_program_s_manifest_is_no_checksum(models: Path, tmp_path: Path, convert: Told) -> None:
    source = tmp_path / "hf"
    shutil.copytree(models / "llama", source)
    (source / MANIFEST).write_text('{"files": ["config.json"]}')
    assert convert("import", source, tmp_path / "m") == 0 and "check " not in convert.err


# ------------------------------------------------------------------------------------------------ what a plan shows


def planned(convert: Told, *arguments: str | Path) -> dict[str, Any]:
    assert convert(*arguments, "--dry-run", "--json") == 0
    return dict(json.loads(convert.out))


def test_an_fp8_plan_lists_every_tensor_where_it_will_be(models: Path, tmp_path: Path, convert: Told) -> None:
    plan = planned(convert, "export", models / "v3-megatron", tmp_path / "out")
    assert convert("export", models / "v3-megatron", tmp_path / "out") == 0
    scales = tensors(models / "v3-megatron" / "hf")
    written: dict[str, torch.Tensor] = {}
    for file in plan["files"]:
        raw = (tmp_path / "out" / file["name"]).read_bytes()
        found = load_file(tmp_path / "out" / file["name"])
        written |= found
        assert {row["name"] for row in file["tensors"]} == found.keys()
        assert [row["start"] for row in file["tensors"]] == sorted(row["start"] for row in file["tensors"])
        for row in file["tensors"]:
            data = found[row["name"]].contiguous().view(torch.uint8).numpy().tobytes()
            assert raw[row["start"] : row["start"] + len(data)] == data, row["name"]
            assert row["shape"] == list(found[row["name"]].shape)
            name = row["name"].removesuffix("_scale_inv")
            if f"{name}_scale_inv" in scales:
                (kept,) = row["kept"]
                assert kept[0] == f"{name}_scale_inv"
                stored = scales[kept[0]].numpy().tobytes()
                assert Path(kept[1]).read_bytes()[kept[2] : kept[2] + len(stored)] == stored
    assert written.keys() == tensors(models / "v3").keys()
    assert sum(name.endswith("_scale_inv") for name in written) > 10


def test_an_fp8_plan_names_the_scales_that_are_multiplied(models: Path, tmp_path: Path, convert: Told) -> None:
    plan = planned(convert, "cast", models / "v3", tmp_path / "out", "--dtype", "bf16")
    source = tensors(models / "v3")
    for row in (row for file in plan["files"] for row in file["tensors"]):
        due = [f"{row['name']}_scale_inv"] if f"{row['name']}_scale_inv" in source else []
        assert [scale[0] for scale in row["scales"]] == due
        for name, file, start in row["scales"]:
            data = source[name].numpy().tobytes()
            assert Path(file).read_bytes()[start : start + len(data)] == data
    assert convert("cast", models / "v3", tmp_path / "out", "--dtype", "bf16", "--dry-run") == 0
    assert " dequantise <- " in convert.out and " with model.layers.0.self_attn.o_proj.weight_scale_inv" in convert.out


def test_what_memory_a_plan_tells(models: Path, tmp_path: Path, convert: Told) -> None:
    command = ("cast", models / "v3", tmp_path / "out", "--dtype", "bf16")
    one = planned(convert, *command)["memory"]
    three = planned(convert, *command, "--workers", "3")["memory"]
    assert one["workers"] == 1 and three["buffers"] == 3 * one["buffers"] > 3_000_000  # a worker's Scratch is 1.4 MB
    assert one["process"] > 50_000_000  # torch alone
    assert convert(*command, "--dry-run", "--workers", "2") == 0
    assert "for the imports and this plan (measured), " in convert.out and "buffers of 2 worker(s)" in convert.out


# --------------------------------------------------------------------------------------------------- mistaken input


def test_prediction_layers_that_the_config_does_not_announce(
    copy: Callable[[str], Path], tmp_path: Path, convert: Told
) -> None:
    source = copy("v3")
    edit_config(source, lambda config: config.pop("num_nextn_predict_layers"))
    for also in ([], ["--no-mtp"]):
        assert convert("import", source, tmp_path / "m", *also) == 2
        assert '"num_nextn_predict_layers": 1' in convert.err and "model.layers.2." in convert.err
    assert not (tmp_path / "m").exists()
    edit_config(source, lambda config: config.update(num_nextn_predict_layers=1))
    assert convert("import", source, tmp_path / "m") == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_shared_experts": None}, "n_shared_experts is None"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size is [64"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.quant_method is 'gptq'"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_theta is 10000.0 but rope_parameters says 7.0"),
    ],
)
def test_a_config_that_cannot_be_meant(
    change: dict[str, Any], words: str, copy: Callable[[str], Path], tmp_path: Path, convert: Told
) -> None:
    source = copy("v3")
    edit_config(source, lambda config: config.update(change))
    assert convert("import", source, tmp_path / "m") == 2
    assert str(source / "config.json") in convert.err and words in convert.err
    assert not (tmp_path / "m").exists()


def test_scales_of_another_dtype(copy: Callable[[str], Path], tmp_path: Path, convert: Told) -> None:
    source = copy("v3")
    loaded = tensors(source)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    loaded[name] = loaded[name].to(torch.int32)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    write_shards(source, loaded, 2)
    assert convert("import", source, tmp_path / "m") == 2
    assert name in convert.err and "I32" in convert.err and not (tmp_path / "m").exists()


def test_what_changes_no_tensor_is_converted_and_not_computed(
    copy: Callable[[str], Path], tmp_path: Path, convert: Told
) -> None:
    source = copy("llama")
    yarn = {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.9, "original_max_position_embeddings": 64}
    edit_config(source, lambda config: config.update(rope_scaling=yarn))
    assert convert("import", source, tmp_path / "m") == 0
    assert convert("export", tmp_path / "m", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_scaling"] == yarn
    assert convert("verify", tmp_path / "m", source, "--logits", "--json") == 1
    checks = {check["name"]: check for check in json.loads(convert.out)["checks"]}
    assert checks["inverse"]["state"] == "ok" and checks["logits"]["state"] == "failed"
    assert "'yarn' is not supported" in checks["logits"]["summary"]


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"metadata": [], "weight_map": {}}', "{}"])
def test_a_kept_index_that_is_damaged_is_written_anew(
    text: str, copy: Callable[[str], Path], models: Path, tmp_path: Path, convert: Told
) -> None:
    source = copy("llama-megatron")
    (source / "hf" / "model.safetensors.index.json").write_text(text)
    assert convert("export", source, tmp_path / "out") == 2  # its checksum is another
    assert convert("export", source, tmp_path / "out", "--trust-source") == 0
    name = "model.safetensors.index.json"
    found, due = (json.loads((folder / name).read_text()) for folder in (tmp_path / "out", models / "llama"))
    assert found == due


@pytest.mark.parametrize("given", ["inf", "nan", "0", "-1", "1e300", "five"])
def test_sizes_that_are_none(given: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", "import", str(models / "llama"), str(tmp_path / "m"), f"--shard-gb={given}"])
    assert caught.value.code == 2 and "allowed: a number above 0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ casts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_not_quantised_becomes_bf16(dtype: torch.dtype, tmp_path: Path, convert: Told) -> None:
    write_family(tmp_path / "hf", "deepseek_v3", dtype=dtype)
    assert convert("cast", tmp_path / "hf", tmp_path / "fp8", "--dtype", "fp8") == 0
    source, found = tensors(tmp_path / "hf"), tensors(tmp_path / "fp8")
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["dtype"] == "bfloat16"
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight"):
        assert torch.equal(found[name], source[name].bfloat16()), name
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(found[bias], source[bias]) and found[bias].dtype == torch.float32
    assert found["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert {value.dtype for name, value in found.items() if not name.endswith(("_scale_inv", "_bias"))} == {
        torch.bfloat16,
        torch.float8_e4m3fn,
    }


# ----------------------------------------------------------------------------------------------------- kept files


@pytest.fixture
def imported(copy: Callable[[str], Path]) -> Iterator[Path]:
    folder = copy("llama-megatron")
    (folder / MANIFEST).unlink()  # checksums would find it first
    (folder / "hf" / "origin.json").touch()
    yield folder
    assert not (folder / JOURNAL).exists() and not (folder / MANIFEST).exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("gone", [False, True])
def test_verify_compares_the_files_that_an_import_keeps(
    name: str, gone: bool, imported: Path, models: Path, convert: Told
) -> None:
    def config() -> dict[str, Any]:
        convert("verify", imported, models / "llama", "--json")
        return next(dict(check) for check in json.loads(convert.out)["checks"] if check["name"] == "config")

    assert config()["state"] == "ok"
    file = imported / "hf" / name
    if gone:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes().replace(b"0", b"1", 1) + b" ")
    assert config()["state"] == "failed" and f"hf/{name}" in json.dumps(config())


def test_everything_written_here_is_whole(models: Path) -> None:
    for name in ("llama-megatron", "v3-megatron", "llama-export"):
        assert check_manifest(models / name) == []
