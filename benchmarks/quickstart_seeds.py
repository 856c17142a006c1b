"""The quickstart under several seeds: does R1-Zero succeed every time, and how long does it take?

    python benchmarks/quickstart_seeds.py --seeds 1 2 3 4 5

Runs `examples/quickstart/recipe.toml` from scratch once a seed (pre-training, evaluation, R1-Zero, evaluation) and
prints a table, then one JSON object on the last line. A finished run in --root is read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import ROOT, commit, machine

RECIPE = ROOT / "examples" / "quickstart" / "recipe.toml"
COLUMNS = ("pass@1_before", "pass@1", "cons@16_before", "cons@16", "mean_tokens_before", "mean_tokens", "seconds")


def main() -> None:
    """Run every seed and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--root", type=Path, default=Path("runs/seeds"), help="where the runs go")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to replace")
    arguments = parser.parse_args()
    rows = {seed: run(seed, arguments.root / f"seed-{seed}", arguments.overrides) for seed in arguments.seeds}
    print(table(rows))
    goals = [
        row["pass@1_before"] <= 0.16
        and row["pass@1"] >= 0.71
        and row["cons@16"] >= max(0.867, row["pass@1"])
        and row["mean_tokens"] > row["mean_tokens_before"]
        for row in rows.values()
    ]
    result = {
        "seeds": {str(seed): {name: row[name] for name in COLUMNS} for seed, row in rows.items()},
        "reached_the_papers_curve": sum(goals),
        "machine": machine(),
        "commit": commit(),
    }
    print(json.dumps(result))


def run(seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """COLUMNS of one seed's run: the first evaluation, the last one, and the time inside all stages."""
    summary = folder / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "megatron_r1.cli", "run", str(RECIPE), f"seed={seed}", *overrides]
        subprocess.run([*command, "--run-dir", str(folder)], check=True, cwd=ROOT)
    before, *_, after = json.loads(summary.read_text())
    names = {"pass@1": "accuracy", "cons@16": "cons@16", "mean_tokens": "mean_tokens"}
    row = {f"{name}_before": before[column] for name, column in names.items()}
    row |= {name: after[column] for name, column in names.items()}
    stages = json.loads((folder / "stages.json").read_text())["stages"]
    return row | {"seconds": round(sum(stage["finished"] - stage["started"] for stage in stages), 1)}


def table(rows: dict[int, dict[str, Any]]) -> str:
    """A Markdown table, one row a seed."""
    lines = ["| seed | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for seed, row in rows.items():
        cells = [f"{100 * row[c]:.1f} %" if "@" in c else f"{row[c]:.1f}" for c in COLUMNS]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


if __name__ == "__main__":
    main()
