"""Which warnings a rank shows: ours always, a library's about itself never."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_only_libraries_are_silenced() -> None:
    code = """
import warnings
from megatron_r1.config.load import load  # noqa: F401 - any module of ours
from megatron_r1.pipeline import worker

for category in worker.QUIET_CATEGORIES:
    warnings.filterwarnings("ignore", category=category, module=worker.QUIET_MODULES)
for module in ("torch.distributed.c10d_logger", "megatron.core.optimizer", "megatron_r1.train.loop", "torchless"):
    for category in (FutureWarning, UserWarning, RuntimeWarning):
        warnings.warn_explicit(f"{module} {category.__name__}", category, module, 1, module)
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    found = sorted(line.split(": ", 2)[2] for line in shown.stderr.splitlines() if "Warning: " in line)
    assert found == [
        "megatron.core.optimizer RuntimeWarning",
        "megatron_r1.train.loop FutureWarning",
        "megatron_r1.train.loop RuntimeWarning",
        "megatron_r1.train.loop UserWarning",
        "torch.distributed.c10d_logger RuntimeWarning",
        "torchless FutureWarning",
        "torchless RuntimeWarning",
        "torchless UserWarning",
    ], shown.stderr
