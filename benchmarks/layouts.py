"""Every layout against one process: losses, gradient norms and parameters after three optimizer steps.

    python benchmarks/layouts.py                  # all of them, 10 to 15 minutes on two cores
    python benchmarks/layouts.py --only CP        # layouts whose name holds "CP"
    python benchmarks/layouts.py --write          # and write docs/parallelism.md

Trains the layouts of tests/dist/layout_table.py in worlds of 2, 4 and 8 gloo processes on this machine, from the same
checkpoint and with the same samples as one process, and prints the table of differences. The last line is one JSON
object: the number of layouts and the largest difference of each column for GRPO with packed rows, then the same for the
other objectives; exits with 1 when one is beyond its bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from machine import ROOT, commit, machine

sys.path.insert(0, str(ROOT))  # the layouts and how they are trained belong to the tests

from tests.dist.layout_table import BOUNDS, MODELS, OBJECTIVES, Row, document, markdown, measure

DOCUMENT = ROOT / "docs" / "parallelism.md"


def main() -> int:
    """Measure, print, and write the document when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="text that the layout's name must hold")
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="default: all")
    parser.add_argument("--write", action="store_true", help="write docs/parallelism.md (all layouts only)")
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.model):
        parser.error("--write needs all layouts: leave out --only and --model")
    print(f"{machine()}; commit {commit()}")
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        chosen = arguments.model or sorted(MODELS)
        rows = measure(chosen, Path(scratch), lambda layout: arguments.only in layout.name, progress)
    print(markdown(rows))
    if arguments.write:
        DOCUMENT.write_text(document(rows, machine(), commit()), encoding="utf-8")
        print(f"written: {DOCUMENT}")
    beyond = [f"{row.model} {row.objective} {row.layout}: {', '.join(row.beyond)}" for row in rows if row.beyond]
    for line in beyond:
        print(f"beyond its bound ({BOUNDS}): {line}")
    others = {kind: largest(rows, kind) for kind in OBJECTIVES if kind != "grpo"}
    print(json.dumps({"layouts": len({(r.model, r.layout) for r in rows}), **largest(rows, "grpo"), "others": others}))
    return 1 if beyond else 0


def largest(rows: list[Row], objective: str) -> dict[str, float]:
    """Over all layouts, the largest cell of each column of this objective."""
    columns = {"max_loss": "loss", "max_grad_norm": "grad_norm", "max_param": "param_max", "mean_param": "param_mean"}
    chosen = [row for row in rows if row.objective == objective]
    return {name: max(getattr(row, column) for row in chosen) for name, column in columns.items()}


if __name__ == "__main__":
    sys.exit(main())
