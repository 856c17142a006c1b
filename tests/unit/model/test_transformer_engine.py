"""Every name and argument of Transformer Engine that a GPU run takes, looked up in the package's own source.

The GPU path goes through Megatron-Core's extensions/transformer_engine.py and fp8_utils.py; without a GPU nothing of it
runs here. So the published wheel is downloaded (its Python sources only, half a megabyte), parsed and never imported,
at both ends of the range that setup.py asks for.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_r1.model.precision import FP32_SCALES

ROOT = Path(__file__).resolve().parents[3]
TESTED = ("2.9.0", "2.11.0")
LINEAR = (
    *("in_features", "out_features", "sequence_parallel", "fuse_wgrad_accumulation", "tp_group", "tp_size"),
    *("get_rng_state_tracker", "init_method", "bias", "return_bias", "parallel_mode"),
    *("params_dtype", "device", "delay_wgrad_compute"),
)
NORM = ("hidden_size", "sequence_parallel", "zero_centered_gamma", "params_dtype", "kwargs")
PACKED = ("qkv_format", *(f"cu_seqlens_{of}{pad}" for of in ("q", "kv") for pad in ("", "_padded")))
# module, name, arguments. Classes stand for their __init__.
NEEDED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("pytorch", "Linear", (*LINEAR, "rng_tracker_name", "symmetric_ar_type", "save_original_input")),
    ("pytorch", "LayerNormLinear", (*LINEAR, "eps", "normalization", "zero_centered_gamma", "return_layernorm_output")),
    ("pytorch", "GroupedLinear", ("num_gemms", *LINEAR, "rng_tracker_name")),
    ("pytorch", "RMSNorm", NORM),
    ("pytorch", "LayerNorm", NORM),
    # What `kwargs` of the norms goes on to.
    ("pytorch.ops.basic.rmsnorm", "RMSNorm", ("normalized_shape", "eps", "zero_centered_gamma", "dtype", "device")),
    (
        "pytorch",
        "DotProductAttention",
        (
            *("num_attention_heads", "kv_channels", "num_gqa_groups", "attention_dropout", "attn_mask_type", "tp_size"),
            *("sequence_parallel", "get_rng_state_tracker", "tp_group", "layer_number", "attention_type", "cp_group"),
            *("cp_global_ranks", "cp_stream", "cp_comm_type", "softmax_scale"),
        ),
    ),
    (
        "pytorch",
        "DotProductAttention.forward",
        (
            *("query_layer", "key_layer", "value_layer", "attention_mask", "attn_mask_type", *PACKED),
            *("max_seqlen_q", "max_seqlen_kv", "core_attention_bias_type", "core_attention_bias"),
        ),
    ),
    (
        "pytorch",
        "DotProductAttention.set_context_parallel_group",
        ("cp_group", "cp_global_ranks", "cp_stream", "cp_comm_type"),
    ),
    ("pytorch", "fp8_autocast", ("enabled", "fp8_recipe", "fp8_group")),
    ("pytorch", "fp8_model_init", ("enabled", "recipe")),
    ("pytorch", "Fp8Padding", ("num_gemms", "align_size")),
    ("pytorch", "Fp8Unpadding", ("num_gemms", "align_size")),
    ("pytorch.fp8", "fp8_autocast", ()),
    ("pytorch.fp8", "FP8GlobalStateManager.is_fp8_enabled", ()),
    ("pytorch.fp8", "FP8GlobalStateManager.is_fp8_block_scaling_available", ()),
    ("common.recipe", "Format", ()),
    ("common.recipe", "Format.E4M3", ()),
    ("common.recipe", "DelayedScaling", ()),
    ("common.recipe", "Float8CurrentScaling", ()),
    ("common.recipe", "MXFP8BlockScaling", ()),
    ("common.recipe", "Float8BlockScaling", ("fp8_format", "use_f32_scales")),
    ("common.recipe", "NVFP4BlockScaling", ()),
    ("pytorch.tensor", "QuantizedTensor", ()),
    ("pytorch.tensor.mxfp8_tensor", "MXFP8Tensor", ()),
    ("pytorch.float8_tensor", "Float8Tensor", ()),
    ("pytorch.module.base", "get_dummy_wgrad", ("shape", "dtype", "zero")),
    ("pytorch.cpp_extensions", "general_gemm", ()),
    (
        "pytorch.distributed",
        "checkpoint",
        ("function", "args", "kwargs"),  # the rest is taken from kwargs, see test_checkpoint_options
    ),
    ("pytorch.distributed", "CudaRNGStatesTracker.fork", ("name",)),
    ("pytorch.attention.rope", "apply_rotary_pos_emb", ("t", "freqs", "tensor_format", "fused", "cu_seqlens")),
    ("pytorch.permutation", "moe_permute", ("inp", "routing_map", "num_out_tokens")),
    ("pytorch.permutation", "moe_permute_with_probs", ("inp", "probs", "routing_map", "num_out_tokens")),
    ("pytorch.permutation", "moe_unpermute", ("inp", "row_id_map", "merging_probs", "restore_shape")),
    ("pytorch.permutation", "moe_sort_chunks_by_index", ("inp", "split_sizes", "sorted_index")),
    ("pytorch.permutation", "moe_sort_chunks_by_index_with_probs", ("inp", "probs", "split_sizes", "sorted_index")),
    (
        "pytorch.router",
        "fused_topk_with_score_function",
        (
            *("logits", "topk", "use_pre_softmax", "num_groups", "group_topk", "scaling_factor", "score_function"),
            "expert_bias",
        ),
    ),
    ("pytorch.router", "fused_compute_score_for_moe_aux_loss", ()),
    ("pytorch.router", "fused_moe_aux_loss", ()),
    ("pytorch.cross_entropy", "parallel_cross_entropy", ()),
    ("pytorch.cpu_offload", "get_cpu_offload_context", ("enabled", "num_layers", "model_layers")),
    (
        "pytorch.optimizers",
        "FusedAdam",
        (
            *("params", "lr", "betas", "eps", "weight_decay", "adam_w_mode", "master_weights", "use_decoupled_grad"),
            *("master_weight_dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "store_param_remainders"),
        ),
    ),
    ("pytorch.optimizers", "FusedSGD", ()),
    ("pytorch.optimizers", "multi_tensor_applier", ()),
    ("pytorch.optimizers", "multi_tensor_scale", ()),
    ("pytorch.optimizers", "multi_tensor_l2norm", ()),
)


@dataclass(frozen=True)
class Sources:
    """The package's files; names are followed through its imports."""

    root: Path

    def file(self, module: str) -> Path | None:
        base = self.root.joinpath("transformer_engine", *filter(None, module.split(".")))
        return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)

    def definition(self, module: str, name: str) -> ast.AST | None:
        """Where a module gets a top-level name from; None: it has no such name."""
        path = self.file(module)
        if path is None:
            return None
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in self.statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return node
            if isinstance(node, ast.Assign) and name in [t.id for t in node.targets if isinstance(t, ast.Name)]:
                return node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) in (name, "*"):
                        found = self.imported(node, package, name if alias.name == "*" else alias.name)
                        if found is not None:
                            return found
        return None

    def imported(self, node: ast.ImportFrom, package: str, name: str) -> ast.AST | None:
        if node.level == 0 and not (node.module or "").startswith("transformer_engine."):
            return node if node.names[0].name != "*" else None  # another package: its compiled extension
        parts = package.split(".") if package else []
        base = parts[: len(parts) - node.level + 1] if node.level else []
        tail = (node.module or "").removeprefix("transformer_engine.")
        target = ".".join(filter(None, [*base, tail]))
        found = self.definition(target, name)
        return found or (node if self.file(f"{target}.{name}") else None)

    @staticmethod
    def statements(tree: ast.Module) -> list[ast.stmt]:
        """Top-level statements, those under `if` and `try` included."""
        return [
            node
            for top in tree.body
            for node in (ast.walk(top) if isinstance(top, ast.If | ast.Try) else [top])
            if isinstance(node, ast.stmt)
        ]


