"""What `convert verify` says of good folders, and that each way of being wrong is found by the check that is for it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.cli import main
from megatron_r1.config.errors import UserError
from megatron_r1.convert.conversion import cast_conversion, export_conversion, import_conversion, run
from megatron_r1.convert.correspondence import Correspondence
from megatron_r1.convert.formats.hf_files import read_hf
from megatron_r1.convert.formats.torch_dist import read_torch_dist
from megatron_r1.convert.manifest import MANIFEST, FileRecord, write_manifest, xxh3_128
from megatron_r1.convert.storage import Archive
from megatron_r1.convert.verification.report import Check, Report
from megatron_r1.convert.verification.verify import verify
from megatron_r1.model.presets import load_architecture
from tests.reference.hf_weights import to_megatron
from tests.reference.synthetic_hf import FAMILIES, write_family

EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
ALL = dict.fromkeys(("checksums", "complete", "structure", "config", "inverse"), "ok") | {"logits": "not done"}


pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversions that went well: of DeepSeek-V3 in FP8 and of Llama in float32."""
    root = tmp_path_factory.mktemp("good")
    write_family(root / "v3", "deepseek_v3", fp8=True)
    run(import_conversion(root / "v3"), root / "v3-megatron")
    run(export_conversion(root / "v3-megatron"), root / "v3-export")
    run(export_conversion(root / "v3-megatron", dtype="bf16"), root / "v3-bf16")
    run(export_conversion(root / "v3-megatron", predictions=False), root / "v3-no-mtp")
    write_family(root / "llama", "llama", dtype=torch.float32)
    run(import_conversion(root / "llama"), root / "llama-megatron")
    run(export_conversion(root / "llama-megatron"), root / "llama-export")
    run(cast_conversion(root / "llama", dtype="fp8", scales="power-of-2"), root / "llama-fp8")
    return root


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of them, to be damaged."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(good / name, tmp_path / name))

    return make


def check(target: Path, source: Path | None = None, **options: Any) -> Report:
    settings: dict[str, Any] = dict(like=None, predictions=True, logits=False, workers=2, progress=lambda count: None)
    report = verify(target, source, **{**settings, **options})
    json.dumps(report.as_dict(), allow_nan=False)
    return report


def states(report: Report) -> dict[str, str]:
    return {found.name: found.state for found in report.checks}


def named(report: Report, name: str) -> Check:
    return next(found for found in report.checks if found.name == name)


def only_failed(report: Report, name: str) -> Check:
    """The one check that failed; all lines of it together are in what people read."""
    assert [found.name for found in report.checks if found.state == "failed"] == [name], report.lines()
    assert not report.ok
    assert report.lines()[-1].endswith(f"FAILED: {name}")
    return named(report, name)


def sign(folder: Path) -> None:
    """Make manifest.json say that the folder is as it should be."""
    names = json.loads((folder / MANIFEST).read_text())["files"]
    records = {
        n: FileRecord((folder / n).stat().st_size, xxh3_128(folder / n)) for n in names if (folder / n).is_file()
    }
    write_manifest(folder, records, {})


