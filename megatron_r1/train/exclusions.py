"""Which questions a checkpoint was never trained on, and the check of an evaluation against it.

Every training stage keeps `excluded.json` in its folder: the hashes of the questions it left out from its first step
on, and the checkpoint it started from; an export stage keeps only the latter. An evaluation follows these files back
to the first weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from megatron_r1.config.errors import UserError
from megatron_r1.data.heldout import heldout_ids
from megatron_r1.observe.rundir import read_json, write_json
from megatron_r1.types import Prompt

logger = logging.getLogger(__name__)

FILE = "excluded.json"


def record_exclusions(stage: Path, excluded: frozenset[str], start: Path | None, *, resumed: bool) -> None:
    """Write what the stage leaves out; a resumed stage can only vouch for what it left out before as well."""
    file = stage / FILE
    if resumed and file.exists():
        known = read_json(file)
        write_json(file, {**known, "questions": sorted(excluded & set(known["questions"]))})
        return
    write_json(file, {"questions": sorted(excluded), "from": None if start is None else str(start)})


def record_export(stage: Path, start: Path) -> None:
    """Write where the weights of an export stage, which trains on nothing, come from."""
    write_json(stage / FILE, {"questions": None, "from": str(start)})


def check_never_trained_on(prompts: Iterable[Prompt], checkpoint: Path | None) -> None:
    """Raise UserError when a stage behind `checkpoint` may have trained on one of these prompts."""
    questions = heldout_ids(prompts)
    while checkpoint is not None:
        # <stage>/checkpoints/step-N, or <stage>/hf
        stage = checkpoint.parent if (checkpoint.parent / FILE).exists() else checkpoint.parent.parent
        if not (stage / FILE).exists():
            logger.warning("%s has no %s: whether it was trained on the evaluation's problems is unknown", stage, FILE)
            return
        known = read_json(stage / FILE)
        seen = 0 if known["questions"] is None else len(questions - set(known["questions"]))
        if seen:
            raise UserError(
                f"{seen} of {len(questions)} evaluation problems were not held out when {stage} was trained, so the "
                "result could be memory. Evaluate on other problems (another seed or file), or train that stage again "
                "with this evaluation in its recipe"
            )
        checkpoint = None if known["from"] is None else Path(known["from"])
