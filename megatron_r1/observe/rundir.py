"""The run directory: every path in one place, the files that describe a run, and the states of its
stages.

    runs/<name>/recipe.toml resolved.toml stages.json departures.json summary.json report.html
    runs/<name>/<stage>/metrics.jsonl tensorboard/ rollouts/ checkpoints/ data.jsonl hf/
    runs/<name>/superseded/<stage>-N/                 results that a changed setting or input has replaced
    logs/attempt-N/rank-R.log

The pipeline writes here, `megatron-r1 status` and `report` read. Every file is replaced as a whole
(temp + rename), so a reader, or a resume after a kill, never sees half of one. Only rank 0 writes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_r1.config.errors import UserError

State = Literal["pending", "running", "done", "failed"]


@dataclass(kw_only=True, slots=True)
class StageState:
    """One stage in stages.json. `result` of an eval stage holds `eval/...` metrics under their own
    names.

    Example: StageState(name="r1-zero", kind="grpo", state="running", steps_done=120, steps=600,
    started=1.7e9).
    """

    name: str
    kind: str  # "pretrain", "grpo", "eval", ...
    state: State = "pending"
    steps_done: int = 0
    steps: int = 0  # 0 where a stage has no optimizer steps
    started: float | None = None  # seconds since 1970
    finished: float | None = None
    result: dict[str, Any] = field(default_factory=dict)
    why: str = ""  # why it runs, or ran, again
    settings: dict[str, Any] = field(default_factory=dict)  # those that its result depends on
    inputs: dict[str, str] = field(default_factory=dict)  # key of the recipe -> digest of what was read there
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # file -> {"bytes": .., "sha256": ..}, once done


@dataclass(kw_only=True, slots=True)
class Departure:
    """One entry of departures.json: where the run departs from the paper."""

    key: str  # the recipe's key, e.g. "stage.grpo.loss.clip_low"
    paper: str
    here: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class StageDir:
    """The folder of one stage."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One JSON object a line, see `observe/metrics.py`."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files, same names and numbers."""
        return self.path / "tensorboard"

    @property
    def rollouts(self) -> Path:
        """One file a rollout phase, see `observe/rollouts.py`."""
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """Megatron shards, written by `checkpoint`."""
        return self.path / "checkpoints"

    @property
    def data(self) -> Path:
        """What a stage that makes data writes: one row a line."""
        return self.path / "data.jsonl"

    @property
    def hf(self) -> Path:
        """What an export stage writes."""
        return self.path / "hf"

    def rollout_file(self, step: int) -> Path:
        """File of the rollout phase that began after `step` optimizer steps."""
        return self.rollouts / f"step-{step:06d}.jsonl.gz"

    def log_dir(self, attempt: int) -> Path:
        """Logs of one attempt; attempts count from 1."""
        return self.path / "logs" / f"attempt-{attempt}"

    def next_attempt(self) -> int:
        """1 + the highest attempt that has a log folder; 1 for a new stage."""
        found = [p.name.removeprefix("attempt-") for p in (self.path / "logs").glob("attempt-*")]
        return 1 + max((int(n) for n in found if n.isdigit()), default=0)


@dataclass(frozen=True, slots=True)
class RunDir:
    """The folder of one run."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run directory. Raises UserError when `path` is none."""
        run = cls(Path(path))
        if not run.path.is_dir():
            raise UserError(f"{path}: there is no such folder; give the folder of a run, e.g. runs/<name>")
        if not any(p.is_file() for p in (run.stages_file, run.resolved, run.recipe)):
            raise UserError(
                f"{path}: not a run directory, it has none of stages.json, resolved.toml, "
                "recipe.toml; give the folder that `megatron-r1 run` wrote, e.g. runs/<name>"
            )
        return run

    @property
    def recipe(self) -> Path:
        """The recipe as the user gave it."""
        return self.path / "recipe.toml"

    @property
    def resolved(self) -> Path:
        """The recipe with every default and override filled in."""
        return self.path / "resolved.toml"

    @property
    def stages_file(self) -> Path:
        """States of the stages."""
        return self.path / "stages.json"

    @property
    def departures_file(self) -> Path:
        """What departs from the paper."""
        return self.path / "departures.json"

    @property
    def summary_file(self) -> Path:
        """The closing table, a list of rows (`pipeline/summary.py`)."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.path / "report.html"

    @property
    def lock_file(self) -> Path:
        """Held while a run is at work here, see `observe/liveness.py`."""
        return self.path / "run.lock"

    def stage(self, name: str) -> StageDir:
        """Folder of the stage `name`; it need not exist yet."""
        return StageDir(self.path / name)

    @property
    def superseded(self) -> Path:
        """Where replaced results are moved to."""
        return self.path / "superseded"

    def read_stages(self) -> list[StageState]:
        """States in the order of the recipe; empty before the run has written any."""
        return self._read("stages")

    def known_states(self) -> dict[str, StageState]:
        """By name: the recipe's stages, and others that were in it once and may come back."""
        return {state.name: state for state in (*self._read("others"), *self._read("stages"))}

    def _read(self, key: str) -> list[StageState]:
        if not self.stages_file.exists():
            return []
        try:
            content = read_json(self.stages_file)
            found = content["stages"] if key == "stages" else content.get(key, [])
            return [StageState(**stage) for stage in found]
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{self.stages_file}: not a list of stage states ({error}); {_RESTORE}") from error

    def write_stages(self, stages: Sequence[StageState]) -> None:
        """Replace stages.json. Stages that are not among these any more stay known."""
        names = {stage.name for stage in stages}
        others = [state for name, state in self.known_states().items() if name not in names]
        content = {"stages": [dataclasses.asdict(stage) for stage in stages]}
        if others:
            content["others"] = [dataclasses.asdict(stage) for stage in others]
        write_json(self.stages_file, content)

    def update_stage(self, name: str, **changes: Any) -> StageState:
        """Change fields of one stage in stages.json. Raises KeyError for a stage that is not
        there.
        """
        old = next((stage for stage in self.read_stages() if stage.name == name), None)
        if old is None:
            raise KeyError(f"{self.stages_file} has no stage {name!r}")
        state = dataclasses.replace(old, **changes)
        self.replace_stage(state)
        return state

    def replace_stage(self, state: StageState) -> None:
        """Put this in the place of the stage of the same name in stages.json."""
        self.write_stages([state if stage.name == state.name else stage for stage in self.read_stages()])

    def read_departures(self) -> list[Departure]:
        """What departs from the paper; empty where nothing was written."""
        if not self.departures_file.exists():
            return []
        try:
            return [Departure(**item) for item in read_json(self.departures_file)]
        except TypeError as error:
            raise UserError(f"{self.departures_file}: not a list of departures ({error}); {_RESTORE}") from error

    def write_departures(self, departures: Sequence[Departure]) -> None:
        """Replace departures.json."""
        write_json(self.departures_file, [dataclasses.asdict(item) for item in departures])


_RESTORE = "restore the file or start the run anew in another folder"


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: temp file beside it, fsync, rename. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.tmp")
    # "replace": half a surrogate pair, which a user's JSON may hold, is no UTF-8
    with temp.open("w", encoding="utf-8", errors="replace") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temp, path)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises UserError that names the file when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON ({error}); {_RESTORE}") from error
