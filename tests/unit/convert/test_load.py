"""Live models are filled with the right values from any checkpoint, and Megatron itself reads and writes the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file

from megatron_r1.checkpoint.io import _save_without_a_manager_process, sharding_metadata
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, Precision
from megatron_r1.convert import execute, load
from megatron_r1.convert.conversion import export_conversion, import_conversion, run
from megatron_r1.convert.load import load_into
from megatron_r1.convert.source import open_source
from megatron_r1.model.block_fp8 import dequantise
from megatron_r1.model.build import build_model, unwrap
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from tests.reference.hf_weights import to_megatron
from tests.reference.synthetic_hf import FAMILIES, write_family

Sources = Callable[..., Path]
EXTRAS = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "shared_head.norm.weight": "final_layernorm.weight",
}


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


pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Values of a folder; FP8 ones in float32, by the slow reference."""
    stored = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    return {
        name: dequantise(value, stored[f"{name}_scale_inv"], (128, 128))
        if value.dtype == torch.float8_e4m3fn
        else value
        for name, value in stored.items()
        if not name.endswith("_scale_inv")
    }


def reference(folder: Path) -> dict[str, torch.Tensor]:
    """What Megatron's model should hold, by the slow way, under the names of its modules."""
    config, source = json.loads((folder / "config.json").read_text()), hf_tensors(folder)
    heads, groups, layers = (config[f"num_{x}"] for x in ("attention_heads", "key_value_heads", "hidden_layers"))
    for name in [n for n in source if n.endswith((".embed_tokens.weight", ".shared_head.head.weight"))]:
        if name != "model.embed_tokens.weight":
            del source[name]
    extras = {
        f"mtp.layers.0.{new}": source.pop(f"model.layers.{layers}.{old}")
        for old, new in EXTRAS.items()
        if f"model.layers.{layers}.{old}" in source
    }
    made = to_megatron(source, heads, groups, config["model_type"] == "deepseek_v3")
    predicting = f"decoder.layers.{layers}."
    renamed = {name.replace(predicting, "mtp.layers.0.transformer_layer."): value for name, value in made.items()}
    return {**renamed, **extras}


def fresh_model(folder: Path, world: World, precision: Precision = "fp32") -> torch.nn.Module:
    settings = ModelConfig(config=folder, precision=precision)
    return unwrap(build_model(architecture(settings, 0), settings, world)[0])


def held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and the router's biases."""
    return {
        name: value.detach()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and not name.endswith("local_tokens_per_expert")
    }


