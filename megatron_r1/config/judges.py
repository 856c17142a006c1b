"""Models and functions that judge or rewrite text: an OpenAI-compatible server, or a callable of the user's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.base import Table


class EndpointConfig(Table):
    """An OpenAI-compatible server (SGLang, vLLM, or any API): POST <url>/chat/completions."""

    url: str
    """Its base address, e.g. "http://node7:30000/v1"."""
    model: str
    """The model's name there."""
    api_key: str | None = None
    """Name of the environment variable that holds the key; never the key itself."""
    timeout: PositiveFloat = 120.0
    """Seconds that one request may take."""
    retries: NonNegativeInt = 4
    """Further attempts of a request that failed or was refused for load, after 1, 2, 4, ... seconds."""
    down: Literal["wait", "stop"] = "stop"
    """When the retries are used up: wait asks again every `wait_seconds` until the server is back, stop saves what is
    done and ends the run; the same command goes on."""
    wait_seconds: PositiveFloat = 30.0
    """down = "wait": between two attempts."""
    concurrency: PositiveInt = 16
    """Requests under way at a time."""
    temperature: NonNegativeFloat = 0.0
    """Of its sampling."""
    max_tokens: PositiveInt = 4096
    """Longest answer."""


class _Hook(Table):
    """What judges and rewriters share."""

    server: EndpointConfig | None = None
    """Ask this server."""
    call: str | None = None
    """Or call this function: "package.module:function" or "path/to/file.py:function"; a relative path is seen from the
    recipe."""

    @model_validator(mode="after")
    def _one(self) -> _Hook:
        if (self.server is None) == (self.call is None):
            raise ValueError("give exactly one of `server` and `call`")
        if self.call is not None and not self.call.rpartition(":")[0]:
            raise ValueError(f'call = {self.call!r}; write "package.module:function" or "path/to/file.py:function"')
        return self


class JudgeConfig(_Hook):
    """Who judges answers: docs/data-stages.md gives the arguments and results of the function, and the prompts that a
    server is asked with."""

    prompt: str | None = Field(default=None)
    """server: text to ask with instead of the built-in one; its fields are written {question}, {reference}, {answer}
    (correctness), {question}, {answer_a}, {answer_b} (pairs), {question}, {answer} (labels)."""


class RewriteConfig(_Hook):
    """Who rewrites thoughts and summaries."""

    prompt: str | None = Field(default=None)
    """server: text to ask with instead of the built-in one; fields {question}, {thought}, {summary}, {language}."""
