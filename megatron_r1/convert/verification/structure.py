"""Compares a Hugging Face folder with the model that transformers builds from its config.json, without weights.

The table is this project's own knowledge of a family, transformers is somebody else's: what both say is right. Between
the two formats lies what transformers does in memory only (routed experts in one tensor) and what it does not have
(multi-token prediction, FP8 scales); that is translated here, explicitly, and counted.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron_r1.convert.correspondence import SCALE, Correspondence
from megatron_r1.convert.origin import config_bytes
from megatron_r1.convert.storage import Archive
from megatron_r1.convert.verification.report import Check, failed

NAME = "structure"
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
Shapes = dict[str, tuple[int, ...]]


def check_structure(archive: Archive, table: Correspondence) -> Check:
    """Names and shapes of a Hugging Face folder against transformers' model of its config.json."""
    config = dict(json.loads(config_bytes(archive.folder)))
    try:
        expected = meta_model(config)
    except Exception as error:  # whatever transformers thinks of this file
        return failed(NAME, f"transformers cannot build a model from config.json: {type(error).__name__}: {error}")
    tied = bool(config.get("tie_word_embeddings")) and "lm_head.weight" not in archive.tensors
    if tied:
        expected.pop("lm_head.weight", None)
    found, aside = _found(archive, table, expected)
    problems = [f"{name}: transformers has it, the folder does not" for name in expected if name not in found]
    problems += [f"{name}: the folder has it, transformers does not" for name in found if name not in expected]
    for name, shape in found.items():
        if expected.get(name, shape) != shape:
            problems.append(f"{name}: is {list(shape)}, transformers has {list(expected[name])}")
    beside = "".join(f"; {count} {what} set aside" for what, count in aside.items() if count)
    same = "names and shapes are those" if not problems else f"{len(problems)} differ from those"
    summary = f"{len(found)} {same} of transformers' {config.get('model_type')}{beside}"
    if tied:
        summary += "; lm_head is the embedding"
    numbers = {"compared": len(found), "set_aside": aside}
    return Check(NAME, "failed" if problems else "ok", summary, problems, numbers=numbers)


def meta_model(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the checkpoint of transformers' model: parameters and persistent buffers, experts apart.

    `quantization_config` and `auto_map` are not looked at. Raises what transformers raises.
    """
    import torch

    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config", "auto_map")}
        built = AutoConfig.for_model(config["model_type"], **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built, trust_remote_code=False)
    shapes: Shapes = {}
    for name, tensor in model.state_dict().items():
        shapes |= dict(_experts_apart(name, tuple(tensor.shape)))
    return shapes


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without warnings and progress bars, in this process, for a while."""
    import transformers.utils.logging as logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _experts_apart(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Routed experts as files have them; transformers 5 has gate_up_proj [E, 2F, H] and down_proj [E, H, F]."""
    stem, _, kind = name.rpartition("mlp.experts.")
    if not name.endswith((_GATE_UP, _DOWN)):
        yield name, shape
        return
    experts, rows, cols = shape
    for e in range(experts):
        if kind == "down_proj":
            yield f"{stem}mlp.experts.{e}.down_proj.weight", (rows, cols)
        else:
            yield f"{stem}mlp.experts.{e}.gate_proj.weight", (rows // 2, cols)
            yield f"{stem}mlp.experts.{e}.up_proj.weight", (rows // 2, cols)


def _found(archive: Archive, table: Correspondence, expected: Shapes) -> tuple[Shapes, dict[str, int]]:
    """Shapes of the folder's tensors that transformers should have, and how many are of another kind."""
    layers = table.dims["layers"]
    prediction = tuple(f"model.layers.{layers + i}." for i in range(table.arch.get("num_nextn_predict_layers") or 0))
    aside = {"of multi-token prediction": 0, "FP8 scales": 0, "that hold nothing": 0}
    found: Shapes = {}
    for name, tensor in archive.tensors.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in archive.tensors:
            aside["FP8 scales"] += 1
        elif prediction and name.startswith(prediction):
            aside["of multi-token prediction"] += 1
        elif name not in expected and table.drop_reason(name) is not None:
            aside["that hold nothing"] += 1
        else:
            found[name] = tensor.shape
    return found, aside
