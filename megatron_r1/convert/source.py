"""Opens weights of any kind for one architecture: what a stage starts from, what an export reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1.convert.correspondence import Correspondence
from megatron_r1.convert.formats import legacy, torch_dist
from megatron_r1.convert.formats.hf_config import CONFIG, check_quantization
from megatron_r1.convert.formats.hf_files import is_hf, read_hf
from megatron_r1.convert.origin import config_bytes
from megatron_r1.convert.plan import HfSource, MegatronSource


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a Megatron checkpoint, or Megatron-LM's folder with a tracker file for one."""
    if not folder.is_dir():
        return False
    names = (torch_dist.TRACKER, "metadata.json", ".metadata")
    return any((folder / name).is_file() for name in names) or legacy.is_legacy(folder)


def open_source(folder: Path, arch: Mapping[str, Any], *, predictions: bool) -> HfSource | MegatronSource:
    """A checkpoint's weights for a model of this architecture, checked to be complete. Reads no weights.

    predictions: whether the model has multi-token-prediction layers. Raises UserError as the readers do, and for a
    checkpoint that does not fit.
    """
    table = Correspondence(arch, predictions=predictions)
    if is_hf(folder):
        check_quantization(json.loads(config_bytes(folder)), folder / CONFIG)
        return HfSource(read_hf(folder), table)
    return read_megatron(torch_dist.checkpoint_folder(folder), table)


def read_megatron(checkpoint: Path, table: Correspondence) -> MegatronSource:
    """A Megatron checkpoint, torch_dist or legacy, checked against a table. Raises as `open_source`."""
    if legacy.is_legacy(checkpoint):
        return MegatronSource(legacy.read_legacy(checkpoint, table.split), table)
    return MegatronSource(torch_dist.read_torch_dist(checkpoint), table)
