"""Where prompts, conversations, preference pairs, labelled answers and pre-training text come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.base import Table

R1_ZERO_TEMPLATE = "r1-zero"
NEED_REFERENCE = (None, "integer", "exact", "math", "choice", "judge")
"""Verifiers of files that compare with a reference answer; others accept everything, or know what is right."""
Tags = Literal["think-answer", "think"]
"""What a well-formed answer is: `<think>..</think><answer>..</answer>` as R1-Zero's template asks for, or
`<think>..</think>` and a summary, as in R1's chat format."""


def check_template(template: str) -> None:
    """Raise ValueError for a template that is neither a known name nor a text with a place for the question."""
    if template not in (R1_ZERO_TEMPLATE, "plain", "deepseek") and "{prompt}" not in template:
        raise ValueError(
            f"template {template!r} has no {{prompt}} field; write it where the question goes, "
            'or use "r1-zero", "deepseek" or "plain"'
        )


def within_last(last_steps: int | None, step: int, steps: int) -> bool:
    """Whether a phase that begins after `step` of `steps` optimizer steps is within the last so many; None: always."""
    return last_steps is None or step >= steps - last_steps


def check_one_origin(table: RewardRowsConfig | ConversationsConfig) -> None:
    """Raise ValueError unless the rows come from either a path or a stage."""
    if (table.path is None) == (table.stage is None):
        raise ValueError("give exactly one of `path` and `stage`")
    if table.stage is not None and table.source != "jsonl":
        raise ValueError(f'source = "{table.source}" with stage = "{table.stage}": stages write jsonl; remove `source`')


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
    language_key: str | None = None
    """Column of the language that the thought is to keep to (files): "en", "zh", "zh-CN", ...; empty cells, and None:
    found from the question."""
    verifier: str | None = None
    """Verifier of the answers; None: the source's own ("math" for files)."""
    template: str = R1_ZERO_TEMPLATE
    """"r1-zero", "deepseek" (its chat format), "plain", or a text that contains `{prompt}`."""
    shuffle: bool = True
    """Draw prompts in a new order each epoch."""
    max_bad_rows: NonNegativeInt = 0
    """Files: rows that may be malformed or without the answer that their verifier needs: each is reported with its file
    and line (parquet, datasets: its row), left out and counted; one more ends the run. 0: the first is an error. In a
    stream (options.streaming) the first always is."""
    domain: str = Field(default="reasoning", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """What kind of prompts these are, e.g. "reasoning", "helpful", "harmless": rewards name the domains that they
    score, dataset cards and metrics count by it."""
    weight: PositiveFloat = 1.0
    """With several sources: this one's share of the questions, against the others that take part. Over many phases each
    gets its share to within one question, counted from where it begins to take part."""
    last_steps: PositiveInt | None = None
    """grpo only: takes part in the phases that begin in the last so many optimizer steps of the stage (the paper's
    second RL stage: general prompts in the last 400 of 1,700; with 16 steps a phase that is 388, from the phase of step
    1,312 on). None: always."""

    @model_validator(mode="after")
    def _source_arguments(self) -> PromptsConfig:
        needs_path = self.source in ("jsonl", "parquet", "datasets")
        if needs_path and self.path is None:
            raise ValueError(f"source {self.source!r} needs `path`")
        if not needs_path and self.task is None:
            raise ValueError(f"source {self.source!r} needs `task`")
        if self.max_bad_rows and (not needs_path or self.options.get("streaming", False)):
            raise ValueError(
                f"max_bad_rows = {self.max_bad_rows} without effect: problems that are made, and streams, are read one "
                "by one, and the first bad one is an error; remove it"
            )
        if not needs_path and self.language_key is not None:
            raise ValueError(
                f"language_key = {self.language_key!r} names a column, and source {self.source!r} has none; remove it "
                "(generator: options.languages sets the languages of its prompts)"
            )
        check_template(self.template)
        return self

    def active(self, step: int, steps: int) -> bool:
        """Whether it takes part in a phase that begins after `step` of `steps` optimizer steps."""
        return within_last(self.last_steps, step, steps)

    @property
    def columns(self) -> dict[str, str]:
        """Setting -> the column that it names and a file must have."""
        columns = {"question_key": self.question_key, "answer_key": self.answer_key}
        return columns if self.language_key is None else columns | {"language_key": self.language_key}


class RewardRowsConfig(Table):
    """What the two sources of reward models have in common."""

    source: Literal["jsonl", "parquet"] = "jsonl"
    """jsonl: a file; parquet: a file or a folder of them."""
    path: Path | None = None
    """The file or folder."""
    stage: str | None = None
    """Instead of `path`: the stage of this recipe whose data.jsonl to read (kind "preferences", of the same form)."""
    size: PositiveInt | None = None
    """Use at most this many rows, the first ones."""
    prompt_key: str = "prompt"
    """Column of the prompt."""
    template: str = "plain"
    """"r1-zero", "deepseek", "plain", or a text that contains `{prompt}`: what the answers follow. Take the one under
    which the model that is to be scored answers."""
    shuffle: bool = True
    """Draw rows in a new order each epoch."""
    max_bad_rows: NonNegativeInt = 0
    """Rows that may be malformed: each is reported with its file and line (parquet: its row), left out and counted; one
    more ends the run. 0: the first is an error."""

    @model_validator(mode="after")
    def _template(self) -> RewardRowsConfig:
        check_template(self.template)
        check_one_origin(self)
        return self


class PairsConfig(RewardRowsConfig):
    """One source of preference pairs: rows of a prompt and two answers, all texts, of which one is preferred."""

    table: ClassVar[str] = "pairs"

    chosen_key: str = "chosen"
    """Column of the preferred answer."""
    rejected_key: str = "rejected"
    """Column of the other answer."""

    @property
    def columns(self) -> dict[str, str]:
        """Setting -> the column that it names and a file must have."""
        return {"prompt_key": self.prompt_key, "chosen_key": self.chosen_key, "rejected_key": self.rejected_key}


class LabelsConfig(RewardRowsConfig):
    """One source of labelled answers: rows of a prompt, an answer and whether it is good (safe) or not."""

    table: ClassVar[str] = "labels"

    response_key: str = "response"
    """Column of the answer."""
    label_key: str = "label"
    """Column of the label: 1 or true for a good answer, 0 or false for a bad one."""

    @property
    def columns(self) -> dict[str, str]:
        """Setting -> the column that it names and a file must have."""
        return {"prompt_key": self.prompt_key, "response_key": self.response_key, "label_key": self.label_key}


class ConversationsConfig(Table):
    """One source of conversations to imitate: rows of messages, or of a prompt and its response.

    A row with the column `messages_key` holds a list of {role, content}: one system message at most, first, then user
    and assistant in turn, the assistant last. An assistant's message may give its thought apart, under
    `reasoning_key`. Any other row holds two texts, `prompt_key` and `response_key`, and may give a thought likewise.
    """

    table: ClassVar[str] = "data"

    source: Literal["jsonl", "parquet", "datasets"] = "jsonl"
    """jsonl: a file; parquet: a file or a folder of them; datasets: a Hugging Face `datasets` folder or local files."""
    path: Path | None = None
    """The file or folder."""
    stage: str | None = None
    """Instead of `path`: the stage of this recipe whose data.jsonl to read (kinds "sample" and "mix")."""
    options: dict[str, Any] = Field(default_factory=dict)
    """datasets only: {split = "train"}, where a saved dataset has several."""
    size: PositiveInt | None = None
    """Use at most this many rows, the first well-formed ones."""
    messages_key: str = "messages"
    """Column of the messages."""
    prompt_key: str = "prompt"
    """Column of the prompt, in rows without messages."""
    response_key: str = "response"
    """Column of the response, in rows without messages."""
    reasoning_key: str = "reasoning_content"
    """Key of an assistant's message, or column beside a response, that holds the thought before the answer. It need not
    be there: a thought may also stand in the answer's own text, in <think> tags."""
    shuffle: bool = True
    """Draw conversations in a new order each epoch."""
    max_bad_rows: NonNegativeInt = 0
    """Rows that may be malformed, or that the chat format or tokenizer cannot write: each is reported with its file and
    line, left out and counted; one more ends the run. 0: the first is an error."""

    @model_validator(mode="after")
    def _options(self) -> ConversationsConfig:
        check_one_origin(self)
        unknown = sorted(set(self.options) - ({"split"} if self.source == "datasets" else set()))
        if unknown:
            allowed = "split" if self.source == "datasets" else "none"
            raise ValueError(f"source {self.source!r} has no option {', '.join(unknown)}; allowed are: {allowed}")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Setting -> the column that it names and a file without messages must have."""
        return {"prompt_key": self.prompt_key, "response_key": self.response_key}


class MixSource(ConversationsConfig):
    """`[[stage.sources]]`: one source of a mix."""

    table: ClassVar[str] = "sources"

    weight: PositiveFloat = 1.0
    """Its share of the stage's `size`."""
    cap: PositiveInt | None = None
    """Most rows of it."""
    domain: str = Field(default="general", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """What its rows are counted as in the dataset card, where a row has no column "domain" of its own."""


FileConfig = PromptsConfig | PairsConfig | LabelsConfig | ConversationsConfig
"""Tables that may name a file of rows."""


class CorpusConfig(Table):
    """Generated pre-training text: documents that answer a task in a mixture of styles."""

    task: str = "chain_sum"
    """Task whose problems the documents answer."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Difficulty of the task, as in a prompt source. With languages = { en = 0.5, zh = 0.5 } each document is in one
    language, and its working in words of it."""
    mixed: float = Field(default=0.0, ge=0, le=1)
    """With options.languages: share of the documents with working whose words change to another language midway."""
    styles: dict[str, float]
    """Weight of each style: "steps", "plain_steps", "check", "direct", "plain": worked in tags,
    worked without tags, worked and re-checked, guessed in tags, guessed without tags."""
    error_rate: float = Field(default=0.02, ge=0, le=1)
    """Chance that a step of a worked solution is wrong."""
    guess_accuracy: float = Field(default=0.5, ge=0, le=1)
    """Chance that a document that only guesses is right."""
    share: PositiveFloat = 1.0
    """Share of the stage's steps spent on this corpus, as corpora are visited in order; with `interleave`, share of the
    documents."""
    seed: int = 0
    """Seed of the documents."""