def problem(sources: Sources, module: str, name: str, arguments: tuple[str, ...]) -> str | None:
    """What is missing, in words."""
    top, _, member = name.partition(".")
    found = sources.definition(module, top)
    if found is None:
        return f"transformer_engine.{module} has no {top}"
    if isinstance(found, ast.ClassDef):
        fields = [n.target.id for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        names = [t.id for n in found.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
        method = next(
            (n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == (member or "__init__")), None
        )
        if member and method is None:
            return None if member in names else f"{module}.{top} has no {member}"
        known = _arguments(method) if method is not None else fields
    elif isinstance(found, ast.FunctionDef):
        known = _arguments(found)
    else:
        known = list(arguments)  # compiled: the name is all there is to see
    missing = [argument for argument in arguments if argument not in known]
    return f"{module}.{name} takes no {', '.join(missing)}" if missing else None


def _arguments(function: ast.FunctionDef) -> list[str]:
    a = function.args
    return [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))]


@pytest.fixture(scope="module", params=TESTED)
def sources(request: pytest.FixtureRequest) -> Sources:
    """The unpacked wheel of a version, kept between runs."""
    root = Path(tempfile.gettempdir()) / "megatron-r1-tests" / f"transformer_engine-{request.param}"
    if not root.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            command += ["--dest", folder, f"transformer_engine=={request.param}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                pytest.skip(f"cannot download Transformer Engine {request.param}: {done.stderr[-300:]}")
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(folder) / "unpacked")
            root.parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / "unpacked").rename(root)
    return Sources(root)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "arguments"), NEEDED, ids=[f"{m}.{n}" for m, n, _ in NEEDED])
