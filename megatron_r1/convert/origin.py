"""What an export takes from the Hugging Face model that the weights once came from: config.json, tokenizer, the dtype
and file of every tensor, FP8 scales.

It is that model's folder, or what an import keeps of it inside the Megatron checkpoint (`hf/`), or no more than a
config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megatron_r1.config.errors import UserError
from megatron_r1.convert.correspondence import SCALE, Correspondence
from megatron_r1.convert.formats.hf_config import CONFIG, hf_dtype
from megatron_r1.convert.formats.hf_files import INDEX, is_hf, read_hf, read_safetensors
from megatron_r1.convert.manifest import some
from megatron_r1.convert.storage import FP8, Archive, Stored

KEPT = "hf"
"""Folder of a Megatron checkpoint with what an import keeps of the Hugging Face one."""
KEPT_CONFIG = f"{KEPT}/{CONFIG}"
"""Where a checkpoint says which architecture it has; training writes it too."""
RECORD = "origin.json"
SCALES = "scales.safetensors"


@dataclass(frozen=True)
class Origin:
    """See the module. dtypes: by tensor; index: model.safetensors.index.json as it is; weight_map: tensor -> file name,
    None where not known; scales: by name.
    """

    folder: Path
    config_bytes: bytes
    dtypes: Mapping[str, str] = field(default_factory=dict)
    index: bytes | None = None
    weight_map: Mapping[str, str] | None = None
    scales: Mapping[str, Stored] = field(default_factory=dict)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return dict(json.loads(self.config_bytes))

    @property
    def dtype(self) -> str | None:
        """The dtype that config.json names."""
        return hf_dtype(self.config)

    @property
    def scale_format(self) -> Literal["fp32", "power-of-2"]:
        """Which block scales config.json says the FP8 tensors have."""
        given = self.config.get("quantization_config") or {}
        return "power-of-2" if given.get("scale_fmt") == "ue8m0" else "fp32"

    def copies(self, table: Correspondence) -> list[str]:
        """The repeated tensors that it has; where it does not say which it has, all but optional ones."""
        if self.weight_map is None:
            return [name for name in table.copies if name not in table.optional]
        return [name for name in table.copies if name in self.weight_map]

    def kept_scale(self, name: str, scales: Literal["fp32", "power-of-2"]) -> Stored | None:
        """The scales that the blocks of a tensor may keep where scales of this format are written."""
        return self.scales.get(name + SCALE) if scales == self.scale_format else None


def of_archive(archive: Archive) -> Origin:
    """From a Hugging Face folder whose weights have been read."""
    tensors = archive.tensors.values()
    return Origin(
        archive.folder,
        config_bytes(archive.folder),
        {t.name: t.dtype for t in tensors},
        _index(archive.folder),
        {t.name: Path(t.chunks[0].file).name for t in tensors},
        {t.name: t for t in tensors if t.name.endswith(SCALE)},
    )


def of_folder(folder: Path) -> Origin:
    """From a Hugging Face folder with or without weights, or from the `hf` folder of a Megatron checkpoint.

    Raises UserError where there is no readable config.json, or a damaged record or checkpoint, or FP8 tensors whose
    scales are gone: nothing would come out as it came in, and nobody would be told.
    """
    record = folder / RECORD
    if record.is_file():
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
            dtypes, weight_map = dict(known["dtypes"]), dict(known["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{record} is damaged ({error}); give the Hugging Face folder with --like instead"
            ) from None
        scales = read_safetensors(folder / SCALES) if (folder / SCALES).is_file() else {}
        lost = [name for name, dtype in dtypes.items() if dtype == FP8 and name + SCALE not in scales]
        if lost:
            raise UserError(
                f"{folder / SCALES} lacks the block scales of {some(lost)}, which {record} lists as FP8. Copy the "
                "checkpoint again, import it again, or name the Hugging Face folder that it came from with --like "
                f"(--like {folder / CONFIG}: without what is known of its tensors)"
            )
        return Origin(folder, config_bytes(folder), dtypes, _index(folder), weight_map, scales)
    if is_hf(folder):
        return of_archive(read_hf(folder))
    return Origin(folder, config_bytes(folder))


def kept_files(origin: Origin) -> dict[str, bytes]:
    """What `of_folder` reads back, but the scales: content by name."""
    record = {"dtypes": dict(origin.dtypes), "weight_map": origin.weight_map}
    files = {RECORD: json.dumps(record, separators=(",", ":")).encode(), CONFIG: origin.config_bytes}
    return files if origin.index is None else {**files, INDEX: origin.index}


def _index(folder: Path) -> bytes | None:
    file = folder / INDEX
    return file.read_bytes() if file.is_file() else None


def config_bytes(folder: Path) -> bytes:
    """config.json of a folder (or the file itself) as it is written. Raises UserError for none or an unreadable one."""
    file = folder / CONFIG if folder.is_dir() else folder
    try:
        content = file.read_bytes()
        if not isinstance(json.loads(content), dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        raise UserError(f"there is no {file}; give the folder of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable config.json: {error}") from None
    return content
