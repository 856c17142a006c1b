"""`megatron-r1 convert ...`: the arguments, what a plan looks like on a terminal, the progress bar."""

from __future__ import annotations

import argparse
import json
import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1.config.errors import UserError
from megatron_r1.convert.progress import byte_progress, size_text

if TYPE_CHECKING:
    from megatron_r1.convert.conversion import Conversion
    from megatron_r1.convert.correspondence import Correspondence

EXIT_DIFFERENT = 1
_DESCRIPTION = """\
Convert checkpoints between Hugging Face and Megatron-Core, on a CPU, in bounded memory, without building a model.
Every tensor of both sides is accounted for before the first byte is written, or the command ends with an error.
"""
_EXAMPLES = """\
examples:
  megatron-r1 convert import ~/models/Qwen2.5-7B ckpt/qwen            Hugging Face -> torch_dist, any TP/PP/EP loads it
  megatron-r1 convert export runs/x/r1-zero/checkpoints/step-00000600 out --like ~/models/Qwen2.5-7B
  megatron-r1 convert export ckpt/r1 out --dtype fp8 --workers 8      blocks that training left alone keep their bytes
  megatron-r1 convert cast DeepSeek-V3 DeepSeek-V3-bf16 --dtype bf16  FP8 -> BF16 without a GPU
  megatron-r1 convert verify out ckpt/r1                              checksums, key list, and every byte again
  megatron-r1 convert inspect --preset deepseek-v3 --dtype fp8        a checkpoint that exists only as a config

An interrupted conversion goes on with --resume and gives the same bytes. Exit status: 0 done; 1 verify found a
difference; 2 a mistake in the arguments or the input; 130 or 143 stopped by a signal.
"""


