"""Which stages run, and why: a changed setting re-runs exactly what depends on it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.load import dump, load
from megatron_r1.config.run import RunConfig
from megatron_r1.observe.rundir import RunDir
from megatron_r1.pipeline.decide import Choice, decide, fresh, inputs_of, selected, set_aside, settings_of
from megatron_r1.pipeline.digests import digest_of, digest_of_path, measure, missing, output_files

RECIPE = """
name = "demo"
seed = 3
model.preset = "tiny-moe"
tokenizer.kind = "char"

[[stage]]
kind = "pretrain"
name = "base"
steps = 2
optimizer = { lr = 1e-3, schedule = "cosine" }
corpus = [{ styles = { steps = 1 } }]

[[stage]]
kind = "grpo"
name = "zero"
steps = 4
optimizer.lr = 3e-6
prompts = { source = "generator", task = "chain_sum" }
sampling = { max_new_tokens = 16 }
reward = [{ kind = "accuracy" }]

[[stage]]
kind = "sample"
name = "cold"
prompts = { source = "generator", task = "chain_sum" }

[[stage]]
kind = "sft"
name = "dev1"
from = "base"
epochs = 1
format = "r1"
data = { stage = "cold" }

[[stage]]
kind = "sft"
name = "own"
from = "base"
steps = 3
format = "r1"
data = { path = "mine.jsonl" }
"""


ALL = Choice()


class Run:
    """A run directory in which every stage is done."""

    def __init__(self, folder: Path) -> None:
        (folder / "mine.jsonl").write_text('{"prompt": "1+1=?", "response": "2"}\n')
        self.file = folder / "recipe.toml"
        self.file.write_text(RECIPE, encoding="utf-8")
        self.dir = RunDir(folder / "run")
        config = self.config()
        self.dir.write_stages([fresh(stage) for stage in config.stage])
        for index in range(len(config.stage)):
            self.finish(config, index, content=f"weights of {index}")

    def config(self, *overrides: str) -> RunConfig:
        return load(self.file, list(overrides))

    def finish(self, config: RunConfig, index: int, content: str) -> None:
        """What a stage leaves behind, written as `pipeline/worker.py` writes it."""
        stage = config.stage[index]
        folder = self.dir.stage(stage.name)
        file = folder.data if stage.kind == "sample" else folder.checkpoints / "step-00000004" / "0.distcp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        states = {state.name: state for state in self.dir.read_stages()}
        outputs = measure(output_files(stage, folder), folder.path)
        assert outputs, "nothing was found to be its output"
        inputs = inputs_of(config, index, states, self.dir)
        state = dataclasses.replace(
            fresh(stage), state="done", settings=settings_of(stage, config), inputs=inputs, outputs=outputs
        )
        self.dir.replace_stage(state)

    def actions(self, *overrides: str, choice: Choice = ALL) -> dict[str, str]:
        return {found.name: found.action for found in decide(self.config(*overrides), self.dir, choice)}

    def why(self, name: str, *overrides: str) -> str:
        return next(found.why for found in decide(self.config(*overrides), self.dir, Choice()) if found.name == name)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


KEEP = {"base": "keep", "zero": "keep", "cold": "keep", "dev1": "keep", "own": "keep"}


def test_a_finished_run_keeps_everything(run: Run) -> None:
    assert run.actions() == KEEP


@pytest.mark.parametrize(
    ("override", "again", "depends"),
    [
        ("stage.zero.grpo.prompts=32", ["zero"], ["cold", "dev1"]),
        ("stage.cold.n=8", ["cold"], ["dev1"]),
        ("stage.own.optimizer.lr=1e-4", ["own"], []),
        ("stage.base.steps=3", ["base"], ["zero", "cold", "dev1", "own"]),  # its cosine knows how many there are
        ("model.override={hidden_size=64}", list(KEEP), []),
        ("seed=4", list(KEEP), []),
    ],
)
def test_a_changed_setting_runs_what_depends_on_it_again(
    run: Run, override: str, again: list[str], depends: list[str]
) -> None:
    expected = KEEP | dict.fromkeys(depends, "depends") | dict.fromkeys(again, "again")
    assert run.actions(override) == expected


@pytest.mark.parametrize(
    "override",
    [
        "stage.zero.micro_batch_tokens=4096",
        "stage.zero.checkpoint.every=7",
        "stage.zero.sampling.batch_size=8",
        "stage.cold.chunk=16",
        "stage.dev1.packing=false",
        "parallel.data=2",
        'model.recompute="full"',
        "threads=2",
    ],
)
def test_what_changes_no_result_runs_nothing(run: Run, override: str) -> None:
    assert run.actions(override) == KEEP


def test_the_reason_names_key_and_values(run: Run) -> None:
    assert run.why("cold", "stage.cold.n=8") == "n: was left out, now 8"
    assert run.why("zero", "stage.zero.steps=3") == "steps: was 4, now 3"


def test_more_steps_of_a_constant_schedule_go_on(run: Run) -> None:
    assert run.actions("stage.zero.steps=9")["zero"] == "resume"


def test_a_changed_file_runs_its_stage_again(run: Run) -> None:
    (run.file.parent / "mine.jsonl").write_text('{"prompt": "1+1=?", "response": "3"}\n')
    assert run.actions() == KEEP | {"own": "again"}
    assert run.why("own") == "what it reads has changed: data.path"


def test_a_lost_output_is_made_again_where_somebody_needs_it(run: Run) -> None:
    run.dir.stage("cold").data.write_text("cut")
    assert run.actions() == KEEP  # what was made of it is done
    lr = "stage.dev1.optimizer.lr=1e-3"
    assert run.actions(lr) == KEEP | {"cold": "again", "dev1": "again"}
    assert "data.jsonl" in run.why("cold", lr)


def test_unknown_leftovers_are_not_taken_for_results(run: Run) -> None:
    run.dir.stages_file.unlink()
    assert set(run.actions().values()) == {"again"}
    assert run.why("cold") == "nothing is known of how what lies in its folder was made"


def test_a_stage_that_comes_back_is_remembered(run: Run) -> None:
    states = run.dir.read_stages()
    run.dir.write_stages([state for state in states if state.name != "own"])  # as a run without it does
    assert [state.name for state in run.dir.read_stages()] == ["base", "zero", "cold", "dev1"]
    assert run.actions() == KEEP
    assert run.actions("stage.own.optimizer.lr=1e-4") == KEEP | {"own": "again"}


def test_an_input_that_is_gone_counts(run: Run) -> None:
    run.dir.update_stage("own", inputs=run.dir.known_states()["own"].inputs | {"benchmark.old": "0"})
    assert run.why("own") == "what it reads has changed: benchmark.old"


def test_weights_from_outside_are_told_apart_by_their_bytes(run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside" / "step-00000004"
    outside.mkdir(parents=True)
    (outside / "manifest.json").write_text("{}")
    (outside / "0.distcp").write_text("aaaa")
    override = f'stage.own.from="{outside}"'
    run.finish(run.config(override), 4, content="tuned")
    assert run.actions(override) == KEEP
    (outside / "0.distcp").write_text("bbbb")
    assert run.actions(override) == KEEP | {"own": "again"}


def test_where_files_lie_is_no_setting(run: Run) -> None:
    (run.file.parent / "elsewhere.jsonl").write_bytes((run.file.parent / "mine.jsonl").read_bytes())
    assert run.actions(f'stage.own.data.path="{run.file.parent / "elsewhere.jsonl"}"') == KEEP
    assert run.actions('stage.zero.from="base"') == KEEP  # what it is without `from`


def test_the_same_bytes_again_leave_what_depends_on_them_alone(run: Run) -> None:
    config = run.config("stage.zero.grpo.prompts=32")
    run.finish(config, 1, content="weights of 1")
    assert run.actions("stage.zero.grpo.prompts=32") == KEEP
    run.finish(config, 1, content="other weights")
    assert run.actions("stage.zero.grpo.prompts=32") == KEEP | {"cold": "again", "dev1": "depends"}


def test_force_until_and_only(run: Run) -> None:
    assert run.actions(choice=Choice(force=frozenset(["cold"]))) == KEEP | {"cold": "again", "dev1": "depends"}
    config = run.config()
    assert selected(config, Choice(until="cold")) == [0, 1, 2]
    assert selected(config, Choice(only=frozenset(["own", "base"]))) == [0, 4]
    with pytest.raises(UserError, match="--until nix: there is no such stage; stages are base, zero"):
        selected(config, Choice(until="nix"))


def begun(run: Run, name: str) -> None:
    run.dir.update_stage(name, state="running", outputs={})


def test_an_unfinished_stage_goes_on_under_other_training_settings_only(run: Run) -> None:
    begun(run, "dev1")
    assert run.actions()["dev1"] == "resume"
    assert run.actions("stage.dev1.optimizer.lr=1e-3")["dev1"] == "resume"
    assert run.why("dev1", "stage.dev1.optimizer.lr=1e-3").startswith("optimizer.lr: was left out, now 0.001")
    assert run.actions('stage.dev1.template="plain"')["dev1"] == "again"
    assert run.actions("stage.dev1.batch=4")["dev1"] == "again"
    assert run.actions("stage.dev1.data.stage=cold", "seed=4")["dev1"] == "again"
    begun(run, "cold")
    assert run.actions("stage.cold.n=8")["cold"] == "again"  # finished chunks have the old number of samples
    assert run.actions()["cold"] == "resume"


def test_fewer_steps_than_were_taken_begin_anew(run: Run) -> None:
    run.dir.update_stage("zero", state="running", outputs={}, steps_done=3)
    assert run.actions("stage.zero.steps=9")["zero"] == "resume"
    assert run.actions("stage.zero.steps=2")["zero"] == "again"


def test_a_forced_stage_that_was_killed_goes_on(run: Run) -> None:
    choice = Choice(force=frozenset(["cold"]))
    run.dir.update_stage("cold", state="running", outputs={}, why="asked for with --force")
    assert run.actions(choice=choice)["cold"] == "resume"
    with pytest.raises(UserError, match="--force cold: --only or --until leaves that stage out"):
        run.actions(choice=Choice(only=frozenset(["own"]), force=frozenset(["cold"])))


def test_what_is_replaced_is_kept_aside(run: Run) -> None:
    for content in ("first", "second"):
        run.dir.stage("cold").data.parent.mkdir(exist_ok=True)
        run.dir.stage("cold").data.write_text(content)
        set_aside(run.dir, "cold")
    kept = [(run.dir.superseded / f"cold-{n}" / "data.jsonl").read_text() for n in (1, 2)]
    assert kept == ["first", "second"] and not run.dir.stage("cold").path.exists()


def test_the_recorded_settings_survive_the_resolved_recipe(run: Run) -> None:
    """Ranks load resolved.toml, in which every default is spelled out."""
    config = run.config()
    run.file.write_text(dump(config), encoding="utf-8")
    assert run.actions() == KEEP


def test_a_digest_sees_every_byte_and_no_folder(run: Run, tmp_path: Path) -> None:
    states = {state.name: state for state in run.dir.read_stages()}
    before = digest_of(states["cold"])
    run.finish(run.config(), 2, content="weights of 3")
    after = {state.name: state for state in run.dir.read_stages()}
    assert digest_of(after["cold"]) != before
    assert missing(after["cold"].outputs, run.dir.stage("cold").path) == []


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _change_the_end(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", [_grow, _change_the_end])
def test_a_large_file_is_known_by_size_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    monkeypatch.setattr("megatron_r1.pipeline.digests.WHOLE", 1 << 20)
    file = tmp_path / "large"
    file.write_bytes(bytes(3 << 20))
    before = digest_of_path(file)
    assert digest_of_path(file) == before
    change(file)
    assert digest_of_path(file) != before
    assert digest_of_path(tmp_path / "nix") == "missing"


def test_states_are_json(run: Run) -> None:
    stages = json.loads(run.dir.stages_file.read_text())["stages"]
    assert stages[2]["settings"]["kind"] == "sample" and stages[3]["inputs"].keys() == {"from", "data.stage"}
