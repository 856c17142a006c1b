"""`megatron-r1 convert verify`: is a folder what it should be? Five checks, each with a result of its own.

checksums: its files are those that were written. complete: its tensors are those of its architecture. structure:
transformers' model of its config.json has the same ones. config: what config.json says fits the tensors and the source.
inverse: every tensor is, byte for byte, what conversion makes of the source (`inverse.py`). logits, where asked for:
transformers and Megatron compute the same (`logits.py`). Reads only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from math import isfinite, prod
from pathlib import Path
from typing import Any, Literal

from megatron_r1.config.errors import UserError
from megatron_r1.convert import origin
from megatron_r1.convert.correspondence import SCALE, Correspondence
from megatron_r1.convert.formats.hf_config import CONFIG, export_config, hf_dtype, read_aux
from megatron_r1.convert.manifest import JOURNAL, MANIFEST, check_manifest
from megatron_r1.convert.plan import HfSource
from megatron_r1.convert.storage import FP8, Archive
from megatron_r1.convert.verification.logits import Logits, compare_logits, memory_needed
from megatron_r1.convert.verification.report import Check, Report, failed, not_done
from megatron_r1.convert.verification.sides import Side, known_origin, open_both
from megatron_r1.convert.verification.structure import check_structure

Progress = Callable[[int], None]
_NO_SOURCE = "no SOURCE was given"


def verify(
    target: Path,
    source: Path | None,
    *,
    like: Path | None,
    predictions: bool,
    logits: bool,
    workers: int,
    progress: Progress,
) -> Report:
    """Check `target`, a Hugging Face folder (converted or not) or a Megatron checkpoint.

    source: the folder that it was made from, of either kind. like: as for the conversion. predictions: False where the
    conversion left multi-token prediction out. logits: also compare logits. workers: threads; progress gets the bytes
    that are read, from all of them.

    Raises UserError for arguments with which a check that is asked for cannot be made; what is wrong with the folders
    themselves is in the report.
    """
    if logits and source is None:
        raise UserError("--logits compares DIR with SOURCE: name the folder that it was made from")
    tested, other = open_both(target, source, like, predictions)
    if logits and other is not None:
        _require_logits(tested, other)
    checks = [
        _checksums(tested, workers, progress),
        _complete(tested),
        _structure(tested),
        _config(tested, other, like),
        _inverse(tested, other, like, workers, progress),
        _logits(tested, other, predictions) if logits else not_done("logits", "--logits was not given"),
    ]
    return Report(str(target), None if source is None else str(source), checks)


def _checksums(tested: Side, workers: int, progress: Progress) -> Check:
    name, folder = "checksums", tested.folder
    manifest = folder / MANIFEST
    if not manifest.is_file():
        if (folder / JOURNAL).is_file():
            return failed(name, f"no {MANIFEST}: the conversion did not finish; run it again with --resume")
        if (folder / origin.KEPT / origin.RECORD).is_file():
            return failed(
                name, f"no {MANIFEST}, though a conversion wrote this folder; copy it again, or convert again"
            )
        return not_done(name, f"no {MANIFEST}: no conversion wrote this folder")
    try:
        problems = check_manifest(folder, progress=progress, workers=workers)
    except UserError as error:
        return failed(name, str(error))
    content = json.loads(manifest.read_bytes())
    of = "files have the size and the checksum" if "xxh3_128" in content else "files have the size (no checksums there)"
    count, size = len(content["files"]), sum(content["files"].values())
    summary = f"all {count} {of} of {MANIFEST}, {size / 1e9:.3f} GB"
    if problems:
        return Check(name, "failed", f"{len(problems)} of {count} files of {MANIFEST} are wrong", problems)
    return Check(name, "ok", summary, numbers={"files": count, "bytes": size})


def _complete(tested: Side) -> Check:
    if tested.source is None:
        return failed("complete", tested.error)
    source, table = tested.source, tested.source.table
    layers = f", {table.predictions} multi-token-prediction layer(s)" if table.predictions else ""
    beside = "".join(f"; {count} left out: {why}" for why, count in Counter(source.dropped.values()).items())
    archive = source.archive
    summary = f"{len(archive.tensors)} tensors, {archive.bytes / 1e9:.3f} GB: {table.family.name}{layers}{beside}"
    return Check("complete", "ok", summary, numbers={"tensors": len(archive.tensors), "bytes": archive.bytes})


def _structure(tested: Side) -> Check:
    if tested.kind == "megatron":
        return not_done("structure", "transformers knows Hugging Face folders only")
    if tested.source is None:
        return not_done("structure", "the folder could not be read (see complete)")
    return check_structure(tested.source.archive, tested.source.table)


def _config(tested: Side, other: Side | None, like: Path | None) -> Check:
    name = "config"
    if tested.source is None:
        return not_done(name, "the folder could not be read (see complete)")
    if other is not None and other.source is None:
        return not_done(name, "SOURCE could not be read (see inverse)")
    try:
        if tested.kind == "hf":
            return _hf_config(name, tested, other, like)
        if tested.kept is None:
            return not_done(name, f"the checkpoint keeps no {origin.KEPT}/{CONFIG}")
        if other is None or other.kind == "megatron":
            return not_done(name, _NO_SOURCE if other is None else "SOURCE is a Megatron checkpoint, too")
        return _kept_files(name, tested.kept, other)
    except UserError as error:
        return failed(name, str(error))


def _hf_config(name: str, tested: Side, other: Side | None, like: Path | None) -> Check:
    assert tested.source is not None
    archive = tested.source.archive
    config = json.loads(origin.config_bytes(tested.folder))
    quantised = any(tensor.dtype == FP8 for tensor in archive.tensors.values())
    problems = []
    if quantised != bool(config.get("quantization_config")):
        has = "is missing, but tensors are FP8" if quantised else "is there, but no tensor is FP8"
        problems.append(f"quantization_config {has}: loaders read another model")
    if quantised and _scales(tested) == "power-of-2":
        problems += _other_scales(tested.source.archive)
    if other is None or (other.kind == "megatron" and other.config == tested.folder):
        why = _NO_SOURCE if other is None else "SOURCE keeps no config.json and there is no --like"
        summary = f"{CONFIG} fits the tensors (quantization); not compared: {why}"
        return Check(name, "failed" if problems else "ok", problems[0] if problems else summary, problems[1:])
    assert other.source is not None
    dtype = _usual_dtype(archive)
    if (said := hf_dtype(config)) not in (None, dtype):
        problems.append(f"dtype is {said}, most tensors are {dtype}")
    due = json.loads(origin.config_bytes(other.config))
    edited = [
        export_config(each, dtype=dtype, fp8=None, mtp_layers=tested.source.table.predictions) for each in (config, due)
    ]
    problems += _differing_keys(*edited)
    if problems:
        return Check(name, "failed", f"{CONFIG} says something else than that of {other.config}", problems)
    return Check(name, "ok", f"{CONFIG} says the same as that of {other.config}, and fits the tensors")


def _other_scales(archive: Archive) -> list[str]:
    """Scales that are not what `scale_fmt` ue8m0 says: powers of two. Those of 0, of zeros, are left alone."""
    import torch

    from megatron_r1.convert.execute import Maker

    maker, wrong = Maker(), []
    try:
        for stored in archive.tensors.values():
            if stored.name.endswith(SCALE):
                scale = maker.scale(stored)
                mantissa, _ = torch.frexp(scale)
                count = int(((mantissa != 0.5) & (scale != 0)).sum())
                if count:
                    wrong.append(f"scale_fmt is ue8m0, but {count} scales of {stored.name} are no powers of two")
    finally:
        maker.close()
    return wrong


def _differing_keys(found: dict[str, Any], due: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {json.dumps(found.get(key))} instead of {json.dumps(due.get(key))}"
        for key in sorted(found.keys() | due.keys())
        if found.get(key) != due.get(key)
    ]


def _kept_files(name: str, kept: Path, other: Side) -> Check:
    """What an import keeps, apart from scales, which `inverse` compares."""
    assert other.source is not None
    beside, _ = read_aux(other.folder)
    due = origin.kept_files(origin.of_archive(other.source.archive)) | beside
    problems = []
    for file, content in due.items():
        path = kept / file
        if not path.is_file():
            problems.append(f"{origin.KEPT}/{file} is missing")
        elif (found := path.read_bytes()) != content and (file in beside or not _same_json(found, content)):
            problems.append(f"{origin.KEPT}/{file} is not what {other.folder} has")
    files = ", ".join(f"{origin.KEPT}/{file}" for file in due)
    return Check(name, "failed" if problems else "ok", f"{files} against {other.folder}", problems)


def _same_json(found: bytes, due: bytes) -> bool:
    try:
        return bool(json.loads(found) == json.loads(due))
    except ValueError:
        return False


def _usual_dtype(archive: Archive) -> str:
    counted: Counter[str] = Counter()
    for tensor in archive.tensors.values():
        if tensor.dtype != FP8 and not tensor.name.endswith(SCALE):
            counted[tensor.dtype] += tensor.bytes
    return counted.most_common(1)[0][0]


def _inverse(tested: Side, other: Side | None, like: Path | None, workers: int, progress: Progress) -> Check:
    name = "inverse"
    if other is None:
        return not_done(name, _NO_SOURCE)
    if tested.source is None:
        return not_done(name, "the folder could not be read (see complete)")
    if other.source is None:
        return failed(name, f"SOURCE: {other.error}")
    if problems := _other_model(tested.source.table, other.source.table):
        return Check(name, "failed", "the two folders hold different models", problems)
    from megatron_r1.convert.verification.inverse import compare

    try:
        known = known_origin(other, like)
        kept = None
        if tested.kept is not None and (tested.kept / origin.RECORD).is_file():
            kept = dict(origin.of_folder(tested.kept).scales)
        found = compare(
            tested.source,
            other.source,
            known,
            kept=kept,
            scales=_scales(tested),
            workers=workers,
            progress=progress,
        )
    except UserError as error:
        return failed(name, str(error))
    done = ", ".join(f"{_size(size)} by {operation}" for operation, size in found.done.most_common())
    state: Literal["ok", "failed"] = "failed" if found.differences else "ok"
    bad = len({difference.name for difference in found.differences})
    summary = (
        f"{bad} of {found.tensors} tensors differ from" if bad else f"all {found.tensors} tensors are, to the byte,"
    )
    notes = []
    if bad and any(d.name.endswith(SCALE) for d in found.differences) and not known.scales:
        notes.append("nothing says which FP8 scales the model came with: name its folder with --like")
    return Check(
        name,
        state,
        f"{summary} what {other.folder} gives: {done}",
        [str(difference) for difference in found.differences],
        notes,
        {"tensors": found.tensors, "bytes": dict(found.done), "differences": [d.as_dict() for d in found.differences]},
    )


def _other_model(tested: Correspondence, source: Correspondence) -> list[str]:
    """How the tables of two folders differ, none where they are of one model."""
    if tested.predictions != source.predictions:
        return [
            f"DIR has {tested.predictions} multi-token-prediction layer(s), SOURCE {source.predictions}; if the "
            "conversion left them out, give --no-mtp"
        ]
    left, right = ({name: entry.shape for name, entry in table.entries.items()} for table in (tested, source))
    names = sorted(left.keys() ^ right.keys())
    return [f"{name} is in only one of them" for name in names] + [
        f"{name} is {list(shape)} here and {list(right[name])} in SOURCE"
        for name, shape in left.items()
        if right.get(name, shape) != shape
    ]


def _scales(tested: Side) -> Literal["fp32", "power-of-2"]:
    if tested.kind == "megatron":
        return "fp32"
    given = json.loads(origin.config_bytes(tested.folder)).get("quantization_config") or {}
    return "power-of-2" if given.get("scale_fmt") == "ue8m0" else "fp32"


def _size(count: int) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e7 else f"{count / 1e6:.3f} MB"


# ---- logits


def _pair(tested: Side, other: Side) -> tuple[Side, Side] | None:
    """(Hugging Face, Megatron)."""
    by_kind = {side.kind: side for side in (tested, other)}
    return (by_kind["hf"], by_kind["megatron"]) if len(by_kind) == 2 else None


def _require_logits(tested: Side, other: Side) -> None:
    """Raise UserError for folders whose logits cannot be compared here; known before anything long begins."""
    pair = _pair(tested, other)
    if pair is None:
        raise UserError(f"--logits compares a Hugging Face folder with a Megatron checkpoint; both are {tested.kind}")
    source = pair[0].source
    if not isinstance(source, HfSource):
        return
    if source.quantised:
        raise UserError(
            f"--logits: transformers does not run {pair[0].folder} in FP8 on a CPU; compare its BF16 version, which "
            "`convert cast --dtype bf16` makes"
        )
    import psutil

    parameters = sum(prod(tensor.shape) for tensor in source.archive.tensors.values())
    needed, free = memory_needed(parameters), psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--logits: both models are computed in memory, in fp32: {needed / 1e9:.1f} GB for {parameters:,} "
            f"parameters, and {free / 1e9:.1f} GB are available. Leave --logits out, or use a machine with more memory"
        )


def _logits(tested: Side, other: Side | None, predictions: bool) -> Check:
    name = "logits"
    pair = None if other is None else _pair(tested, other)
    if pair is None or any(side.source is None for side in pair):
        return not_done(name, "a folder could not be read (see complete and inverse)")
    hf, megatron = pair
    try:
        found = compare_logits(hf.folder.absolute(), megatron.folder.absolute(), predictions=predictions)
    except UserError as error:
        return failed(name, str(error))
    return _logits_check(name, found)


def _logits_check(name: str, found: Logits) -> Check:
    notes = (*found.notes, "multi-token prediction is not run: transformers has none")
    summary = (
        f"the largest difference in {found.tokens} random tokens is {found.largest:.2e} ({found.bound:.1e} is allowed, "
        f"the largest logit is {found.magnitude:.3g})"
    )
    largest = found.largest if isfinite(found.largest) else None
    numbers = {"largest": largest, "allowed": found.bound, "tokens": found.tokens}
    return Check(name, "ok" if found.ok else "failed", summary, notes=notes, numbers=numbers)