def flip(archive: Archive, name: str, element: int = 0, chunk: int = 0) -> None:
    """Change the lowest bit of the last byte (sign and exponent) of one element of a tensor of two bytes each."""
    place = archive.tensors[name].chunks[chunk]
    with open(place.file, "r+b") as file:
        file.seek(place.start + 2 * element + 1)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a Hugging Face folder as one file of changed tensors, without a manifest."""
    tensors = {n: value for file in sorted(folder.glob("*.safetensors")) for n, value in load_file(file).items()}
    for file in [*folder.glob("*.safetensors*"), *folder.glob(MANIFEST)]:
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---- good folders


@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("v3-export", "v3-megatron"),
        ("v3-bf16", "v3-megatron"),
        ("v3-bf16", "v3"),
        ("v3-export", "v3"),
        ("llama-export", "llama-megatron"),
        ("llama-fp8", "llama"),
    ],
)
def test_good_hugging_face_folders(good: Path, target: str, source: str) -> None:
    report = check(good / target, good / source)
    assert states(report) == ALL, report.lines()
    assert report.ok
    assert named(report, "inverse").numbers["tensors"] >= len(Correspondence(load_architecture(good / target)).hf_names)
    assert report.lines()[-1] == f"{good / target}: ok"


@pytest.mark.parametrize("name", ["v3", "llama"])
def test_good_imports(good: Path, name: str) -> None:
    report = check(good / f"{name}-megatron", good / name)
    assert states(report) == {**ALL, "structure": "not done"}, report.lines()
    assert report.ok


def test_bytes_by_operation_are_those_of_the_model(good: Path) -> None:
    """Every byte of every tensor is compared, and a report says what a conversion does to it."""
    report = check(good / "v3-export", good / "v3-megatron")
    found = named(report, "inverse").numbers["bytes"]
    tensors = [t for t in read_hf(good / "v3-export").tensors.values() if not t.name.endswith("_scale_inv")]
    assert found["quantise"] == sum(t.bytes for t in tensors if t.dtype == "F8_E4M3") > 0
    assert found["copy"] == sum(t.bytes for t in tensors if t.dtype != "F8_E4M3") > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_downloaded_model(family: str, tmp_path: Path) -> None:
    write_family(tmp_path, family)
    report = check(tmp_path)
    assert report.ok, report.lines()
    found = {"checksums": "not done", "inverse": "not done"}
    assert states(report) == {**ALL, **found}
    assert "no manifest.json" in named(report, "checksums").summary


def test_a_legacy_checkpoint_of_two_ranks_with_a_padded_vocabulary(good: Path, tmp_path: Path) -> None:
    source, table = good / "llama", Correspondence(load_architecture(good / "llama"))
    weights = {n: value for file in source.glob("*.safetensors") for n, value in load_file(file).items()}
    whole = to_megatron(weights, 8, 2, latent=False)
    for rank in range(2):
        state = {}
        for name, value in whole.items():
            how = table.split(name)
            if how == "vocab":
                value = torch.cat([value, torch.full((12, value.shape[1]), 7.0)])
            parts = [*value.chunk(2)] if how == "gate_up" else [value]
            cut = [part.chunk(2, 1 if how == "row" else 0)[rank] if how != "none" else part for part in parts]
            state[name] = torch.cat(cut).clone()
        folder = tmp_path / "iter_0000007" / f"mp_rank_0{rank}"
        folder.mkdir(parents=True)
        torch.save({"model": state, "args": argparse.Namespace(x=1)}, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    report = check(tmp_path, source)
    assert report.ok, report.lines()
    assert states(report) == {**dict.fromkeys(ALL, "not done"), "complete": "ok", "inverse": "ok"}
    assert states(check(good / "llama-export", tmp_path))["inverse"] == "ok", "and as a source, without a kept config"


def test_without_multi_token_prediction(good: Path) -> None:
    report = check(good / "v3-no-mtp", good / "v3-megatron", predictions=False)
    assert states(report) == ALL, report.lines()
    assert "--no-mtp" in only_failed(check(good / "v3-no-mtp", good / "v3-megatron"), "inverse").details[0]


# ---- damaged ones


def test_a_flipped_bit_that_only_the_inverse_can_see(good: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("v3-bf16")
    flip(read_hf(folder), EXPERT, element=300)
    assert "model" in only_failed_both(folder, good / "v3-megatron")
    sign(folder)
    found = only_failed(check(folder, good / "v3-megatron"), "inverse")
    first, second = (load_file(good_or_not / "model.safetensors")[EXPERT] for good_or_not in (good / "v3-bf16", folder))
    (difference,) = found.numbers["differences"]
    gap = float((first.double() - second.double()).abs().max())
    assert difference == {"tensor": EXPERT, "elements": 1, "of": first.numel(), "largest": gap, "why": ""}
    assert gap > 0
    assert f"{EXPERT}: 1 of {first.numel():,} elements differ" in "\n".join(check(folder, good / "v3").lines())


def only_failed_both(folder: Path, source: Path) -> str:
    """Details of checksums; inverse fails as well."""
    report = check(folder, source)
    assert [found.name for found in report.checks if found.state == "failed"] == ["checksums", "inverse"]
    return named(report, "checksums").details[0]


def test_a_flipped_bit_in_a_stacked_expert_of_megatron(good: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("v3-megatron")
    archive = read_torch_dist(folder)
    key = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    chunk = next(i for i, c in enumerate(archive.tensors[key].chunks) if c.offsets[:2] == (5, 160))  # its up rows
    flip(archive, key, element=7, chunk=chunk)
    sign(folder)
    (difference,) = only_failed(check(folder, good / "v3"), "inverse").numbers["differences"]
    assert difference["tensor"] == "decoder.layers.1.mlp.experts.5.linear_fc1.weight"
    assert (difference["elements"], difference["of"]) == (1, 2 * 160 * 256)
    assert [d["tensor"] for d in check(good / "v3-bf16", folder).as_dict()["checks"][4]["differences"]] == [EXPERT]


def test_values_that_are_no_numbers(good: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("llama-export")
    edit(folder, lambda tensors: tensors["model.norm.weight"][3:5].fill_(torch.nan))
    (difference,) = named(check(folder, good / "llama"), "inverse").numbers["differences"]
    assert (difference["tensor"], difference["elements"], difference["largest"]) == ("model.norm.weight", 2, None)


@pytest.mark.parametrize("source", ["v3-megatron", "v3"])
def test_a_changed_scale(good: Path, copy: Callable[[str], Path], source: str) -> None:
    """Against a Megatron checkpoint, which keeps the scales, and against the FP8 folder itself."""
    folder = copy("v3-export")
    name = EXPERT + "_scale_inv"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][1, 0] *= 1.5

    edit(folder, change)
    (difference,) = only_failed(check(folder, good / source), "inverse").numbers["differences"]
    before = {n: v for file in (good / "v3").glob("*.safetensors") for n, v in load_file(file).items()}[name]
    assert (difference["tensor"], difference["elements"], difference["of"]) == (name, 1, 4)
    assert difference["largest"] == pytest.approx(0.5 * float(before[1, 0]))


def test_a_changed_scale_that_an_import_keeps(good: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("v3-megatron")
    file = folder / "hf" / "scales.safetensors"
    tensors = load_file(file)
    tensors[EXPERT + "_scale_inv"][0, 1] *= 2
    save_file(tensors, file)
    sign(folder)
    found = only_failed(check(folder, good / "v3"), "inverse").numbers["differences"]
    assert {d["tensor"] for d in found} == {EXPERT + "_scale_inv"}
    tensors.pop("model.layers.0.mlp.up_proj.weight_scale_inv")
    save_file(tensors, file)
    sign(folder)
    summary = only_failed(check(folder, good / "v3"), "inverse").summary
    assert "lacks the block scales of model.layers.0.mlp.up_proj.weight," in summary


def test_scales_that_are_no_powers_of_two_though_the_config_says_so(copy: Callable[[str], Path]) -> None:
    folder = copy("llama-fp8")
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    edit(folder, lambda tensors: tensors[name].view(-1)[:2].mul_(torch.tensor([1.5, 0.0])))
    report = check(folder)
    assert only_failed(report, "config").summary == f"scale_fmt is ue8m0, but 1 scales of {name} are no powers of two"
    edit(folder, lambda tensors: tensors[name].view(-1)[:1].div_(1.5))
    assert check(folder).ok


def test_scales_that_nothing_keeps(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """Those of a published model are not what quantising its values again would give."""
    source = copy("v3")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] *= 1.3

    edit(source, change)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    run(import_conversion(source), megatron)
    run(export_conversion(megatron), back)
    assert check(back, megatron).ok
    shutil.rmtree(megatron / "hf")
    found = only_failed(check(back, megatron), "inverse")
    assert "--like" in found.notes[0]
    assert {line.split(":")[0].rsplit(".", 1)[1] for line in found.details} <= {"weight", "weight_scale_inv"}
    assert check(back, megatron, like=source).ok


def test_a_missing_copy_of_the_embedding(good: Path, copy: Callable[[str], Path]) -> None:
    """Loaders can do without, but the model came with it."""
    folder = copy("v3-export")
    edit(folder, lambda tensors: tensors.pop("model.layers.2.embed_tokens.weight"))
    found = only_failed(check(folder, good / "v3-megatron"), "inverse")
    assert found.details[0].startswith("model.layers.2.embed_tokens.weight: missing")


def test_a_bias_of_the_router_in_bf16(good: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("v3-bf16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    assert "F32" in only_failed(check(folder, good / "v3-megatron"), "inverse").details[0]


def test_a_renamed_key_and_a_wrong_shape(copy: Callable[[str], Path], good: Path) -> None:
    folder = copy("llama-export")
    edit(folder, lambda tensors: tensors.update({"model.norm.weigth": tensors.pop("model.norm.weight")}))
    report = check(folder, good / "llama-megatron")
    summary = only_failed(report, "complete").summary
    assert "model.norm.weight" in summary and "model.norm.weigth" in summary
    assert "see complete" in named(report, "inverse").summary
    edit(
        folder,
        lambda tensors: tensors.update(
            {"model.norm.weight": tensors.pop("model.norm.weigth"), "lm_head.weight": torch.zeros(499, 256)}
        ),
    )
    assert "[499, 256] instead of [500, 256]" in only_failed(check(folder), "complete").summary


def test_a_downloaded_model_without_its_prediction_layer(copy: Callable[[str], Path]) -> None:
    folder = copy("v3-bf16")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            del tensors[name]

    edit(folder, drop)
    assert "--no-mtp" in only_failed(check(folder), "complete").summary
    assert check(folder, predictions=False).ok


def test_missing_manifests(good: Path, copy: Callable[[str], Path]) -> None:
    hf, megatron = copy("llama-export"), copy("llama-megatron")
    for folder in (hf, megatron):
        (folder / MANIFEST).unlink()
    assert states(check(hf, good / "llama")) == {**ALL, "checksums": "not done"}
    assert "a conversion wrote" in only_failed(check(megatron, good / "llama"), "checksums").summary
    (hf / ".conversion-journal.jsonl").write_text("{}\n")
    assert "--resume" in only_failed(check(hf, good / "llama"), "checksums").summary


def test_a_config_that_says_another_model(good: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("llama-export")
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10000.0
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)
    details = "\n".join(only_failed(check(folder, good / "llama-megatron"), "config").details)
    assert "rope_theta: 10000.0 instead of 500000.0" in details
    assert "dtype is BF16, most tensors are F32" in details


def test_a_quantization_config_that_does_not_fit(copy: Callable[[str], Path]) -> None:
    fp8, plain = copy("v3-export"), copy("v3-bf16")
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (fp8, plain))
    two["quantization_config"] = one.pop("quantization_config")
    for folder, config in ((fp8, one), (plain, two)):
        (folder / "config.json").write_text(json.dumps(config))
        sign(folder)
        assert "quantization_config" in only_failed(check(folder), "config").summary


def test_what_an_import_keeps(good: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("llama-megatron")
    record = json.loads((folder / "hf" / "origin.json").read_text())
    record["dtypes"]["lm_head.weight"] = "BF16"
    (folder / "hf" / "origin.json").write_text(json.dumps(record))
    sign(folder)
    assert "hf/origin.json" in only_failed(check(folder, good / "llama"), "config").details[0]


def test_another_model_as_the_source(good: Path) -> None:
    assert only_failed_names(check(good / "llama-export", good / "v3-megatron")) == ["config", "inverse"]


def only_failed_names(report: Report) -> list[str]:
    return [found.name for found in report.checks if found.state == "failed"]


def test_a_damaged_source(good: Path, copy: Callable[[str], Path]) -> None:
    source = copy("llama-megatron")
    (source / "__0_0.distcp").write_bytes(b"")
    assert "truncated" in only_failed(check(good / "llama-export", source), "inverse").summary


# ---- arguments and output


def test_arguments(good: Path, copy: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        check(good / "nothing")
    megatron = copy("llama-megatron")
    shutil.rmtree(megatron / "hf")
    with pytest.raises(UserError, match="--like"):
        check(megatron)
    assert named(check(megatron, like=good / "llama" / "config.json"), "complete").state == "ok"


def test_exit_status_and_details(good: Path, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("llama-export")
    edit(folder, lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    assert main(["convert", "verify", str(folder), str(good / "llama")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("elements differ, the largest by" in line for line in lines) == 8
    assert any("and 22 more" in line for line in lines)
    assert lines[-1] == f"{folder}: FAILED: inverse"
