"""The conversions as one object each: what is written, what goes beside it, and what is known before the first byte.

`command.py` makes one from a command line, a recipe's export stage from its tables; both then print it or `run` it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_r1.config.errors import UserError
from megatron_r1.convert import origin
from megatron_r1.convert.correspondence import SCALE, Correspondence
from megatron_r1.convert.exporting import DTYPES, HfPlan, Scales, cast_plan, export_plan
from megatron_r1.convert.formats import hf_config, torch_dist
from megatron_r1.convert.formats.hf_files import INDEX, SINGLE, index_json, is_hf, read_hf
from megatron_r1.convert.formats.names import Spec
from megatron_r1.convert.importing import SCALES_FILE, import_plan
from megatron_r1.convert.manifest import MANIFEST, check_manifest, has_checksums
from megatron_r1.convert.origin import Origin
from megatron_r1.convert.plan import HfSource, MegatronSource, Plan
from megatron_r1.convert.source import is_megatron, read_megatron
from megatron_r1.convert.storage import FP8
from megatron_r1.model.presets import load_architecture

SHARD_BYTES = 5 * 10**9
"""Most bytes of a file by default."""


@dataclass(frozen=True)
class Conversion:
    """source: the folder that is converted; reads: what else it takes files from. last: small files that complete the
    folder, by name. about: facts for its manifest. notes: for the user.
    """

    kind: Literal["import", "export", "cast"]
    source: Path
    plan: Plan
    last: Mapping[str, bytes]
    about: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()

    @property
    def operations(self) -> Counter[str]:
        """How many bytes are written by which operation."""
        counted: Counter[str] = Counter()
        for file in self.plan.files:
            for target in file.targets:
                counted[target.operation] += target.bytes
        return counted

    def buffer_bytes(self, workers: int) -> int:
        """Memory that the buffers of so many workers take, about, beyond the imports and the plan itself."""
        from megatron_r1.convert.execute import buffer_bytes
        from megatron_r1.convert.fp8 import Scratch
        from megatron_r1.convert.manifest import BUFFER_BYTES

        targets = [target for file in self.plan.files for target in file.targets]
        # A file whose scales stand before their tensor is read again for its checksum.
        again = BUFFER_BYTES if any(target.quantise is not None for target in targets) else 0
        largest = max((buffer_bytes(target) for target in targets), default=0)
        return workers * (largest + Scratch().bytes + again)

    def memory(self, workers: int) -> dict[str, int]:
        """Bytes: what this process has now, which is the imports and this plan, and what writing it adds to that."""
        buffers = self.buffer_bytes(workers)  # imports what the work needs
        return {"process": psutil.Process().memory_info().rss, "buffers": buffers, "workers": workers}


def run(
    conversion: Conversion,
    folder: Path,
    *,
    workers: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> bool:
    """Write it into `folder`; see `write.carry_out`. Raises UserError also where that could destroy what it reads."""
    from megatron_r1.convert.write import carry_out

    check_apart(conversion, folder)
    return carry_out(
        conversion.plan,
        folder,
        conversion.last,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        about=conversion.about,
    )


def finished(conversion: Conversion, folder: Path) -> bool:
    """Whether this very conversion, of the same files, finished in `folder`; checksums are not looked at."""
    from megatron_r1.convert import write

    return write.finished(conversion.plan, folder, conversion.last)


def check_source(conversion: Conversion, *, workers: int = 1, progress: Callable[[int], None] = lambda _: None) -> None:
    """Read a source that a conversion wrote, and compare it with the checksums in its manifest.json.

    progress: gets the bytes that are read. Raises UserError, naming the file, for what changed since. A source without
    checksums is not read.
    """
    if not has_checksums(conversion.source):
        return
    if problems := check_manifest(conversion.source, progress=progress, workers=workers):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"{conversion.source}: {problems[0]}{more}. It is not what {MANIFEST} there says: copy or convert it "
            "again. Where you changed it yourself, give `convert` --trust-source, or remove that manifest"
        )


def check_apart(conversion: Conversion, folder: Path) -> None:
    """Raise UserError where writing `folder` could destroy something that the conversion reads."""
    from megatron_r1.convert.write import source_files

    target, source = Path(os.path.realpath(folder)), Path(os.path.realpath(conversion.source))
    if target == source or target in source.parents or source in target.parents:
        raise UserError(f"{folder} is the source itself, or inside it or around it; choose another folder to write")
    read = [*conversion.reads, *map(Path, sorted(source_files(conversion.plan)))]
    for path in read:
        for place in {Path(os.path.abspath(path)), Path(os.path.realpath(path))}:
            if place == target or target in place.parents:
                raise UserError(
                    f"{folder} holds {path}, which this conversion reads; choose another folder to write, or take that "
                    "from elsewhere"
                )


def import_conversion(
    hf: Path, *, spec: Spec = "te", dtype: str | None = None, predictions: bool = True, file_bytes: int = SHARD_BYTES
) -> Conversion:
    """A Hugging Face folder becomes a torch_dist checkpoint.

    spec: whose parameter names it gets. dtype: "bf16", "fp16" or "fp32" for all weights; None: as they are, FP8 as
    BF16. predictions: False leaves the multi-token-prediction layers out. Raises UserError as the readers and plans do.
    """
    source = open_hf(hf, predictions=predictions)
    made = import_plan(source, spec=spec, dtype=None if dtype is None else DTYPES[dtype], file_bytes=file_bytes)
    known = origin.of_archive(source.archive)
    aux, notes = _aux(hf)
    last = {f"{origin.KEPT}/{name}": data for name, data in {**aux, **origin.kept_files(known)}.items()}
    last |= torch_dist.common_files()
    last[".metadata"] = torch_dist.metadata_bytes(made.tensors, made.objects)
    about = {"conversion": "import", "source": str(hf), "spec": spec, "mtp_layers": source.table.predictions}
    return Conversion("import", hf, made.plan, last, about, _notes_of_import(source, notes))


def export_conversion(
    megatron: Path,
    *,
    like: Path | None = None,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    scales: Scales | None = None,
    predictions: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """A Megatron checkpoint becomes a Hugging Face folder.

    like: the Hugging Face folder that the model came from (or a config.json); None: what the checkpoint itself keeps of
    it. tokenizer: a folder to take the tokenizer from instead. dtype: a key of DTYPES; None: as the model came.
    scales: of FP8 blocks; None: as its config.json says. Raises UserError as the readers and plans do, and where
    nothing says which architecture the checkpoint has.
    """
    source, known = open_megatron(megatron, like, predictions=predictions)
    made = export_plan(source, known, dtype=dtype, scales=scales or known.scale_format, shard_bytes=shard_bytes)
    converted = _to_hf("export", made, known, source.table, tokenizer, source.archive.folder, scales)
    if dtype is None and converted.operations["quantise"]:
        note = f"written as FP8 because the model of {known.folder} is; --dtype bf16 for BF16"
        converted = replace(converted, notes=(*converted.notes, note))
    return replace(converted, reads=tuple(path for path in (like, tokenizer) if path is not None))


def cast_conversion(
    hf: Path, *, dtype: str, scales: Scales | None = None, predictions: bool = True, shard_bytes: int = SHARD_BYTES
) -> Conversion:
    """A Hugging Face folder in another dtype (a key of DTYPES). Raises UserError as the readers and plans do."""
    source = open_hf(hf, predictions=predictions)
    known = replace(origin.of_archive(source.archive), weight_map=None, dtypes={})
    made = cast_plan(source, known, dtype=dtype, scales=scales or known.scale_format, shard_bytes=shard_bytes)
    return _to_hf("cast", made, known, source.table, None, hf, scales)


def open_hf(folder: Path, *, predictions: bool = True) -> HfSource:
    """A Hugging Face checkpoint with its table. Raises UserError for what is damaged or does not fit."""
    if is_megatron(folder) and not is_hf(folder):
        raise UserError(f"{folder} is a Megatron checkpoint, not a Hugging Face folder; `convert export` reads it")
    table = Correspondence(load_architecture(folder), predictions=predictions)
    hf_config.check_config(json.loads(origin.config_bytes(folder)), folder / hf_config.CONFIG)
    return HfSource(read_hf(folder), table)


def open_megatron(folder: Path, like: Path | None, *, predictions: bool = True) -> tuple[MegatronSource, Origin]:
    """A Megatron checkpoint, torch_dist or legacy, with its table and its origin. Raises UserError as above."""
    if is_hf(folder):
        raise UserError(
            f"{folder} is a Hugging Face folder, not a Megatron checkpoint; `convert cast` changes its dtype"
        )
    checkpoint = torch_dist.checkpoint_folder(folder)
    kept = checkpoint / origin.KEPT
    if like is None and not (kept / hf_config.CONFIG).is_file():
        raise UserError(
            f"{folder} does not say which model it is: it has no {origin.KEPT}/{hf_config.CONFIG}. Name the Hugging "
            "Face folder that it came from, or a config.json, with --like"
        )
    known = origin.of_folder(like or kept)
    table = Correspondence(load_architecture(like or kept), predictions=predictions)
    return read_megatron(checkpoint, table), known


def _to_hf(
    kind: Literal["export", "cast"],
    made: HfPlan,
    known: Origin,
    table: Correspondence,
    tokenizer: Path | None,
    source: Path,
    scales: Scales | None,
) -> Conversion:
    layout = None
    if any(tensor.dtype == FP8 for shard in made.shards for tensor in shard.tensors):
        given = known.config.get("quantization_config")
        skipped = _listed(given) if given else table.unquantised_modules()
        layout = hf_config.Fp8Layout(ue8m0=(scales or known.scale_format) == "power-of-2", skipped=tuple(skipped))
    dtype = _usual_dtype(made)
    config = hf_config.export_config(known.config, dtype=dtype, fp8=layout, mtp_layers=table.predictions)
    aux, notes = _aux(tokenizer or known.folder)
    last = dict(aux)
    if [shard.name for shard in made.shards] != [SINGLE]:
        last[INDEX] = _index(made, known)
    last[hf_config.CONFIG] = hf_config.config_bytes(known.config_bytes, config)
    about = {"conversion": kind, "source": str(source), "mtp_layers": table.predictions}
    return Conversion(kind, source, made.plan, last, about, notes)


def _index(made: HfPlan, known: Origin) -> bytes:
    """The index; the origin's own file where it says the same."""
    written = index_json(made.shards)
    if known.index is not None:
        new = json.loads(written)
        try:
            old = json.loads(known.index)
            same = old["metadata"]["total_size"] == new["metadata"]["total_size"]
            same = same and old["weight_map"] == new["weight_map"]
        except (ValueError, KeyError, TypeError):  # what is kept of it is damaged, or it was odd: nothing rests on it
            same = False
        if same:
            return known.index
    return written
    return written


def _usual_dtype(made: HfPlan) -> str:
    """The dtype of most bytes beside FP8 ones and their scales."""
    counted: Counter[str] = Counter()
    for tensor in (tensor for shard in made.shards for tensor in shard.tensors):
        if tensor.dtype != FP8 and not tensor.name.endswith(SCALE):
            counted[tensor.dtype] += tensor.bytes
    return counted.most_common(1)[0][0]


def _aux(folder: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Tokenizer, templates, code: content by relative name, and notes."""
    if not folder.is_dir():
        return {}, ("no tokenizer: none is known; name a folder with --tokenizer",)
    files, notes = hf_config.read_aux(folder)
    return files, tuple(notes)


def _listed(quantization: Mapping[str, Any]) -> list[str]:
    """The modules that a quantization_config leaves out, under either spelling."""
    return list(quantization.get("modules_to_not_convert") or quantization.get("ignored_layers") or [])


def _notes_of_import(source: HfSource, notes: tuple[str, ...]) -> tuple[str, ...]:
    if source.quantised:
        notes = (*notes, f"FP8 weights become BF16; their scales are kept in {SCALES_FILE} for a later export")
    return notes
