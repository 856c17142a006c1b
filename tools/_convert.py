"""What the scripts beside this file share: `megatron-r1 convert`, or how to install it."""

from __future__ import annotations

import sys
from pathlib import Path


def convert(*arguments: str) -> int:
    """`megatron-r1 convert` with these arguments and the script's own; returns its exit status."""
    try:
        from megatron_r1.cli import main
    except ModuleNotFoundError as error:
        folder = Path(__file__).resolve().parents[1]
        print(f"{sys.argv[0]}: {error.name} is not installed: run `pip install -e .` in {folder}", file=sys.stderr)
        return 2
    return main(["convert", *arguments, *sys.argv[1:]])
