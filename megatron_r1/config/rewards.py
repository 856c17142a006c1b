"""How completions are scored: the terms of a reward."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.base import Table
from megatron_r1.config.data import Tags, check_template, within_last
from megatron_r1.config.languages import DEFAULT_LANGUAGE, HAN_PER_WORD, check_language

KEYS_OF_KIND = {
    "accuracy": ("deadline", "unknown"),
    "format": ("tags",),
    "language": ("default_language", "han_per_word"),
    "model": ("name", "init_from", "model", "template", "url", "sees", "transform", "timeout"),
}
"""Kind -> keys that only it has."""


class RewardConfig(Table):
    """`[[stage.reward]]`: one term of the reward; the total is their weighted sum."""

    kind: Literal["accuracy", "format", "language", "model"]
    """accuracy: 1 if the verifier says correct, else 0. format: 1 if the completion is of the form that
    `tags` names, and nothing else. language: share of the words of the chain of thought that are of the target
    language (R1's first RL stage), told by their script; a thought without words counts 1. model: the value of a reward
    model (R1's second RL stage)."""
    weight: float = 1.0
    """Factor of this term. The paper gives both rule rewards the same weight."""
    domains: list[str] = Field(default_factory=list)
    """Domains of the prompts that this term scores; it is 0 for others. Empty: all."""
    last_steps: PositiveInt | None = None
    """Only in the phases that begin in the last so many optimizer steps of the stage, 0 before (the paper's preference
    rewards: 400 of 1,700; with 16 steps a phase that is 388). None: always."""
    deadline: PositiveFloat = 1.0
    """accuracy: seconds a verifier may take before its verdict is `unknown`."""
    unknown: float = 0.0
    """accuracy: reward of an `unknown` verdict; it is counted apart from wrong answers whatever this is."""
    tags: Tags = "think-answer"
    """format: what is well-formed: `<think>..</think><answer>..</answer>`, or with "think" a summary without tags after
    the thought, as in R1's chat format."""
    default_language: str = DEFAULT_LANGUAGE
    """language: target of prompts whose language neither a column nor the words of the question tell. Languages of one
    script are not told apart: with the target "de" an English thought counts as one in German."""
    han_per_word: PositiveFloat = HAN_PER_WORD
    """language: Chinese characters that count as one word (the paper does not say how words are counted)."""
    name: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """model: its name in metrics, e.g. "helpful"."""
    init_from: str | None = Field(default=None, alias="from")
    """model: the reward_model stage, or the checkpoint folder, to score with in this process."""
    model: str | None = None
    """model: name of the `[models.<name>]` table of its weights. None: `[model]`."""
    template: str | None = None
    """model: with a checkpoint folder as `from`: the template that it was trained under ("r1-zero", "plain", or a text
    that contains `{prompt}`). None: "plain". Stages of the recipe bring their own."""
    url: str | None = None
    """model: instead of `from`: the address of a `megatron-r1 serve` process, e.g. "http://node7:8123"."""
    sees: Literal["summary", "response"] | None = None
    """model: what is scored: what follows the thought (the paper's helpful model), or all (its safety model). None: as
    the `preferences` stage of which the model's stage learns; where there is none, all."""
    transform: Literal["none", "sigmoid"] = "none"
    """model: the value as it is, or its sigmoid, in (0, 1)."""
    timeout: PositiveFloat = 300.0
    """model: seconds that a server may take for a batch, retries included, before the run ends."""

    @property
    def label(self) -> str:
        """Its name in a score's parts and in metrics."""
        return self.name or self.kind

    def covers(self, domain: str) -> bool:
        """Whether prompts of this domain are scored."""
        return not self.domains or domain in self.domains

    def active(self, step: int, steps: int) -> bool:
        """Whether it counts in a phase that begins after `step` of `steps` optimizer steps."""
        return within_last(self.last_steps, step, steps)

    @model_validator(mode="after")
    def _keys(self) -> RewardConfig:
        check_language(self.default_language)
        for kind, keys in KEYS_OF_KIND.items():
            for key in keys:
                if kind != self.kind and getattr(self, key) != type(self).model_fields[key].default:
                    shown = type(self).model_fields[key].alias or key
                    raise ValueError(f'{shown} is for kind = "{kind}"; this reward is "{self.kind}"; remove it')
        if self.kind == "model":
            if self.name is None:
                raise ValueError('kind = "model" needs `name`, e.g. name = "helpful"')
            if self.name in KEYS_OF_KIND:
                raise ValueError(f"name = {self.name!r} is the name of another kind; choose another, e.g. helpful")
            if (self.init_from is None) == (self.url is None):
                raise ValueError('kind = "model" needs exactly one of `from` (in this process) and `url` (a server)')
            self._check_source()
        return self

    def _check_source(self) -> None:
        if self.template is not None:
            check_template(self.template)
        if self.url is not None:
            if not self.url.startswith(("http://", "https://")):
                raise ValueError(f'url = {self.url!r} is no address; write e.g. url = "http://node7:8123"')
            given = [key for key in ("model", "template") if getattr(self, key) is not None]
            if given:
                raise ValueError(f"{', '.join(given)} without effect beside `url`: the server knows it; remove it")
        elif self.timeout != type(self).model_fields["timeout"].default:
            raise ValueError(f"timeout = {self.timeout:g} without effect: only a server (`url`) is waited for")
