"""The two folders of a verification: of which kind each is, what says which architecture it has, and its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_r1.config.errors import UserError
from megatron_r1.convert import origin
from megatron_r1.convert.formats import torch_dist
from megatron_r1.convert.formats.hf_config import CONFIG
from megatron_r1.convert.formats.hf_files import is_hf
from megatron_r1.convert.origin import Origin
from megatron_r1.convert.plan import HfSource, MegatronSource
from megatron_r1.convert.source import is_megatron, open_source
from megatron_r1.model.presets import load_architecture


@dataclass(frozen=True)
class Side:
    """One of the two folders. config: what says which architecture it has; source: None where `error` says why."""

    folder: Path
    kind: Literal["hf", "megatron"]
    config: Path
    source: HfSource | MegatronSource | None = None
    error: str = ""

    @property
    def kept(self) -> Path | None:
        """What an import kept of the Hugging Face model in this Megatron checkpoint."""
        folder = self.folder / origin.KEPT
        return folder if self.kind == "megatron" and (folder / CONFIG).is_file() else None


def open_both(target: Path, source: Path | None, like: Path | None, predictions: bool) -> tuple[Side, Side | None]:
    """Both folders, opened; of one that cannot be read, why.

    A Megatron checkpoint's architecture is that of `like`, else what an import kept in it, else the other folder's.
    Raises UserError for a folder that is not there, and where nothing says which architecture it has.
    """
    folders = [folder for folder in (target, source) if folder is not None]
    kinds = [_kind(folder) for folder in folders]
    sides = [
        Side(folder if kind == "hf" else torch_dist.checkpoint_folder(folder), kind, folder)
        for folder, kind in zip(folders, kinds, strict=True)
    ]
    opened = [_open(side, sides, like, predictions) for side in sides]
    return opened[0], opened[1] if len(opened) > 1 else None


def _kind(folder: Path) -> Literal["hf", "megatron"]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name a Hugging Face folder or a Megatron checkpoint")
    return "megatron" if is_megatron(folder) and not is_hf(folder) else "hf"


def _open(side: Side, sides: list[Side], like: Path | None, predictions: bool) -> Side:
    config = side.folder
    if side.kind == "megatron":
        found = [like, *(s.kept for s in sides if s.folder == side.folder), *(s.kept or s.folder for s in sides)]
        known = [path for path in found if path is not None and (path.is_file() or (path / CONFIG).is_file())]
        if not known:
            raise UserError(
                f"{side.folder} does not say which model it is: it has no {origin.KEPT}/{CONFIG}. Name the Hugging "
                "Face folder that it came from, or a config.json, with --like"
            )
        config = known[0]
    try:
        arch = load_architecture(config)
        return Side(side.folder, side.kind, config, open_source(side.folder, arch, predictions=predictions))
    except UserError as error:
        return Side(side.folder, side.kind, config, error=str(error))


def known_origin(other: Side, like: Path | None) -> Origin:
    """Where the model of SOURCE came from."""
    if isinstance(other.source, HfSource):
        return origin.of_archive(other.source.archive)
    known = origin.of_folder(other.config) if other.config in (like, other.kept) else None
    return known or Origin(other.folder, origin.config_bytes(other.config))