def assert_holds(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = held(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def arch_of(folder: Path) -> dict[str, Any]:
    return architecture(ModelConfig(config=folder), 0)


def fill(model: Any, folder: Path, world: World, arch_from: Path) -> list[str]:
    arch = arch_of(arch_from)
    predictions = bool(arch.get("num_nextn_predict_layers"))
    return load_into([model], open_source(folder, arch, predictions=predictions), sharding_metadata(world))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_holds_what_the_folder_says(family: str, world: World, sources: Sources, tmp_path: Path) -> None:
    """From the Hugging Face folder, and from its import under either spec."""
    source = sources(family)
    expected = reference(source)
    assert len({name.split(".")[0] for name in expected}) == (4 if family == "deepseek_v3" else 3 - ("tied" in family))
    for spec in ("te", "local"):
        run(import_conversion(source, spec=spec), tmp_path / spec)  # type: ignore[arg-type]
    for folder in (source, tmp_path / "te", tmp_path / "local"):
        model = fresh_model(source, world)
        assert fill(model, folder, world, source) == []
        assert_holds(model, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scales", [True, "ue8m0"])
def test_fp8_folders_are_dequantised_on_the_way(
    precision: Precision, scales: Any, world: World, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a float32 model without a rounding to BF16; in small bands."""
    monkeypatch.setattr(load, "BAND", 3000)
    monkeypatch.setattr(execute, "BAND", 3000)
    source = sources("deepseek_v3", fp8=scales)
    model = fresh_model(source, world, precision)
    assert fill(model, source, world, source) == []
    assert_holds(model, reference(source))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "qwen2-tied", "qwen3", "qwen3_moe", "llama"])
def test_megatron_loads_an_import_strictly(family: str, world: World, sources: Sources, tmp_path: Path) -> None:
    source = sources(family)
    run(import_conversion(source, spec="local", file_bytes=400_000), tmp_path / "m")
    model: Any = fresh_model(source, world)
    state = model.sharded_state_dict(metadata=sharding_metadata(world))
    loaded, missing, unexpected = dist_checkpointing.load(
        {"model": state}, str(tmp_path / "m"), strict=dist_checkpointing.validation.StrictHandling.RETURN_ALL
    )
    assert (missing, unexpected) == (set(), set())
    model.load_state_dict(loaded["model"], strict=True)
    assert_holds(model, reference(source))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "qwen2-tied", "qwen3", "qwen3_moe", "llama"])
def test_logits_are_those_of_transformers(family: str, world: World, sources: Sources, tmp_path: Path) -> None:
    """float32, from an import, against transformers' own reading of the same folder; without multi-token prediction,
    which transformers ignores. DeepSeek-V3 with YaRN, routing in groups and a router bias that matters.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it lists the prediction layers, which it does not know
    source = sources(family, dtype=torch.float32)
    run(import_conversion(source), tmp_path / "m")
    ours: Any = fresh_model(source, world).eval()
    fill(ours, tmp_path / "m", world, source)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.randint(0, 500, (2, 100), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = ours(tokens, torch.arange(100).expand(2, 100), None)
        expected = theirs(tokens).logits
    assert expected.std() > 0.1, "the logits say something"
    largest = (found - expected).abs().max().item()
    assert largest <= 1e-4, f"{family}: logits differ by up to {largest:.2e}"


METADATA: dict[str, dict[str, Any]] = {
    "as training saves": {},
    "singleton shards": {"singleton_local_shards": True},
    "layers one by one": {"non_homogeneous_layers": True},
    "both": {"singleton_local_shards": True, "non_homogeneous_layers": True},
}


@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "qwen2"])
def test_what_megatron_writes_comes_back(
    family: str, metadata: str, world: World, sources: Sources, tmp_path: Path
) -> None:
    """A real model's own checkpoint, in the names that such settings give it: loaded and exported to the same bytes."""
    source = sources(family, dtype=torch.float32)
    model: Any = fresh_model(source, world)
    fill(model, source, world, source)
    _save_without_a_manager_process()
    folder = tmp_path / "m"
    folder.mkdir()
    state = model.sharded_state_dict(metadata={**sharding_metadata(world), **METADATA[metadata]})
    dist_checkpointing.save(state, str(folder))
    again = fresh_model(source, world)
    fill(again, folder, world, source)
    assert_holds(again, reference(source))
    run(export_conversion(folder, like=source), tmp_path / "hf")
    for file in source.glob("*.safetensors*"):
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name


class Shards:
    """A rank's share of some tensors, as a model would tell it."""

    def __init__(self, *leaves: ShardedTensor) -> None:
        self.leaves = leaves

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Its leaves."""
        return {str(i): leaf for i, leaf in enumerate(self.leaves)}


def leaf(key: str, local: torch.Tensor, *offsets: tuple[int, int, int], axes: int = 0) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, local, *offsets, prepend_axis_num=axes)


@pytest.mark.parametrize("kind", ["hf", "fp8", "torch_dist"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_tensor_rank_gets_its_part(kind: str, size: int, sources: Sources, tmp_path: Path) -> None:
    """Rows, columns, and a row of experts: slices of the slow reference, in a dtype of the parameter's own. Of FP8
    tensors they begin inside of blocks.
    """
    source = sources("deepseek_v3", fp8=kind == "fp8")
    expected, arch = reference(source), arch_of(source)
    folder = source
    if kind == "torch_dist":
        folder = tmp_path / "m"
        run(import_conversion(source), folder)
    opened = open_source(folder, arch, predictions=True)
    layer = "decoder.layers.1."
    qkv, proj = f"{layer}self_attention.linear_kv_up_proj.weight", f"{layer}self_attention.linear_proj.weight"
    experts = [expected[f"{layer}mlp.experts.local_experts.{e}.linear_fc2.weight"] for e in range(8)]
    for rank in range(size):
        rows, cols = expected[qkv].chunk(size, 0)[rank], expected[proj].chunk(size, 1)[rank]
        fc2 = experts[8 // size * rank].chunk(size, 1)[rank]
        filled = [torch.full(x.shape, torch.nan) for x in (rows, cols, fc2)]
        key = f"{layer}mlp.experts.experts.linear_fc2.weight"
        shards = Shards(
            leaf(qkv, filled[0], (0, rank, size)),
            leaf(proj, filled[1], (1, rank, size)),
            leaf(key, filled[2], (0, 8 // size * rank, 8), (2, rank, size), axes=1),
        )
        assert load_into([shards], opened, {}) == []
        for found, due in zip(filled, (rows, cols, fc2), strict=True):
            assert torch.equal(found, due.float())


def test_rows_behind_the_vocabulary_are_zero(sources: Sources) -> None:
    """500 rows over 7 ranks, of 72 each: the last has 68 and 4 of padding, and a rank may have padding only."""
    source = sources("qwen2")
    expected = reference(source)["embedding.word_embeddings.weight"].float()
    opened = open_source(source, arch_of(source), predictions=False)
    for rank, rows in ((0, 72), (6, 68), (7, 0)):
        local = torch.full((72, 256), torch.nan)
        key = "embedding.word_embeddings.weight"
        assert load_into([Shards(leaf(key, local, (0, rank, 8)))], opened, {}) == []
        assert torch.equal(local[:rows], expected[rank * 72 :][:rows])
        assert torch.equal(local[rows:], torch.zeros(72 - rows, 256))


def test_what_no_language_model_has_is_returned(sources: Sources) -> None:
    source = sources("qwen2")
    opened = open_source(source, arch_of(source), predictions=False)
    norm, head = torch.full((256,), torch.nan), torch.full((1, 256), torch.nan)
    shards = Shards(leaf("decoder.final_layernorm.weight", norm), leaf("scalar_head.weight", head))
    assert load_into([shards], opened, {}) == ["scalar_head.weight"]
    assert torch.equal(norm, reference(source)["decoder.final_layernorm.weight"].float()) and head.isnan().all()


def test_a_parameter_larger_than_the_tensor_is_refused(sources: Sources) -> None:
    """The vocabulary alone may be padded."""
    source = sources("qwen2")
    opened = open_source(source, arch_of(source), predictions=False)
    for shape in ((256, 300), (300, 256)):
        key = "decoder.layers.0.self_attention.linear_proj.weight"
        with pytest.raises(UserError, match="linear_proj"):
            load_into([Shards(leaf(key, torch.zeros(shape)))], opened, {})


@pytest.fixture(autouse=True)
def _grad_mode_is_restored() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
