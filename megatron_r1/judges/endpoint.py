"""A client of an OpenAI-compatible server: many chat completions at a time, retried, and patient where asked to be.

Below the judges of this room. One event loop serves a call of `Endpoint.ask`; nothing runs between two calls.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2 as httpx

from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.config.judges import EndpointConfig

logger = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it would log a line a request

Chat = list[dict[str, str]]
"""Messages {role, content}."""

BUSY = (408, 409, 425, 429)
"""Statuses below 500 that pass by themselves."""
CURES = {
    400: "the server does not accept the request: look at `model` and `max_tokens`, and at its limit of tokens",
    401: "the server wants a key: set `api_key` to the name of the environment variable that holds it",
    403: "the server refuses the key: look at the environment variable that `api_key` names",
    404: "there is no such address or model there: look at `url` (it usually ends in /v1) and `model`",
}
MOST_PATIENT = 600.0
"""Longest wait that a server may ask for with Retry-After, in seconds."""
_SAY_EVERY = 60.0  # seconds between two lines about a server that is waited for
_SHOWN = 300  # characters of a server's own words in a message


class JudgeDown(RunFailed):
    """The server cannot be reached, and `down = "stop"`. What was finished is saved; the same command goes on."""


class _Unreachable(Exception):
    """An attempt failed in a way that passes by itself; `wait`: seconds that the server asked for, or 0."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """One server.

    Args:
        config: its address and how it is asked.
        key: the table in the recipe, e.g. "stage.cold.judge.server", for messages.
        kept: what is safe when the run has to end, e.g. "finished chunks are in runs/a/cold/chunks".
        sleep, clock: replaced in tests.

    Raises UserError when the environment variable of the key is not set.
    """

    def __init__(
        self,
        config: EndpointConfig,
        key: str,
        kept: str,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config, self.key, self.kept = config, key, kept
        self.url = config.url.rstrip("/") + "/chat/completions"
        self._sleep, self._clock = sleep, clock
        self._secret = _secret(config, key)
        self._down_since: float | None = None  # first failure after the last answer
        self._said: float | None = None  # when the wait was last logged; None: nobody waits

    def ask(self, chats: Sequence[Chat]) -> list[str]:
        """The server's reply to each chat, in their order; at most `concurrency` requests are under way at a time.

        Raises UserError when the server refuses a request for what it is, JudgeDown when it cannot be reached and
        `down = "stop"`.
        """
        return asyncio.run(self._ask_all(chats)) if chats else []

    async def _ask_all(self, chats: Sequence[Chat]) -> list[str]:
        gate = asyncio.Semaphore(self.config.concurrency)
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        async with httpx.AsyncClient(headers=headers, timeout=self.config.timeout) as client:

            async def one(chat: Chat) -> str:
                async with gate:
                    return await self._patiently(client, chat)

            tasks = [asyncio.ensure_future(one(chat)) for chat in chats]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _patiently(self, client: httpx.AsyncClient, chat: Chat) -> str:
        """One reply, after as many attempts as the configuration allows."""
        attempt = 0
        while True:
            try:
                reply = await self._once(client, chat)
            except _Unreachable as error:
                attempt += 1
                self._down_since = since = self._clock() if self._down_since is None else self._down_since
                if attempt <= self.config.retries:
                    await self._sleep(max(2.0 ** (attempt - 1), error.wait))
                    continue
                if self.config.down == "stop":
                    raise JudgeDown(self._down(error, attempt, since)) from error
                self._say(error, since)
                await self._sleep(max(self.config.wait_seconds, error.wait))
            else:
                self._answered()
                return reply

    def _down(self, error: _Unreachable, attempts: int, since: float) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
        return (
            f"{self.key}: {self.config.url} (model {self.config.model}) is down since {when}; {attempts} attempts "
            f"failed, the last one with: {error}. {self.kept}; once the server is back, the same command goes on from "
            'there. (down = "wait" would wait for it)'
        )

    def _say(self, error: _Unreachable, since: float) -> None:
        now = self._clock()
        if self._said is None or now - self._said >= _SAY_EVERY:
            self._said = now
            logger.warning(
                "%s: waiting for %s, down for %.0f s (%s); asked again every %g s",
                *(self.key, self.config.url, now - since, error, self.config.wait_seconds),
            )

    def _answered(self) -> None:
        if self._said is not None and self._down_since is not None:
            seconds = self._clock() - self._down_since
            logger.warning("%s: %s answers again, after %.0f s", self.key, self.config.url, seconds)
        self._down_since = self._said = None

    async def _once(self, client: httpx.AsyncClient, chat: Chat) -> str:
        body = {
            "model": self.config.model,
            "messages": chat,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        try:
            response = await client.post(self.url, json=body)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UserError(f"{self.key}.url = {self.config.url!r}: {error}; write http://host:port/v1") from error
        except httpx.TransportError as error:
            raise _Unreachable(f"{type(error).__name__} {self._shown(str(error))}".strip()) from error
        if response.status_code in BUSY or response.status_code >= 500:
            said = self._shown(response.text)
            raise _Unreachable(f"status {response.status_code} {said}".strip(), _retry_after(response))
        if response.status_code != httpx.codes.OK:
            cure = CURES.get(response.status_code, "the server refuses the request: look at `url` and `model`")
            raise UserError(
                f"{self.key}: POST {self.url} (model {self.config.model!r}) gives status {response.status_code}; "
                f"{cure}. It says: {self._shown(response.text) or 'nothing'}"
            )
        return self._content(response)

    def _content(self, response: httpx.Response) -> str:
        try:
            content: Any = response.json()["choices"][0]["message"]["content"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError) as error:
            raise _Unreachable(f"no chat completion, but {self._shown(response.text) or 'nothing'}") from error
        return content if isinstance(content, str) else ""

    def _shown(self, text: str) -> str:
        """Some of a server's words, on one line and without the key."""
        line = " ".join(text.split())
        return (line.replace(self._secret, "***") if self._secret else line)[:_SHOWN]


def _secret(config: EndpointConfig, key: str) -> str | None:
    if config.api_key is None:
        return None
    if not (secret := os.environ.get(config.api_key, "").strip()):
        raise UserError(
            f"{key}.api_key = {config.api_key!r}: there is no such environment variable, or it is empty; export it, "
            "or remove api_key where the server wants none"
        )
    return secret


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait: a number, or a date; 0 where it says nothing that can be read."""
    given = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), MOST_PATIENT) if seconds == seconds else 0.0
