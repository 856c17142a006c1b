"""Hugging Face -> Megatron -> Hugging Face gives the same files, byte for byte, for every family, spec and spelling."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.errors import UserError
from megatron_r1.convert import execute
from megatron_r1.convert import write as convert_write
from megatron_r1.convert.conversion import (
    cast_conversion,
    export_conversion,
    import_conversion,
    run,
)
from megatron_r1.convert.exporting import Scales
from megatron_r1.convert.formats import torch_dist
from megatron_r1.convert.formats.names import Spec
from megatron_r1.convert.manifest import fp8_blocks
from megatron_r1.model.block_fp8 import dequantise
from tests.reference.synthetic_hf import FAMILIES, quantised, write_family, write_shards

SPECS: tuple[Spec, ...] = ("te", "local")
Sources = Callable[..., Path]


pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Makes a synthetic checkpoint; the same arguments give the same folder."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("sources")

    def make(family: str, **settings: Any) -> Path:
        key = f"{family} {sorted(settings.items())}"
        if key not in made:
            made[key] = root / str(len(made))
            write_family(made[key], family, **settings)
        return made[key]

    return make


def there_and_back(source: Path, scratch: Path, spec: Spec = "te", workers: int = 1, **export: Any) -> Path:
    """The folder of the export of an import."""
    run(import_conversion(source, spec=spec), scratch / "megatron", workers=workers)
    run(export_conversion(scratch / "megatron", **export), scratch / "hf", workers=workers)
    return scratch / "hf"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the config, which has a test of its own, and what only conversions write."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ("config.json", "manifest.json")
    }


def assert_same_files(found: Path, expected: Path) -> None:
    one, two = contents(found), contents(expected)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def assert_index(folder: Path) -> None:
    """It names every tensor with its file, and their size; a single file has none."""
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (list(files) != ["model.safetensors"])
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"] == {name: file for file, inside in files.items() for name in inside}
        assert content["metadata"]["total_size"] == sum(t.nbytes for inside in files.values() for t in inside.values())


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(bits(found[name]), bits(value)), name


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().view(torch.uint8)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family: str, spec: Spec, sources: Sources, tmp_path: Path) -> None:
    source = sources(family, shards=3)
    back = there_and_back(source, tmp_path, spec)
    assert_same_files(back, source)
    assert len(list(back.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_gains_only_second_spellings(family: str, sources: Sources, tmp_path: Path) -> None:
    source = sources(family, shards=3)
    back = config(there_and_back(source, tmp_path))
    given = config(source)
    assert {key: back[key] for key in given} == given
    rope = {"rope_theta": given["rope_theta"], "rope_type": "default"}
    if given["rope_scaling"] is not None:
        scaling = {key: value for key, value in given["rope_scaling"].items() if key != "type"}
        rope = {**rope, "rope_type": given["rope_scaling"]["type"], **scaling}
    assert {key: back[key] for key in back.keys() - given.keys()} == {"dtype": "bfloat16", "rope_parameters": rope}


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_a_config_with_both_spellings_comes_back_byte_for_byte(family: str, sources: Sources, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources(family, shards=3), source)
    both = config(there_and_back(source, tmp_path / "first"))
    (source / "config.json").write_text(json.dumps(both, indent=3))  # not as this project would indent it
    back = there_and_back(source, tmp_path / "second")
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama-tied"])
def test_any_number_of_files(family: str, shards: int, sources: Sources, tmp_path: Path) -> None:
    """Small files on both sides: the Megatron checkpoint in many, the Hugging Face one as its origin was cut."""
    source = sources(family, shards=shards)
    run(import_conversion(source, file_bytes=50_000), tmp_path / "megatron")
    files = sorted(tmp_path.glob("megatron/*.distcp"))
    assert len(files) > 10
    assert sorted(file.name for file in files) == sorted(f"__0_{i}.distcp" for i in range(len(files)))
    largest = max(t.bytes for t in torch_dist.read_torch_dist(tmp_path / "megatron").tensors.values())
    assert all(file.stat().st_size < max(50_000, largest + 4096) for file in files)
    run(export_conversion(tmp_path / "megatron", shard_bytes=77_777), tmp_path / "hf")
    assert_same_files(tmp_path / "hf", source)


def test_without_the_origin_files_are_cut_by_size(sources: Sources, tmp_path: Path) -> None:
    source = sources("qwen3", shards=2)
    run(import_conversion(source), tmp_path / "megatron")
    like = tmp_path / "config.json"
    shutil.copy(source / "config.json", like)
    run(export_conversion(tmp_path / "megatron", like=like, shard_bytes=500_000), tmp_path / "hf")
    found = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(found) > 4
    for file in found:
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 500_000
    assert_same_tensors(tensors(tmp_path / "hf"), tensors(source))
    assert_index(tmp_path / "hf")


@pytest.mark.parametrize("scales", [True, "ue8m0"])
@pytest.mark.parametrize("spec", SPECS)
def test_fp8_comes_back(scales: Any, spec: Spec, sources: Sources, tmp_path: Path) -> None:
    """Through BF16 and the kept scales."""
    source = sources("deepseek_v3", fp8=scales, shards=3)
    back = there_and_back(source, tmp_path, spec)
    assert_same_files(back, source)
    assert config(back)["quantization_config"].items() >= config(source)["quantization_config"].items()
    archive = torch_dist.read_torch_dist(tmp_path / "megatron")
    assert {t.dtype for t in archive.tensors.values()} == {"BF16", "F32"}
    assert {t.name.rpartition(".")[2] for t in archive.tensors.values() if t.dtype == "F32"} == {"expert_bias"}


@pytest.mark.parametrize("scales", [True, "ue8m0"])
def test_only_the_kept_scales_bring_fp8_back(scales: Any, sources: Sources, tmp_path: Path) -> None:
    """A fresh quantisation would give every block another scale: the tests of round trips notice a lost one."""
    source = sources("deepseek_v3", fp8=scales, shards=3)
    run(import_conversion(source), tmp_path / "megatron")
    like = tmp_path / "config.json"
    shutil.copy(source / "config.json", like)  # no scales come with it
    run(export_conversion(tmp_path / "megatron", like=like, dtype="fp8"), tmp_path / "hf")
    found, stored = tensors(tmp_path / "hf"), tensors(source)
    kept = [name for name in stored if name.endswith("_scale_inv") and bool((found[name] == stored[name]).any())]
    assert not kept
    assert manifest(tmp_path / "hf")["fp8_blocks"]["kept"] == 0


@pytest.mark.parametrize("had", ["fp32", "power-of-2"])
def test_scales_of_another_format_are_made_anew(had: Scales, sources: Sources, tmp_path: Path) -> None:
    """All of them, as config.json says of all of them."""
    source = sources("deepseek_v3", fp8=True if had == "fp32" else "ue8m0", shards=3)
    wanted: Scales = "power-of-2" if had == "fp32" else "fp32"
    run(import_conversion(source), tmp_path / "megatron")
    run(export_conversion(tmp_path / "megatron", dtype="bf16"), tmp_path / "bf16")
    run(export_conversion(tmp_path / "megatron", scales=wanted), tmp_path / "hf")
    values = tensors(tmp_path / "bf16")
    assert_same_tensors(tensors(tmp_path / "hf"), quantised(values, power_of_2=wanted == "power-of-2"))
    assert config(tmp_path / "hf")["quantization_config"].get("scale_fmt") == (
        "ue8m0" if wanted == "power-of-2" else None
    )
    run(export_conversion(tmp_path / "megatron", scales=had), tmp_path / "as-it-was")
    assert_same_tensors(tensors(tmp_path / "as-it-was"), tensors(source))


def test_a_float32_checkpoint_of_values_from_bf16_keeps_its_blocks(sources: Sources, tmp_path: Path) -> None:
    """As a run saves them that computes in BF16, or began with it, and stores float32."""
    source = sources("deepseek_v3", fp8=True, shards=3)
    run(cast_conversion(source, dtype="bf16"), tmp_path / "bf16")
    run(import_conversion(tmp_path / "bf16", dtype="fp32"), tmp_path / "megatron")
    assert {t.dtype for t in torch_dist.read_torch_dist(tmp_path / "megatron").tensors.values()} == {"F32"}
    run(export_conversion(tmp_path / "megatron", like=source), tmp_path / "hf")
    assert_same_files(tmp_path / "hf", source)


def test_blocks_are_counted_also_over_an_interruption(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources("deepseek_v3", fp8=True, shards=3)
    scales = [value for name, value in tensors(source).items() if name.endswith("_scale_inv")]
    total = sum(scale.numel() for scale in scales)
    run(import_conversion(source), tmp_path / "megatron")
    conversion = export_conversion(tmp_path / "megatron")
    assert any("written as FP8 because" in note and "--dtype bf16" in note for note in conversion.notes)
    assert not export_conversion(tmp_path / "megatron", dtype="fp8").notes
    write = convert_write.write_file

    def second_fails(file: Any, *rest: Any) -> Any:
        if file.name.startswith("model-00002"):
            raise UserError("stopped")
        return write(file, *rest)

    monkeypatch.setattr(convert_write, "write_file", second_fails)
    with pytest.raises(UserError, match="stopped"):
        run(conversion, tmp_path / "hf")
    monkeypatch.setattr(convert_write, "write_file", write)
    run(conversion, tmp_path / "hf", resume=True)
    counted = manifest(tmp_path / "hf")["fp8_blocks"]
    assert (counted["kept"], counted["new"]) == (total, 0) and len(counted["files"]) == 3
    blocks = fp8_blocks(tmp_path / "hf")
    assert str(blocks) == f"{total} of {total} FP8 blocks keep the bytes they came with, 0 were quantised anew"
    run(export_conversion(tmp_path / "megatron", dtype="bf16"), tmp_path / "bf16")
    assert "fp8_blocks" not in manifest(tmp_path / "bf16") and not fp8_blocks(tmp_path / "bf16")


def test_scales_that_an_import_kept_and_are_gone(sources: Sources, tmp_path: Path) -> None:
    """Without them every block would be quantised anew, and the origin still be said to be FP8."""
    source = sources("deepseek_v3", fp8=True, shards=3)
    run(import_conversion(source), tmp_path / "megatron")
    (tmp_path / "megatron" / "hf" / "scales.safetensors").unlink()
    with pytest.raises(UserError, match=r"scales\.safetensors lacks the block scales of .*--like"):
        export_conversion(tmp_path / "megatron")
    run(export_conversion(tmp_path / "megatron", like=source), tmp_path / "hf")
    assert_same_files(tmp_path / "hf", source)


def test_prediction_layers_left_out_of_fp8(sources: Sources, tmp_path: Path) -> None:
    source = sources("deepseek_v3", fp8=True, shards=3)
    run(import_conversion(source, predictions=False), tmp_path / "megatron")
    run(export_conversion(tmp_path / "megatron", predictions=False), tmp_path / "hf")
    expected = {name: value for name, value in tensors(source).items() if not name.startswith("model.layers.2.")}
    assert_same_tensors(tensors(tmp_path / "hf"), expected)


@pytest.mark.parametrize("scales", [True, "ue8m0"])
def test_fp8_becomes_the_slow_reference_s_bf16(scales: Any, sources: Sources, tmp_path: Path) -> None:
    source = sources("deepseek_v3", fp8=scales, shards=3)
    stored = tensors(source)
    expected = {}
    for name, value in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(f"{name}_scale_inv")
        expected[name] = value if scale is None else dequantise(value, scale, (128, 128)).bfloat16()
    assert sum(value.dtype == torch.float8_e4m3fn for value in stored.values()) > 40
    run(cast_conversion(source, dtype="bf16"), tmp_path / "cast")
    assert_same_tensors(tensors(tmp_path / "cast"), expected)
    back = there_and_back(source, tmp_path, dtype="bf16")
    assert_same_tensors(tensors(back), expected)
    for folder in (tmp_path / "cast", back):
        assert_index(folder)
        assert "quantization_config" not in config(folder) and config(folder)["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("scales", ["fp32", "power-of-2"])
def test_fp8_cast_there_and_back(scales: Scales, sources: Sources, tmp_path: Path) -> None:
    """Without the old scales. Codes stay and float32 scales move within BF16's rounding. Scales of powers of two keep
    every value, though those twice as large as they have to be (`write_family`) become half, or a quarter where the
    block's largest value was rounded down to half the range.
    """
    power = scales == "power-of-2"
    source = sources("deepseek_v3", fp8="ue8m0" if power else True, shards=3)
    run(cast_conversion(source, dtype="bf16"), tmp_path / "bf16")
    run(cast_conversion(tmp_path / "bf16", dtype="fp8", scales=scales), tmp_path / "fp8")
    run(cast_conversion(tmp_path / "fp8", dtype="bf16"), tmp_path / "bf16-again")
    found, expected = tensors(tmp_path / "fp8"), tensors(source)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith("_scale_inv"):
            ratio = found[key] / value
            assert set(ratio.flatten().tolist()) <= {0.5, 0.25} if power else (ratio - 1).abs().max() < 2**-8, key
        elif not power:
            assert torch.equal(bits(found[key]), bits(value)), key
    if power:
        assert_same_tensors(tensors(tmp_path / "bf16-again"), tensors(tmp_path / "bf16"))
    assert config(tmp_path / "fp8")["quantization_config"].get("scale_fmt") == ("ue8m0" if power else None)


def test_bf16_cast_to_fp8_is_the_slow_reference_s(sources: Sources, tmp_path: Path) -> None:
    source = sources("deepseek_v3", shards=3)
    names: tuple[Scales, ...] = ("fp32", "power-of-2")
    for name in names:
        run(cast_conversion(source, dtype="fp8", scales=name), tmp_path / name)
        assert_same_tensors(tensors(tmp_path / name), quantised(tensors(source), power_of_2=name == "power-of-2"))


def test_trained_blocks_get_new_scales_and_others_keep_theirs(sources: Sources, tmp_path: Path) -> None:
    """One weight changed in the Megatron checkpoint: only its block of codes and its scale change on export."""
    source = sources("deepseek_v3", fp8=True, shards=3)
    run(import_conversion(source), tmp_path / "megatron")
    stored = torch_dist.read_torch_dist(tmp_path / "megatron").tensors["decoder.layers.0.mlp.linear_fc2.weight"]
    (chunk,) = stored.chunks
    row, column = 130, 5  # in the block (1, 0)
    with open(chunk.file, "r+b") as file:
        file.seek(chunk.start + (row * stored.shape[1] + column) * 2)
        file.write(torch.tensor([7.5], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    run(export_conversion(tmp_path / "megatron"), tmp_path / "hf")
    found, expected = tensors(tmp_path / "hf"), tensors(source)
    name = "model.layers.0.mlp.down_proj.weight"
    changed = {key for key in expected if not torch.equal(bits(found[key]), bits(expected[key]))}
    assert changed == {name, f"{name}_scale_inv"}
    scale = found[f"{name}_scale_inv"]
    moved = (scale != expected[f"{name}_scale_inv"]).nonzero().tolist()
    assert moved == [[1, 0]] and scale[1, 0] == torch.tensor(7.5) / 448
    codes = bits(found[name]) != bits(expected[name])
    assert codes.nonzero()[:, 0].min() >= 128 and codes.nonzero()[:, 1].max() < 128
    assert dequantise(found[name], scale, (128, 128))[row, column] == 7.5


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "qwen3_moe"])
def test_float32_comes_back(family: str, sources: Sources, tmp_path: Path) -> None:
    source = sources(family, dtype=torch.float32)
    assert_same_files(there_and_back(source, tmp_path), source)
    assert {t.dtype for t in torch_dist.read_torch_dist(tmp_path / "megatron").tensors.values()} == {"F32"}


def test_other_dtypes_are_torch_s_casts(sources: Sources, tmp_path: Path) -> None:
    """On the way in, on the way out, or both; the router's bias stays float32."""
    source = sources("deepseek_v3", dtype=torch.float32)
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    for name, dtype in names.items():
        bias = "e_score_correction_bias"
        expected = {k: v if k.endswith(bias) else v.to(dtype) for k, v in tensors(source).items()}
        run(import_conversion(source, dtype=name), tmp_path / f"in-{name}")
        run(export_conversion(tmp_path / f"in-{name}", dtype=name), tmp_path / f"in-{name}-hf")
        run(import_conversion(source), tmp_path / "as-is", overwrite=True)
        run(export_conversion(tmp_path / "as-is", dtype=name), tmp_path / f"out-{name}")
        for folder in (tmp_path / f"in-{name}-hf", tmp_path / f"out-{name}"):
            assert_same_tensors(tensors(folder), expected)
            assert config(folder)["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_prediction_layers_left_out(sources: Sources, tmp_path: Path) -> None:
    """On either way, and both: what is left is the decoder's, and the config says that there are no such layers."""
    source = sources("deepseek_v3", shards=3)
    whole = tensors(source)
    expected = {name: value for name, value in whole.items() if not name.startswith("model.layers.2.")}
    assert len(expected) < len(whole)
    run(import_conversion(source), tmp_path / "with")
    run(import_conversion(source, predictions=False), tmp_path / "without")
    assert not [name for name in torch_dist.read_torch_dist(tmp_path / "without").tensors if name.startswith("mtp.")]
    for name in ("with", "without"):
        run(export_conversion(tmp_path / name, predictions=False), tmp_path / f"{name}-hf")
        assert_same_tensors(tensors(tmp_path / f"{name}-hf"), expected)
        assert config(tmp_path / f"{name}-hf")["num_nextn_predict_layers"] == 0
        assert_index(tmp_path / f"{name}-hf")
    # The result is a checkpoint of its own.
    assert_same_files(there_and_back(tmp_path / "with-hf", tmp_path / "again"), tmp_path / "with-hf")
    with pytest.raises(UserError, match="--no-mtp"):
        export_conversion(tmp_path / "without")


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_workers_give_the_same_bytes(family: str, sources: Sources, tmp_path: Path) -> None:
    source = sources(family, shards=5, fp8=family == "deepseek_v3")
    for workers in (1, 3):
        run(import_conversion(source, file_bytes=300_000), tmp_path / f"m{workers}", workers=workers)
        run(export_conversion(tmp_path / f"m{workers}"), tmp_path / f"h{workers}", workers=workers)
    assert_same_files(tmp_path / "m3", tmp_path / "m1")
    assert_same_files(tmp_path / "h3", tmp_path / "h1")
    assert_same_files(tmp_path / "h3", source)


@pytest.mark.parametrize("band", [5000, 40_000])
def test_the_size_of_a_band_changes_nothing(
    band: int, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small tensors in many bands go through what large ones go through."""
    monkeypatch.setattr(execute, "BAND", band)
    for family, fp8 in (("deepseek_v3", True), ("qwen2", False)):
        source = sources(family, fp8=fp8, shards=3)
        assert_same_files(there_and_back(source, tmp_path / family), source)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2-tied"])
def test_a_tied_head_that_is_stored_comes_back(family: str, sources: Sources, tmp_path: Path) -> None:
    """Some checkpoints hold it though config.json ties it; one that differs would be lost, so it is refused."""
    source = tmp_path / "source"
    shutil.copytree(sources(family, shards=3), source)
    held = tensors(source)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    write_shards(source, held, 3)
    assert_same_files(there_and_back(source, tmp_path), source)
    run(cast_conversion(source, dtype="fp16"), tmp_path / "fp16")
    assert_same_tensors(tensors(tmp_path / "fp16"), {name: value.half() for name, value in held.items()})
    (tmp_path / "only").mkdir()
    shutil.copy(source / "config.json", tmp_path / "only")
    run(export_conversion(tmp_path / "megatron", like=tmp_path / "only"), tmp_path / "plain")
    assert "lm_head.weight" not in tensors(tmp_path / "plain")  # where nothing says that the model had it
    held["lm_head.weight"][7, 7] += 1
    write_shards(source, held, 3)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens.*tie_word_embeddings"):
        run(import_conversion(source), tmp_path / "again")


def test_copies_that_differ_are_refused(sources: Sources, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources("deepseek_v3", shards=3), source)
    changed = tensors(source)
    name = "model.layers.2.embed_tokens.weight"
    changed[name] = changed[name].clone()
    changed[name][-1, -1] += 1
    write_shards(source, changed, 3)
    with pytest.raises(UserError, match=re.escape(f"{name} differs from model.embed_tokens.weight")):
        run(import_conversion(source), tmp_path / "megatron")
    assert not (tmp_path / "megatron" / ".metadata").exists()
    run(import_conversion(source, predictions=False), tmp_path / "megatron", overwrite=True)
