"""The benchmark of the log-prob head measures what it says, on a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKENS, VOCABULARY = 512, 32_000


def test_a_small_run_of_the_benchmark() -> None:
    size = ["--tokens", str(TOKENS), "--vocabulary", str(VOCABULARY), "--hidden", "16", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/logprob_head.py", *size, "--threads", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    logits = 4 * TOKENS * VOCABULARY
    # Full: logits, a scaled copy, weights, and two passing copies. Head: two blocks of 32 MiB, and small change.
    assert 3.5 * logits < result["full_extra_bytes"] < 7 * logits
    assert result["head_extra_bytes"] < 1.5 * logits
    assert result["memory_ratio"] == result["head_extra_bytes"] / result["full_extra_bytes"]
    assert result["time_ratio"] == result["head_seconds"] / result["full_seconds"]
    assert 0 < result["log_prob_difference"] < 1e-5 and 0 < result["gradient_difference"] < 1e-5