def test_the_package_has_what_the_gpu_path_takes(
    sources: Sources, module: str, name: str, arguments: tuple[str, ...]
) -> None:
    assert problem(sources, module, name, arguments) is None


@pytest.mark.slow
def test_the_check_itself_can_fail(sources: Sources) -> None:
    assert problem(sources, "pytorch", "Linear", ("in_feature",)) == "pytorch.Linear takes no in_feature"
    assert problem(sources, "pytorch", "Linaer", ()) == "transformer_engine.pytorch has no Linaer"
    assert problem(sources, "pytorch", "DotProductAttention.forwards", ()) is not None
    assert problem(sources, "common.recipe", "Float8BlockScaling", ("use_fp32_scales",)) is not None


@pytest.mark.slow
def test_scales_follow_the_environment_and_hopper_is_asked_for(sources: Sources) -> None:
    recipe = (sources.root / "transformer_engine/common/recipe/__init__.py").read_text(encoding="utf-8")
    assert f'use_f32_scales: bool = os.getenv("{FP32_SCALES}", "0") == "1"' in recipe
    assert "x_block_scaling_dim: int = 1" in recipe and "w_block_scaling_dim: int = 2" in recipe
    assert "grad_block_scaling_dim: int = 1" in recipe
    quantisation = (sources.root / "transformer_engine/pytorch/quantization.py").read_text(encoding="utf-8")
    assert "get_device_compute_capability() >= (9, 0)" in quantisation


@pytest.mark.slow
def test_checkpoint_options(sources: Sources) -> None:
    text = (sources.root / "transformer_engine/pytorch/distributed.py").read_text(encoding="utf-8")
    body = text[text.index("def checkpoint(") :]
    taken = set(re.findall(r'kwargs\.pop\(\s*"(\w+)"', body[: body.index("\nclass ")]))
    assert taken >= {"distribute_saved_activations", "get_rng_state_tracker", "tp_group"}


def test_setup_asks_for_the_range_that_is_tested_and_that_megatron_supports() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    ours = Requirement(re.search(r'"gpu": \["(transformer-engine[^"]+)"', text).group(1))  # type: ignore[union-attr]
    assert ours.extras == {"pytorch"}
    assert all(ours.specifier.contains(version) for version in TESTED)
    assert not ours.specifier.contains("2.8.0") and not ours.specifier.contains("2.12.0")
    stated = [Requirement(line) for line in importlib.metadata.requires("megatron-core") or ()]
    (megatron,) = {str(r.specifier) for r in stated if r.name.lower().replace("_", "-") == "transformer-engine"}
    assert all(SpecifierSet(megatron).contains(version) for version in TESTED)
