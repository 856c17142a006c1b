"""A converted model's config.json, and the files that go with it unchanged. No torch.

The export edits the source's JSON, never re-serialises it through transformers, which drops `rope_theta` and
`torch_dtype` and adds a dozen defaults. Both spellings of whatever has two are written, because each loader reads only
one of them and takes a default, silently, where it is missing.
"""

from __future__ import annotations

import copy
import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.convert.manifest import PART, disk_errors
from megatron_r1.convert.storage import TORCH_NAMES

CONFIG = "config.json"
_BLOCK = (128, 128)
_COPIED = (
    *("tokenizer*", "vocab.*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json", "*.py", "LICENSE*"),
)
_NEVER = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", CONFIG, "*" + PART)
_TEMPLATES = "chat_templates"  # the folder in which a tokenizer with several templates keeps them
_TOKENIZER = ("tokenizer.json", "vocab.*", "*.model")  # one of these holds the vocabulary


@dataclass(frozen=True, slots=True)
class Fp8Layout:
    """How the quantised weights of an export are stored."""

    block: tuple[int, int] = _BLOCK  # rows, columns that share a scale
    ue8m0: bool = False  # scales are powers of two (still stored as F32, as DeepSeek-V3.1 has them)
    skipped: tuple[str, ...] = ()  # full names of linear modules left unquantised, such as "lm_head"


def hf_dtype(config: dict[str, Any]) -> str | None:
    """safetensors' name of a config's dtype (`dtype` goes before `torch_dtype`, as in transformers); None when absent.

    Raises UserError for a name that weights cannot have.
    """
    given = config.get("dtype") or config.get("torch_dtype")
    if given is None:
        return None
    names = {TORCH_NAMES[name]: name for name in ("BF16", "F16", "F32")}
    if (name := names.get(str(given).removeprefix("torch."))) is None:
        raise UserError(f"{CONFIG}: dtype is {given!r}; set it to one of {', '.join(sorted(names))}")
    return name


def export_config(source: dict[str, Any], *, dtype: str, fp8: Fp8Layout | None, mtp_layers: int) -> dict[str, Any]:
    """The config.json of an export, from that of its source: order kept, nothing dropped but what is no longer true.

    dtype: safetensors' name of the dtype of the tensors that are not quantised, written as `torch_dtype` and `dtype`.
    fp8: None removes `quantization_config`; a layout writes it, with keys of the source's own fp8 entry that say
    nothing about the layout kept. mtp_layers: next-token-prediction layers written, as `num_nextn_predict_layers`
    where the source has that key or there are some. The rotary embedding gets both `rope_theta`/`rope_scaling` and
    `rope_parameters`, and transformers 5's `num_local_experts` of Qwen3-MoE the `num_experts` that other loaders read;
    a source with one of them therefore comes back edited.
    Raises UserError when the source's two spellings contradict each other.
    """
    edited = copy.deepcopy(source)
    _spell_both_ways(edited)
    edited["torch_dtype"] = edited["dtype"] = TORCH_NAMES[dtype]
    if fp8 is None:
        edited.pop("quantization_config", None)
    else:
        edited["quantization_config"] = _quantization(source.get("quantization_config"), fp8)
    if mtp_layers or "num_nextn_predict_layers" in source:
        edited["num_nextn_predict_layers"] = mtp_layers
    # Published files are sorted; new keys then belong at their place, not at the end.
    return dict(sorted(edited.items())) if list(source) == sorted(source) else edited


