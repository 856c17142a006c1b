"""The client of a reward server, against a server of the test's own: batches, retries, and what ends the run."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_r1.cluster.local import free_port
from megatron_r1.config.errors import RunFailed
from megatron_r1.rewards import reward_client
from megatron_r1.rewards.reward_client import Item, RewardClient

Answer = tuple[int, dict[str, Any] | str]


class Server(ThreadingHTTPServer):
    """Gives `script`'s answers first, then the length of each response."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Answer] = []
        self.asked: list[list[dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        assert self.path == "/score"
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        self.server.asked.append(items)
        values = [float(len(item["response"])) for item in items]
        usual: Answer = (200, {"values": values, "cut": 1, "checkpoint": "step-8"})
        code, content = self.server.script.pop(0) if self.server.script else usual
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        assert self.path == "/health"
        body = json.dumps({"status": "ok", "stage": "helpful", "checkpoint": "step-8"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(reward_client, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not to be used: nothing listens there
    with Server() as one:
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield one
        one.shutdown()


ITEMS = [Item("1+1=?", "x" * n) for n in range(5)]


def test_batches_come_back_in_order(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_client, "BATCH", 2)
    assert RewardClient("helpful", server.url, 5.0).score(ITEMS) == ([0.0, 1.0, 2.0, 3.0, 4.0], 3)
    assert [len(items) for items in server.asked] == [2, 2, 1]
    assert server.asked[1] == [{"prompt": "1+1=?", "response": "xx"}, {"prompt": "1+1=?", "response": "xxx"}]
    assert RewardClient("helpful", server.url, 5.0).score([]) == ([], 0)


def test_a_server_that_is_busy_is_asked_again(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.script = [(503, {"error": "stopping"}), (429, "slowly"), (500, "no memory")]
    with caplog.at_level(logging.WARNING):
        assert RewardClient("helpful", server.url, 5.0).score(ITEMS)[0] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(server.asked) == 4 and len(caplog.records) == 1
    assert "503: stopping; asking again for 5 s" in caplog.text


def test_text_survives_the_wire(server: Server) -> None:
    text = 'ß汉"\\\n\ud83d'  # half of a surrogate pair, as a decoder may give
    RewardClient("m", server.url, 5.0).score([Item(text, text)])
    assert server.asked == [[{"prompt": text, "response": text}]]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((400, {"error": "items[0].prompt is missing"}), r"refused a request \(400\): .*items\[0\].prompt is missing"),
        ((200, "<html>"), "gave no values: '<html>'; is it `megatron-r1 serve`?"),
        ((200, {"values": [1.0], "cut": 0, "checkpoint": ""}), "gave 1 values for 5 answers"),
        ((200, '{"values": [1, 2, 3, 4, NaN], "cut": 0, "checkpoint": ""}'), "some that are not finite"),
    ],
)
def test_what_makes_no_sense_ends_the_run(answer: Answer, said: str, server: Server) -> None:
    server.script = [answer]
    with pytest.raises(RunFailed, match=f"the reward model 'helpful' at http://127.* {said}"):
        RewardClient("helpful", server.url, 5.0).score(ITEMS)
    assert len(server.asked) == 1


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_client, "FIRST_PAUSE", 0.02)
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RunFailed, match=r"'safety' at .* within timeout = 0.3 s \([345] attempts, the last: .*refused"):
        RewardClient("safety", url, 0.3).score(ITEMS)


def test_another_checkpoint_is_noticed(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    client = RewardClient("helpful", server.url, 5.0)
    client.score(ITEMS)
    server.script = [(200, {"values": [0.0] * 5, "cut": 0, "checkpoint": "step-9"})]
    with caplog.at_level(logging.WARNING):
        client.score(ITEMS)
    assert "now scores with step-9, before with step-8" in caplog.text


def test_who_answers_is_known_before_anything_is_scored(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    client = RewardClient("helpful", server.url, 5.0)
    noted: list[str] = []
    client.note = noted.append
    with caplog.at_level(logging.INFO):
        client.look()
        client.score(ITEMS)
    assert noted == ["step-8"] and "scores with step-8" in caplog.text
    server.script = [(200, {"values": [0.0] * 5, "cut": 0, "checkpoint": "step-9"})]
    client.score(ITEMS)
    assert noted == ["step-8", "step-9"]


def test_a_server_that_is_not_there_yet_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    client = RewardClient("helpful", f"http://127.0.0.1:{free_port()}", 5.0)
    client.note = lambda checkpoint: pytest.fail(checkpoint)
    with caplog.at_level(logging.WARNING):
        client.look()
    assert "the reward model 'helpful' at http://127" in caplog.text and "refused" in caplog.text
