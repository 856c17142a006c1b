"""A server that is slow, busy, broken, down or strict: what the client does, and how often it asks."""

from __future__ import annotations

import email.utils
import logging
import socket
import time
from typing import Any

import httpx2 as httpx
import pytest

from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.config.judges import EndpointConfig
from megatron_r1.judges.endpoint import Endpoint, JudgeDown
from tests.unit.judges.server import JudgeServer, Reply

SECRET = "sk-very-secret-0815"


class Clock:
    """Time passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def endpoint(config: EndpointConfig, clock: Clock | None = None) -> Endpoint:
    clock = clock or Clock()
    return Endpoint(config, "stage.cold.judge.server", "Chunks are saved", sleep=clock.sleep, clock=clock)


def chats(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_replies_come_in_the_order_of_the_chats_and_the_body_is_as_configured() -> None:
    def late_first(request: dict, number: int) -> Reply:
        text = request["messages"][0]["content"]
        return Reply(text.upper(), pause=0.05 if text == "a" else 0)

    with JudgeServer(late_first) as server:
        config = server.config(temperature=0.5, max_tokens=7)
        assert endpoint(config).ask(chats("a", "b", "c")) == ["A", "B", "C"]
        assert endpoint(config).ask([]) == []
    assert server.requests[0].keys() == {"model", "messages", "temperature", "max_tokens"}
    assert [server.requests[0][key] for key in ("model", "temperature", "max_tokens")] == ["judge-1", 0.5, 7]
    assert server.keys == [None] * 3


@pytest.mark.parametrize("bound", [1, 3])
def test_at_most_so_many_requests_at_a_time(bound: int) -> None:
    with JudgeServer(lambda request, number: Reply("x", pause=0.03)) as server:
        endpoint(server.config(concurrency=bound)).ask(chats(*"abcdefghi"))
    assert server.most == bound


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_busy_servers_are_asked_again_after_1_2_4_seconds(status: int) -> None:
    clock = Clock()
    with JudgeServer(lambda request, number: Reply("done") if number == 3 else Reply(status=status)) as server:
        assert endpoint(server.config(retries=3), clock).ask(chats("q")) == ["done"]
    assert clock.slept == [1, 2, 4]
    assert len(server.requests) == 4


def test_retry_after_in_seconds_and_as_a_date() -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    given = ["7", date, "0.5", "soon", "1e9"]

    def busy(request: dict, number: int) -> Reply:
        return Reply("done") if number == 5 else Reply(status=429, headers=(("Retry-After", given[number]),))

    clock = Clock()
    with JudgeServer(busy) as server:
        endpoint(server.config(retries=5), clock).ask(chats("q"))
    assert clock.slept[0] == 7
    assert clock.slept[1] == pytest.approx(100, abs=3)
    assert clock.slept[2:] == [4, 8, 600]  # our own pace where the server asks for less; never longer than 10 minutes


@pytest.mark.parametrize("body", ["<html>loading</html>", "{}", '{"choices": []}', '{"choices": [{"message": null}]}'])
def test_what_is_no_completion_is_asked_again(body: str) -> None:
    with JudgeServer(lambda request, number: Reply("ok") if number else Reply(body=body)) as server:
        assert endpoint(server.config()).ask(chats("q")) == ["ok"]


def test_a_completion_without_text_is_an_empty_reply() -> None:
    with JudgeServer(lambda *_: Reply(body='{"choices": [{"message": {"content": null}}]}')) as server:
        assert endpoint(server.config()).ask(chats("q")) == [""]


def test_a_timeout_is_asked_again() -> None:
    with JudgeServer(lambda request, number: Reply("ok", pause=0 if number else 0.4)) as server:
        assert endpoint(server.config(timeout=0.15)).ask(chats("q")) == ["ok"]
    assert len(server.requests) == 2


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_down_stop_says_who_since_when_and_what_is_saved() -> None:
    clock = Clock()
    config = EndpointConfig(url=f"http://127.0.0.1:{unused_port()}/v1", model="judge-1", retries=2)
    with pytest.raises(JudgeDown) as caught:
        endpoint(config, clock).ask(chats("q"))
    text = str(caught.value)
    assert isinstance(caught.value, RunFailed)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1000.0))  # of the first failure, not of the last
    assert f"{config.url} (model judge-1) is down since {since}; 3 attempts failed" in text
    assert "ConnectError" in text and "Chunks are saved" in text and "the same command goes on" in text
    assert clock.slept == [1, 2]


def test_down_wait_asks_on_and_says_so_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with JudgeServer(lambda request, number: Reply("at last") if number == 12 else Reply(status=503)) as server:
        config = server.config(retries=1, down="wait", wait_seconds=20.0)
        with caplog.at_level(logging.WARNING):
            assert endpoint(config, clock).ask(chats("q")) == ["at last"]
    assert clock.slept == [1] + 11 * [20]
    said = [record.getMessage() for record in caplog.records]
    # 220 s in steps of 20 s: at 1, 61, 121, 181 s
    assert [line.partition(" (")[0].rpartition(" for ")[2] for line in said[:-1]] == ["1 s", "61 s", "121 s", "181 s"]
    assert "answers again, after 221 s" in said[-1]


@pytest.mark.parametrize(
    ("status", "cure"), [(400, "max_tokens"), (401, "api_key"), (403, "api_key"), (404, "/v1"), (422, "refuses")]
)
def test_a_request_that_is_refused_for_what_it_is_is_not_repeated(status: int, cure: str) -> None:
    with JudgeServer(lambda *_: Reply(status=status, body="no such model: judge-1")) as server:
        with pytest.raises(UserError, match=cure) as caught:
            endpoint(server.config()).ask(chats("q"))
        assert len(server.requests) == 1
    assert f"status {status}" in str(caught.value) and "no such model: judge-1" in str(caught.value)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_request_that_is_refused_does_not_end_the_run(status: int, caplog: pytest.LogCaptureFixture) -> None:
    def answer(request: dict, number: int) -> Reply:
        text = request["messages"][0]["content"]
        return Reply(status=status, body="context length exceeded") if "long" in text else Reply(text.upper())

    with JudgeServer(answer) as server, caplog.at_level(logging.WARNING):
        judge = endpoint(server.config())
        # The first one too: others are asked before anybody concludes that the recipe is wrong.
        assert judge.ask(chats("long", "a", "long b", "c")) == [None, "A", None, "C"]
        assert judge.ask(chats("long")) == [None], "it has answered in this run"
    assert "2 of 4 requests refused" in caplog.text and "context length exceeded" in caplog.text


def test_a_server_that_refuses_everything_is_not_asked_for_long() -> None:
    with JudgeServer(lambda *_: Reply(status=400)) as server:
        with pytest.raises(UserError, match="max_tokens"):
            endpoint(server.config()).ask(chats(*"abcdefghijklm"))
        assert len(server.requests) == 8


def test_as_many_connections_as_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library opens 100 at most, and counts the wait for one as a failed attempt."""
    given = []
    client = httpx.AsyncClient

    def opened(**keys: Any) -> httpx.AsyncClient:
        given.append(keys["limits"].max_connections)
        return client(**keys)

    monkeypatch.setattr(httpx, "AsyncClient", opened)
    with JudgeServer(lambda *_: Reply("x")) as server:
        endpoint(server.config(concurrency=250)).ask(chats("q"))
    assert given == [250]


