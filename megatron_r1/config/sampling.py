"""What sampled data must look like to be kept, and what an evaluation forbids."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.base import Table
from megatron_r1.config.data import Tags
from megatron_r1.config.languages import DEFAULT_LANGUAGE, HAN_PER_WORD, check_language


class FilterConfig(Table):
    """`[stage.filter]`: which correct answers are readable (DeepSeek-R1 v2, appendices B.3.2 and B.3.3: no mixed
    languages, no long paragraphs, no code blocks, no repetition; the paper gives no numbers)."""

    format: bool = True
    """Only answers of the form that `tags` names."""
    tags: Tags = "think-answer"
    """`<think>..</think><answer>..</answer>`, or with "think" a summary without tags after the thought."""
    language: float = Field(default=0.95, ge=0, le=1)
    """Least share of the thought's words in the question's language; 0: not looked at."""
    default_language: str = DEFAULT_LANGUAGE
    """Language of questions that neither a column nor their words tell."""
    han_per_word: PositiveFloat = HAN_PER_WORD
    """Chinese characters that count as one word."""
    paragraph: PositiveInt | None = 2000
    """Longest paragraph of a thought, in characters."""
    code_blocks: bool = False
    """Whether a thought may hold fenced code."""
    repeats: PositiveInt | None = 4
    """Most times in a row that a thought may repeat a passage of `repeat_words` words or more."""
    repeat_words: PositiveInt = 8
    """Length of such a passage."""
    thought: NonNegativeInt = 1
    """Least characters of a thought: an answer without one teaches no reasoning."""

    @model_validator(mode="after")
    def _language(self) -> FilterConfig:
        check_language(self.default_language)
        return self


class DecontaminateConfig(Table):
    """`[stage.decontaminate]`: rows that share words with an evaluation are left out and counted (the paper, D.1: a
    10-gram filter)."""

    n: PositiveInt = 10
    """Words in a row that a row may not share with an evaluation's question, or with a reference answer or solution of
    that many words. A run of letters, a number and a Chinese character are each a word; signs and names of LaTeX
    commands are passed over. A question of fewer words counts as a whole, signs included."""
    evaluations: bool = True
    """Against every benchmark and eval stage of this recipe."""
    files: list[Path] = Field(default_factory=list)
    """Against these jsonl files too."""
    key: str = "question"
    """Column of the question in `files`."""
    answer_key: str = "answer"
    """Column of the reference answer or solution in `files`, where they have it."""
