"""Where prompts and pre-training text come from, and how completions are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.base import Table

R1_ZERO_TEMPLATE = "r1-zero"


def check_template(template: str) -> None:
    """Raise ValueError for a template that is neither a known name nor a text with a place for the question."""
    if template not in (R1_ZERO_TEMPLATE, "plain") and "{prompt}" not in template:
        raise ValueError(
            f"template {template!r} has no {{prompt}} field; write it where the question goes, "
            'or use "r1-zero" or "plain"'
        )


class PromptsConfig(Table):
    """One source of verifiable prompts."""

    table: ClassVar[str] = "prompts"

    source: Literal["jsonl", "parquet", "datasets", "generator", "reasoning_gym"]
    """jsonl, parquet: files; datasets: a Hugging Face `datasets` folder or builder on local files; generator: the
    project's own procedural tasks; reasoning_gym: the library's tasks (extra `tasks`)."""
    path: Path | None = None
    """File or folder (jsonl, parquet, datasets)."""
    task: str | None = None
    """Name of the task (generator: "chain_sum", ...; reasoning_gym: any of its datasets)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Difficulty and other arguments of the task (terms = 6, digits = 1, ...)."""
    size: PositiveInt | None = None
    """Problems the source offers (generator, reasoning_gym); an epoch is one pass over them. Files: at most this
    many."""
    seed: int = 0
    """Seed of procedural problems; problems of different seeds differ."""
    question_key: str = "question"
    """Column of the question (files)."""
    answer_key: str = "answer"
    """Column of the reference answer (files). GSM8K's `#### 42` ending is understood."""
    verifier: str | None = None
    """Verifier of the answers; None: the source's own ("math" for files)."""
    template: str = R1_ZERO_TEMPLATE
    """"r1-zero", "plain", or a text that contains `{prompt}`."""
    shuffle: bool = True
    """Draw prompts in a new order each epoch."""

    @model_validator(mode="after")
    def _source_arguments(self) -> PromptsConfig:
        needs_path = self.source in ("jsonl", "parquet", "datasets")
        if needs_path and self.path is None:
            raise ValueError(f"source {self.source!r} needs `path`")
        if not needs_path and self.task is None:
            raise ValueError(f"source {self.source!r} needs `task`")
        check_template(self.template)
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Setting -> the column that it names and a file must have."""
        return {"question_key": self.question_key, "answer_key": self.answer_key}


class PairsConfig(Table):
    """One source of preference pairs: rows of a prompt and two answers, all texts, of which one is preferred."""

    table: ClassVar[str] = "pairs"

    source: Literal["jsonl", "parquet"]
    """jsonl: a file; parquet: a file or a folder of them."""
    path: Path
    """The file or folder."""
    size: PositiveInt | None = None
    """Use at most this many rows, the first ones."""
    prompt_key: str = "prompt"
    """Column of the prompt."""
    chosen_key: str = "chosen"
    """Column of the preferred answer."""
    rejected_key: str = "rejected"
    """Column of the other answer."""
    template: str = "plain"
    """"r1-zero", "plain", or a text that contains `{prompt}`: what the answers follow. Take the one under which the
    model that is to be scored answers."""
    shuffle: bool = True
    """Draw pairs in a new order each epoch."""

    @model_validator(mode="after")
    def _template(self) -> PairsConfig:
        check_template(self.template)
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Setting -> the column that it names and a file must have."""
        return {"prompt_key": self.prompt_key, "chosen_key": self.chosen_key, "rejected_key": self.rejected_key}


class CorpusConfig(Table):
    """Generated pre-training text: documents that answer a task in a mixture of styles."""

    task: str = "chain_sum"
    """Task whose problems the documents answer."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Difficulty of the task, as in a prompt source."""
    styles: dict[str, float]
    """Weight of each style: "steps", "plain_steps", "check", "direct", "plain": worked in tags,
    worked without tags, worked and re-checked, guessed in tags, guessed without tags."""
    error_rate: float = Field(default=0.02, ge=0, le=1)
    """Chance that a step of a worked solution is wrong."""
    guess_accuracy: float = Field(default=0.5, ge=0, le=1)
    """Chance that a document that only guesses is right."""
    share: PositiveFloat = 1.0
    """Share of the stage's steps spent on this corpus; corpora are visited in order."""
    seed: int = 0
    """Seed of the documents."""


class RewardConfig(Table):
    """`[[stage.reward]]`: one term of the reward; the total is their weighted sum."""

    kind: Literal["accuracy", "format"]
    """accuracy: 1 if the verifier says correct, else 0. format: 1 if the completion is `<think>..</think>
    <answer>..</answer>` and nothing else."""
    weight: float = 1.0
    """Factor of this term. The paper gives both rule rewards the same weight."""
    deadline: PositiveFloat = 1.0
    """accuracy: seconds a verifier may take before its verdict is `unknown`."""
    unknown: float = 0.0
    """accuracy: reward of an `unknown` verdict; it is counted apart from wrong answers whatever this is."""