def config_bytes(source: bytes, edited: dict[str, Any]) -> bytes:
    """The file of an edited config: the source's own bytes if it says the same, else JSON indented by 2."""
    if json.loads(source) == edited:
        return source
    return (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()


def aux_files(folder: Path) -> list[Path]:
    """Files of a Hugging Face folder that an export copies unchanged, sorted: tokenizer, templates, code, licence."""
    with disk_errors(folder):
        top = [path for path in folder.iterdir() if _matches(path, _COPIED) and not _matches(path, _NEVER)]
        templates = folder / _TEMPLATES
        inner = list(templates.iterdir()) if templates.is_dir() else []
    # A broken link (a cleaned download cache) is kept, so that copying it fails instead of leaving it out.
    return sorted(path for path in top + inner if path.is_file() or (path.is_symlink() and not path.is_dir()))


def read_aux(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """`aux_files` by name relative to the folder, and notes for the user.

    Raises as `megatron_r1.convert.manifest.disk_errors`.
    """
    files: dict[str, bytes] = {}
    for file in aux_files(folder):
        with disk_errors(file):
            files[file.relative_to(folder).as_posix()] = file.read_bytes()
    if any(_matches(Path(name), _TOKENIZER) for name in files):
        return files, []
    return files, [f"{folder} has no tokenizer ({', '.join(_TOKENIZER)}): an export can take one from --tokenizer"]


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)


def check_config(config: dict[str, Any], file: Path) -> None:
    """Raise UserError for a source's config.json whose spellings contradict each other, or whose quantisation is not
    block FP8 as DeepSeek-V3 has it. file: named in the message.
    """
    _spell_both_ways(copy.deepcopy(config), f"{file}: ")
    check_quantization(config, file)


def check_quantization(config: dict[str, Any], file: Path) -> None:
    """Raise UserError unless `quantization_config` is absent or that of block FP8 as DeepSeek-V3 has it."""
    entry = config.get("quantization_config")
    if entry is None:
        return
    if not isinstance(entry, dict):
        raise UserError(f"{file}: quantization_config is {entry!r}; it should be a table of settings, or absent")
    for key, only in {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(_BLOCK)}.items():
        if key in entry and entry[key] != only:
            raise UserError(
                f"{file}: quantization_config.{key} is {entry[key]!r}, but only {only!r} can be read: E4M3 with "
                "a scale for each 128x128 block, as DeepSeek-V3. Take an unquantised version of the model; if these "
                "weights are not quantised, remove quantization_config"
            )


def _quantization(given: dict[str, Any] | None, fp8: Fp8Layout) -> dict[str, Any]:
    entry = dict(given) if given and given.get("quant_method") == "fp8" else {}
    entry |= {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    entry["weight_block_size"] = list(fp8.block)
    if fp8.ue8m0:
        entry["scale_fmt"] = "ue8m0"
    else:
        entry.pop("scale_fmt", None)
    # SGLang and transformers read the first spelling, vLLM only the second.
    spellings = ("modules_to_not_convert", "ignored_layers")
    said: list[str] = next((entry[key] for key in spellings if entry.get(key)), [])
    skipped = said if set(said) == set(fp8.skipped) else list(fp8.skipped)
    if skipped or any(key in entry for key in spellings):
        entry |= {key: list(skipped) for key in spellings}
    return entry


def _spell_both_ways(config: dict[str, Any], said: str = f"{CONFIG}: ") -> None:
    """Add the spellings that are missing, in place. said: how messages begin."""
    _spell_rope(config, said)
    local = config.get("num_local_experts")
    if config.get("model_type") == "qwen3_moe" and local is not None:
        if config.get("num_experts") not in (None, local):
            raise _contradiction(said, "num_experts", config["num_experts"], "num_local_experts", local)
        config["num_experts"] = local


def _spell_rope(config: dict[str, Any], said: str) -> None:
    """The same of the rotary embedding."""
    parameters = config.get("rope_parameters")
    if not parameters:
        scaling = config.get("rope_scaling") or {}
        if (theta := scaling.get("rope_theta", config.get("rope_theta"))) is None:
            return  # neither spelling: every loader takes the architecture's own default
        shared = {key: config[key] for key in ("partial_rotary_factor",) if config.get(key) is not None}
        config["rope_theta"] = theta
        config["rope_parameters"] = {"rope_theta": theta, "rope_type": _rope_type(scaling), **shared, **_rest(scaling)}
        return
    if any(isinstance(value, dict) for value in parameters.values()):
        return  # one embedding a layer type: the older spelling cannot say that
    for key in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(key) is None:
            if config.get(key) is not None:
                parameters[key] = config[key]
            continue
        if config.get(key) is None:
            config[key] = parameters[key]
        elif config[key] != parameters[key]:
            raise _contradiction(said, key, config[key], "rope_parameters", parameters[key])
    kind, scaling = _rope_type(parameters), config.get("rope_scaling")
    if scaling is not None:
        if (_rope_type(scaling), _rest(scaling)) != (kind, _rest(parameters)):
            raise _contradiction(said, "rope_scaling", scaling, "rope_parameters", parameters)
    elif kind != "default":
        # Code shipped beside older models reads `type`, libraries `rope_type`.
        config["rope_scaling"] = {"type": kind, "rope_type": kind, **_rest(parameters)}


def _rope_type(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _rest(scaling: dict[str, Any]) -> dict[str, Any]:
    kept_elsewhere = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
    return {key: value for key, value in scaling.items() if key not in kept_elsewhere}


def _contradiction(said: str, key: str, old: object, other: str, new: object) -> UserError:
    return UserError(
        f"{said}{key} is {old!r} but {other} says {new!r}: loaders would read different models from it. "
        "Remove the wrong one"
    )
