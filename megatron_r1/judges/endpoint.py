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
ABOUT_THE_ITEM = (400, 413, 422)
"""Statuses with which a server that answers others refuses one request, e.g. as too long for its context."""
PROBES = 8
"""Requests, one after the other, that a server may refuse so before it has answered any."""
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


class Refused(UserError):
    """The server refuses every request so far; `number`: of the first one, from 0."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class _NotThis(Exception):
    """The server refuses this request; the message says how."""


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
        self._has_answered = False  # so that what it refuses is not the recipe's mistake
        self._down_since: float | None = None  # first failure after the last answer
        self._said: float | None = None  # when the wait was last logged; None: nobody waits

    def ask(self, chats: Sequence[Chat]) -> list[str | None]:
        """The server's reply to each chat, in their order; at most `concurrency` requests are under way at a time.

        None: refused for what it is (ABOUT_THE_ITEM), e.g. too long, by a server that answers others.

        Raises Refused when it has not answered any yet and refuses the first PROBES, UserError when it refuses for
        another reason, JudgeDown when it cannot be reached and `down = "stop"`.
        """
        if not chats:
            return []
        replies, problems = asyncio.run(self._ask_all(chats))
        if problems:
            logger.warning(
                "%s: %d of %d requests refused, which count as unreadable; the first: %s",
                *(self.key, len(problems), len(chats), problems[0]),
            )
        return replies

    async def _ask_all(self, chats: Sequence[Chat]) -> tuple[list[str | None], list[str]]:
        """The replies, and how those that were refused were."""
        gate = asyncio.Semaphore(self.config.concurrency)
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        # The library's own limit is lower than some concurrencies: requests would wait for a connection and time out.
        limits = httpx.Limits(max_connections=self.config.concurrency)
        problems: list[str] = []
        async with httpx.AsyncClient(headers=headers, timeout=self.config.timeout, limits=limits) as client:

            async def one(chat: Chat) -> str | None:
                async with gate:
                    try:
                        return await self._patiently(client, chat)
                    except _NotThis as error:
                        problems.append(str(error))
                        return None

            first: list[str | None] = []
            while not self._has_answered and len(first) < len(chats):
                first.append(await one(chats[len(first)]))
                if not self._has_answered and len(first) in (PROBES, len(chats)):
                    raise Refused(problems[0], 0)
            tasks = [asyncio.ensure_future(one(chat)) for chat in chats[len(first) :]]
            try:
                return [*first, *await asyncio.gather(*tasks)], problems
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
        self._has_answered = True

    async def _once(self, client: httpx.AsyncClient, chat: Chat) -> str:
        body = {
            "model": self.config.model,
            "messages": [{key: well_formed(text) for key, text in message.items()} for message in chat],
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        try:
            response = await client.post(self.url, json=body)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UserError(f"{self.key}.url = {self.config.url!r}: {error}; write http://host:port/v1") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _Unreachable(f"{type(error).__name__} {self._shown(str(error))}".strip()) from error
        if response.status_code in BUSY or response.status_code >= 500:
            said = self._shown(response.text)
            raise _Unreachable(f"status {response.status_code} {said}".strip(), _retry_after(response))
        if response.status_code != httpx.codes.OK:
            cure = CURES.get(response.status_code, "the server refuses the request: look at `url` and `model`")
            raise (_NotThis if response.status_code in ABOUT_THE_ITEM else UserError)(
                f"{self.key}: POST {self.url} (model {self.config.model!r}) gives status {response.status_code}; "
                f"{cure}. It says: {self._shown(response.text) or 'nothing'}"
            )
        return self._content(response)

    def _content(self, response: httpx.Response) -> str:
        try:
            content: Any = response.json()["choices"][0]["message"]["content"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError) as error:
            raise _Unreachable(f"no chat completion, but {self._shown(response.text) or 'nothing'}") from error
        return well_formed(content) if isinstance(content, str) else ""

    def _shown(self, text: str) -> str:
        """Some of a server's words, on one line and without the key."""
        line = " ".join(text.split())
        return (line.replace(self._secret, "***") if self._secret else line)[:_SHOWN]


def well_formed(text: str) -> str:
    """The text, with "?" for halves of surrogate pairs: JSON may hold them, and no file or request can."""
    return text.encode("utf-8", "replace").decode("utf-8")


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
