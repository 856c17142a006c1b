"""The judges and rewriters of a stage, checked before the start and opened in it. No torch."""

from __future__ import annotations

from megatron_r1.config.errors import UserError
from megatron_r1.config.stages import PreferencesStage, SampleStage
from megatron_r1.judges.hook import Hook, open_hook
from megatron_r1.rewards.accuracy import JUDGE

KEPT = "Finished chunks and sampled answers are saved"


def open_judge(stage: SampleStage | PreferencesStage) -> Hook | None:
    """The stage's judge; None without one. Raises UserError as `open_hook`."""
    if stage.judge is None:
        return None
    key = f"stage.{stage.name}.judge"
    if isinstance(stage, SampleStage):
        return open_hook(stage.judge, "correctness", key, KEPT)
    return open_hook(stage.judge, "pair" if stage.form == "pairs" else "label", key, KEPT)


def open_rewriter(stage: SampleStage) -> Hook | None:
    """What rewrites the stage's conversations; None without one. Raises UserError as `open_hook`."""
    if stage.rewrite is None:
        return None
    return open_hook(stage.rewrite, "rewrite", f"stage.{stage.name}.rewrite", KEPT)


def check_hooks(stage: SampleStage | PreferencesStage) -> None:
    """Raise UserError for what would fail later: a function or a key that is not there, nobody to judge what is to be.

    No request is sent.
    """
    open_judge(stage)
    if isinstance(stage, PreferencesStage):
        return
    open_rewriter(stage)
    judged = [i for i, source in enumerate(stage.prompts) if source.verifier == JUDGE]
    if judged and stage.judge is None:
        raise UserError(
            f'stage.{stage.name}.prompts.{judged[0]}.verifier = "judge" without a judge: add a table '
            f"[stage.judge] with `server` or `call`, or name a rule"
        )
    if stage.judge is not None and not judged:
        raise UserError(
            f'stage.{stage.name}.judge has no effect: no prompt source has verifier = "judge"; set it, or remove the '
            "judge"
        )