def test_a_reply_that_cannot_be_unpacked_is_asked_again() -> None:
    broken = Reply(body="no gzip", headers=(("Content-Encoding", "gzip"),))
    with JudgeServer(lambda request, number: Reply("ok") if number else broken) as server:
        assert endpoint(server.config()).ask(chats("q")) == ["ok"]


def test_halves_of_surrogate_pairs_go_neither_out_nor_in() -> None:
    body = '{"choices": [{"message": {"content": "a \\ud83d b"}}]}'
    with JudgeServer(lambda *_: Reply(body=body)) as server:
        assert endpoint(server.config()).ask(chats("x \ud83d y")) == ["a ? b"]
        assert server.asked() == ["x ? y"]


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    with JudgeServer(lambda *_: Reply(status=401, body=f"bad key {SECRET}")) as server:
        with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as caught:
            endpoint(server.config(api_key="JUDGE_KEY")).ask(chats("q"))
        assert server.keys == [f"Bearer {SECRET}"]
    assert "bad key ***" in str(caught.value)
    assert SECRET not in str(caught.value) + caplog.text


def test_a_key_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="api_key = 'JUDGE_KEY': there is no such environment variable"):
        endpoint(EndpointConfig(url="http://x/v1", model="m", api_key="JUDGE_KEY"))


def test_an_address_that_is_none() -> None:
    with pytest.raises(UserError, match="http://host:port/v1"):
        endpoint(EndpointConfig(url="node7:30000", model="m")).ask(chats("q"))