def add_convert(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `convert` command with its own commands."""
    convert = verbs.add_parser(
        "convert",
        help="convert, verify and inspect checkpoints (Hugging Face <-> Megatron, FP8 <-> BF16)",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = convert.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_import, _add_export, _add_cast, _add_verify, _add_inspect):
        add(kinds)


def _add_import(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "import",
        help="Hugging Face folder -> Megatron torch_dist checkpoint",
        description="Write a Hugging Face model as a torch_dist checkpoint that Megatron loads under any layout. FP8 "
        "weights become BF16; their scales, the tokenizer and config.json are kept in MEGATRON_DIR/hf for the export.",
    )
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors files")
    parser.add_argument("target", type=Path, metavar="MEGATRON_DIR", help="folder to write, new or empty")
    parser.add_argument(
        "--spec",
        choices=("te", "local"),
        default="te",
        help="whose parameter names: Transformer Engine's (default; GPUs) or Megatron's own layers (CPU). They differ "
        "for DeepSeek-V3 only, and runs of this project load both",
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of all weights (default: as they are)")
    parser.add_argument(
        "--release",
        action="store_true",
        help="write MEGATRON_DIR/release and latest_checkpointed_iteration.txt, as Megatron-LM's --load looks for them",
    )
    _add_common(parser)
    parser.set_defaults(command=_import)


def _add_export(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "export",
        help="Megatron checkpoint (torch_dist or legacy mp_rank_*) -> Hugging Face folder",
        description="Write the weights of a Megatron checkpoint of any TP/PP/EP layout as a Hugging Face folder that "
        "transformers, SGLang and vLLM load. Optimizer state is left out.",
    )
    parser.add_argument(
        "source", type=Path, metavar="MEGATRON_DIR", help="the checkpoint, or Megatron-LM's --load folder"
    )
    parser.add_argument("target", type=Path, metavar="HF_DIR", help="folder to write, new or empty")
    _add_like(parser)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="take the tokenizer's files from here")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32", "fp8"),
        help="of the weights (default: what the model came with, else config.json's). fp8: 128x128 blocks",
    )
    _add_scales(parser)
    _add_common(parser)
    parser.set_defaults(command=_export)


def _add_cast(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "cast",
        help="Hugging Face folder in another dtype: FP8 -> BF16, BF16 -> FP8",
        description="Write a Hugging Face model in another dtype. FP8 is DeepSeek-V3's: E4M3 in 128x128 blocks with "
        "FP32 scales; embeddings, output head, norms, router and eh_proj are not quantised.",
    )
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors files")
    parser.add_argument("target", type=Path, metavar="OUT_DIR", help="folder to write, new or empty")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "fp8"), required=True, help="of the weights")
    _add_scales(parser)
    _add_common(parser)
    parser.set_defaults(command=_cast)


def _add_verify(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "verify",
        help="prove that a converted folder is what it should be",
        description="Check a converted folder: the checksums in its manifest.json; its key list and shapes against the "
        "table and against the model that transformers builds from config.json (on the meta device); with SOURCE, the "
        "inverse conversion, byte for byte; with --logits, that transformers and Megatron compute the same.",
    )
    parser.add_argument("target", type=Path, metavar="DIR", help="a folder that convert wrote (either kind)")
    parser.add_argument("source", type=Path, nargs="?", metavar="SOURCE", help="the folder that it was made from")
    _add_like(parser)
    parser.add_argument("--no-mtp", action="store_true", help="the conversion left the multi-token prediction out")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="also compare logits, in fp32, of transformers (HF folder) and Megatron (checkpoint); both models are "
        "built in memory. Needs SOURCE",
    )
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="threads (default 1)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(command=_verify)


def _add_inspect(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "inspect",
        help="list the tensors of a checkpoint, or of a model that exists only as a config",
        description="Show what a checkpoint holds: tensors, shapes, dtypes, bytes. With --preset or --config instead "
        "of a folder: what such a model's checkpoint would hold, and that both conversions of it can be planned.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR", help="Hugging Face folder or Megatron checkpoint"
    )
    parser.add_argument("--preset", metavar="NAME", help="a shipped architecture, e.g. deepseek-v3")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a Hugging Face config.json")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32", "fp8"),
        default="bf16",
        help="with --preset, --config (default bf16)",
    )
    parser.add_argument("--no-mtp", action="store_true", help="with --preset, --config: without multi-token prediction")
    parser.add_argument("--tensors", action="store_true", help="one line a tensor instead of one for all alike")
    parser.add_argument("--json", action="store_true", help="print counts as one JSON object")
    parser.set_defaults(command=_inspect)


def _add_like(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--like",
        type=Path,
        metavar="HF_DIR",
        help="the Hugging Face folder that the model came from, or a config.json: gives architecture, tokenizer, "
        "dtypes, file names and FP8 scales (default: what an import kept in MEGATRON_DIR/hf)",
    )


def _add_scales(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scales",
        choices=("fp32", "power-of-2"),
        help="of FP8 blocks: fp32 (amax / 448, as DeepSeek-V3 and R1) or power-of-2 (ue8m0, as V3.1); default: as "
        "config.json says, else fp32",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-mtp", action="store_true", help="leave the multi-token-prediction layers out")
    parser.add_argument(
        "--shard-gb", type=_gigabytes, default=5.0, metavar="GB", help="most of a file (default 5; 1 GB = 10^9 bytes)"
    )
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="files written at a time (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, every tensor of it, and write nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: the plan as one JSON object")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted conversion; a finished one is only checked"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in the target folder")
    parser.add_argument(
        "--trust-source",
        action="store_true",
        help="do not read a source that has a manifest.json first, to compare its checksums",
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number above 0")
    return int(text)


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value * 1e9 >= 1 and isfinite(value * 1e9)):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a number above 0")
    return value


def _import(arguments: argparse.Namespace) -> int:
    from megatron_r1.convert.conversion import import_conversion
    from megatron_r1.convert.formats.torch_dist import TRACKER
    from megatron_r1.convert.manifest import atomic_write

    tracker = arguments.target / TRACKER
    if arguments.release:
        _check_tracker(tracker)
    conversion = import_conversion(
        arguments.source,
        spec=arguments.spec,
        dtype=arguments.dtype,
        predictions=not arguments.no_mtp,
        file_bytes=int(arguments.shard_gb * 1e9),
    )
    target = arguments.target / "release" if arguments.release else arguments.target
    status = _carry_out(conversion, target, arguments)
    if arguments.release and not arguments.dry_run:
        atomic_write(tracker, b"release\n")
    return status


def _check_tracker(tracker: Path) -> None:
    """Raise UserError where Megatron-LM's --load finds another checkpoint through this file."""
    from megatron_r1.convert.manifest import disk_errors

    if not tracker.is_file():
        return
    with disk_errors(tracker):
        text = tracker.read_text(errors="replace").strip()
    if text != "release":
        raise UserError(
            f"{tracker} says {text[:40]!r}: --load of {tracker.parent} goes on with that checkpoint; with --release it "
            "would find the import instead. Choose another folder, or remove that file first"
        )


def _export(arguments: argparse.Namespace) -> int:
    from megatron_r1.convert.conversion import export_conversion

    conversion = export_conversion(
        arguments.source,
        like=arguments.like,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
        scales=arguments.scales,
        predictions=not arguments.no_mtp,
        shard_bytes=int(arguments.shard_gb * 1e9),
    )
    return _carry_out(conversion, arguments.target, arguments)


def _cast(arguments: argparse.Namespace) -> int:
    from megatron_r1.convert.conversion import cast_conversion

    conversion = cast_conversion(
        arguments.source,
        dtype=arguments.dtype,
        scales=arguments.scales,
        predictions=not arguments.no_mtp,
        shard_bytes=int(arguments.shard_gb * 1e9),
    )
    return _carry_out(conversion, arguments.target, arguments)


def _carry_out(conversion: Conversion, target: Path, arguments: argparse.Namespace) -> int:
    """Print the plan (--dry-run), or write it with a progress bar."""
    from megatron_r1.convert.conversion import check_apart, check_source, run
    from megatron_r1.convert.manifest import fp8_blocks, has_checksums, read_manifest
    from megatron_r1.convert.plan_text import plan_json, plan_lines

    workers = arguments.workers
    if arguments.dry_run:
        lines = [json.dumps(plan_json(conversion, workers))] if arguments.json else plan_lines(conversion, workers)
        for line in lines:
            print(line)
        return 0
    check_apart(conversion, target)
    for note in conversion.notes:
        print(f"note: {note}", file=sys.stderr)
    if not arguments.trust_source and has_checksums(conversion.source):
        total = sum(read_manifest(conversion.source)["files"].values())
        with byte_progress(f"check {conversion.source}", total) as advance:
            check_source(conversion, workers=workers, progress=advance)
    with byte_progress(f"{conversion.kind} to {target}", conversion.plan.bytes) as advance:
        written = run(
            conversion,
            target,
            workers=workers,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            progress=advance,
        )
    files = len(conversion.plan.files)
    what = f"{size_text(conversion.plan.bytes)} in {files} file{'s' * (files > 1)}"
    if written:
        blocks = fp8_blocks(target)
        print(f"{target}: {what}, checksums in manifest.json" + (f"; {blocks}" if blocks else ""))
    else:
        print(f"{target}: {what}, finished before; every checksum is right, nothing was written")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_r1.convert.verification.verify import verify

    with byte_progress(f"verify {arguments.target}", None) as advance:
        report = verify(
            arguments.target,
            arguments.source,
            like=arguments.like,
            predictions=not arguments.no_mtp,
            logits=arguments.logits,
            workers=arguments.workers,
            progress=advance,
        )
    if arguments.json:
        print(json.dumps(report.as_dict()))
    else:
        print("\n".join(report.lines()))
    return 0 if report.ok else EXIT_DIFFERENT


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_r1.convert.inspecting import Inventory, plan_both_ways, planned_hf
    from megatron_r1.convert.plan_text import inventory_lines

    given = [x for x in (arguments.folder, arguments.preset, arguments.config) if x is not None]
    if len(given) != 1:
        raise UserError("inspect: give exactly one of DIR, --preset and --config")
    plans: dict[str, Any] = {}
    if arguments.folder is not None:
        archive = _read(arguments.folder)
    else:
        table = _table(arguments)
        archive = planned_hf(table, arguments.dtype)
        plans = {"plans": plan_both_ways(table, arguments.dtype, "te", 5 * 10**9)}
    inventory = Inventory(archive.kind, archive.tensors)
    if arguments.json:
        print(json.dumps({**inventory.summary(), **plans}))
    else:
        for line in inventory_lines(inventory, each=arguments.tensors, plans=plans.get("plans")):
            print(line)
    return 0


def _table(arguments: argparse.Namespace) -> Correspondence:
    from importlib import resources

    from megatron_r1.convert.correspondence import Correspondence
    from megatron_r1.model.presets import load_architecture, preset_names

    path = arguments.config
    if arguments.preset is not None:
        if arguments.preset not in preset_names():
            raise UserError(f"--preset: there is no {arguments.preset!r}; there are {', '.join(preset_names())}")
        path = Path(str(resources.files("megatron_r1.model") / "presets" / f"{arguments.preset}.json"))
    return Correspondence(load_architecture(path), predictions=not arguments.no_mtp)


def _read(folder: Path) -> Any:
    """The archive of a folder of any kind."""
    from megatron_r1.convert.formats import legacy, torch_dist
    from megatron_r1.convert.formats.hf_files import is_hf, read_hf

    if is_hf(folder):
        return read_hf(folder)
    checkpoint = torch_dist.checkpoint_folder(folder)
    if legacy.is_legacy(checkpoint):
        return legacy.read_legacy(checkpoint, lambda _: "none")
    return torch_dist.read_torch_dist(checkpoint)
