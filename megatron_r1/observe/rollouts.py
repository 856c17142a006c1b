"""Every completion of a rollout phase with its reward breakdown, as gzipped JSON lines that
`datasets` reads.

Written by rank 0 after scoring, one file a phase: rollouts/step-000120.jsonl.gz. Read by the report
and by anyone: `datasets.load_dataset("json",
data_files="runs/<name>/<stage>/rollouts/*.jsonl.gz")`.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.observe.rundir import StageDir
from megatron_r1.types import Completion, Group, LanguageUse, Prompt

_FILE = re.compile(r"step-(\d{6,})\.jsonl\.gz")


class RolloutWriter:
    """Writes the files of one stage; use it on one process only."""

    def __init__(self, stage_dir: Path) -> None:
        self._stage = StageDir(Path(stage_dir))

    def write(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[Sequence[float]] | None = None,
        benchmarks: Sequence[str] | None = None,
    ) -> Path:
        """Write groups [N] of completions [G], advantages [N][G] or None; returns the file.

        step: optimizer steps done when the phase began. A stage gives advantages always or never.
        benchmarks: [N] names of the benchmarks that ask, for a column of that name; None: no such column.
        The file appears as a whole and replaces one of the same step; the same input gives the same
        bytes. Raises ValueError when lengths differ, a score is missing or a number is not finite.
        """
        path = self._stage.rollout_file(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{path.name}.tmp")
        table: Sequence[Sequence[float | None]] = (
            advantages if advantages is not None else [[None] * len(g.completions) for g in groups]
        )
        asked: Sequence[str | None] = [None] * len(groups) if benchmarks is None else benchmarks
        shared = _shared_columns(groups)
        with (
            temp.open("wb") as raw,
            # no time and name in the header, so that a repeated phase gives the same bytes
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=4) as packed,
        ):
            for group, row, benchmark in zip(groups, table, asked, strict=True):
                for index, (completion, advantage) in enumerate(zip(group.completions, row, strict=True)):
                    record = _record(step, group.prompt, index, completion, advantage)
                    record |= {name: value | record.get(name, {}) for name, value in shared.items()}
                    if benchmark is not None:
                        record["benchmark"] = benchmark
                    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
                    # "replace": half a surrogate pair, which a decoder may emit, is no UTF-8
                    packed.write(line.encode("utf-8", "replace") + b"\n")
        os.replace(temp, path)
        return path

    def truncate_after(self, step: int) -> list[Path]:
        """Remove the files of phases after a resume point, i.e. of steps > `step`; returns them."""
        gone = [path for number, path in rollout_files(self._stage.path) if number > step]
        for path in gone:
            path.unlink()
        return gone


def _shared_columns(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """What rows without it are given because others of the file have it: a file has the same columns throughout.

    Problem sets, and domains of prompts, differ in what is measured: a part of the reward is then 0, and the thought
    has no language.
    """
    scores = [c.score for group in groups for c in group.completions if c.score is not None]
    parts = {name: 0.0 for score in scores for name in score.parts}
    measured = any(score.language is not None for score in scores)
    none = LanguageUse(target="", words=0.0, target_words=0.0)
    return {"reward_parts": parts, **({"language": asdict(none)} if measured else {})}


def _record(step: int, prompt: Prompt, index: int, completion: Completion, advantage: float | None) -> dict[str, Any]:
    # Every column keeps one type in every file: `datasets` takes the types from the first file, and
    # a column of nulls, or of whole numbers, there would make it refuse the later ones.
    score = completion.score
    if score is None:
        raise ValueError(f"completion {index} of {prompt.id} has no score; score a phase, then write it")
    use = score.language
    return {
        "step": step,
        "prompt_id": prompt.id,
        "sample": index,
        "question": prompt.question,
        "answer": prompt.answer or "",
        "text": completion.text,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "weight_versions": list(completion.weight_versions),
        "reward": float(score.total),
        "reward_parts": {name: float(value) for name, value in score.parts.items()},
        "verdict": score.verdict.status,
        "extracted": score.verdict.extracted or "",
        "verdict_detail": score.verdict.detail,
        "advantage": None if advantage is None else float(advantage),
        **({} if use is None else {"language": asdict(use)}),
    }


def rollout_files(stage_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of each phase of a stage, in order of steps."""
    found = [(_FILE.fullmatch(path.name), path) for path in StageDir(Path(stage_dir)).rollouts.glob("step-*")]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def iterate_rollouts(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one file, one at a time. Raises UserError when the file is damaged."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: damaged rollout file ({error}); delete it and try again") from error


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """All rows of one file. Raises UserError when the file is damaged."""
    return list(iterate_rollouts(path))
