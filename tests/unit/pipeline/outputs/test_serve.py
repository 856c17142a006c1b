"""The HTTP side of `megatron-r1 serve`: requests that are taken together, mistakes that are told, a clean end."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_r1 import cli
from megatron_r1.config.errors import UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.pipeline.outputs.serve import Desk, Handler, Listener, Stopping
from megatron_r1.pipeline.outputs.serve_command import _stage
from megatron_r1.types import Sample


def write(question: str, answer: str) -> tuple[Sample, bool]:
    """A sequence as long as both; "ß" has no token."""
    if "ß" in question + answer:
        raise UserError("the char tokenizer has no token for 'ß'")
    return Sample(token_ids=[1] * (len(question) + len(answer) + 1), prompt_length=1), len(answer) > 9


@dataclass
class Running:
    """A listener whose ranks the test plays."""

    listener: Listener
    desk: Desk

    def ask(self, body: bytes | None, path: str = "/score") -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.listener.server_address[1]}{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body), timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture
def running() -> Iterator[Running]:
    listener, desk = Listener(("127.0.0.1", 0), Handler), Desk()
    listener.open(desk, write, {"stage": "helpful", "checkpoint": "step-8"})
    yield Running(listener, desk)
    desk.close()
    listener.close()


def items(*answers: str) -> bytes:
    return json.dumps({"items": [{"prompt": "1+1=?", "response": answer} for answer in answers]}).encode()


def test_values_in_order_and_what_was_cut(running: Running) -> None:
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(running.ask, items("a", "bb", "c" * 10))
        taken = running.desk.take(10)
        assert taken is not None and [len(sample.token_ids) for sample in taken] == [7, 8, 16]
        running.desk.answer([0.5, -2.0, 1 / 3])
        assert asked.result() == (200, {"values": [0.5, -2.0, 1 / 3], "cut": 1, "checkpoint": "step-8"})


def test_requests_that_wait_are_scored_together(running: Running) -> None:
    with ThreadPoolExecutor() as pool:
        asked = {n: pool.submit(running.ask, items(*["x" * n] * n)) for n in (1, 2, 3)}
        served = 0
        while served < 6:
            taken = running.desk.take(10)
            assert taken is not None
            served += len(taken)
            running.desk.answer([float(len(sample.token_ids) - 6) for sample in taken])
        for n, answer in asked.items():
            assert answer.result()[1]["values"] == [float(n)] * n


def test_nothing_to_do_and_nothing_asked(running: Running) -> None:
    assert running.desk.take(0.01) == []
    assert running.ask(items()) == (200, {"values": [], "cut": 0, "checkpoint": "step-8"})
    assert running.ask(None, "/health") == (200, {"status": "ok", "stage": "helpful", "checkpoint": "step-8"})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the request is no JSON"),
        (b"\xff", "the request is no JSON"),
        (b"[" * 100_000, "the request is no JSON"),
        (b"[]", 'must be {"items"'),
        (b'{"items": {}}', 'must be {"items"'),
        (b'{"items": ["a"]}', "items[0] is no object"),
        (b'{"items": [{"prompt": "a"}]}', "items[0].response is missing"),
        (b'{"items": [{"prompt": 1, "response": "a"}]}', "items[0].prompt is no text"),
        (items("a", "\u00df"), "items[1]: the char tokenizer has no token"),
    ],
)
def test_malformed_requests_are_told_what_is_wrong(body: bytes, said: str, running: Running) -> None:
    code, answer = running.ask(body)
    assert code == 400 and said in answer["error"]
    assert running.desk.take(0.01) == [], "nothing reaches the ranks"


def test_other_paths_are_unknown(running: Running) -> None:
    assert running.ask(b"{}", "/v1/score")[0] == running.ask(None, "/")[0] == 404


def test_a_stop_answers_what_was_taken_and_refuses_the_rest(running: Running) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(running.ask, items("a"))
        assert running.desk.take(10)
        late = pool.submit(running.ask, items("b"))
        running.desk.stopping.set()  # what SIGTERM does
        running.desk.answer([1.0])
        assert first.result()[0] == 200
        assert late.result() == (503, {"error": "the server is stopping"})
        assert running.desk.take(10) is None


def test_ranks_that_die_let_nobody_wait() -> None:
    desk = Desk()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(desk.values, [Sample(token_ids=[1, 2], prompt_length=1)])
        assert desk.take(10)
        threading.Timer(0.01, desk.close).start()
        with pytest.raises(Stopping):
            waiting.result()


def test_only_reward_model_stages_are_served() -> None:
    reward_model = {
        "name": "helpful",
        "kind": "reward_model",
        "steps": 1,
        "optimizer": {"lr": 1},
        "pairs": {"path": "x"},
    }
    pretrain = {
        "name": "base",
        "kind": "pretrain",
        "steps": 1,
        "optimizer": {"lr": 1},
        "corpus": [{"styles": {"plain": 1}}],
    }
    text = {
        "name": "x",
        "model": {"preset": "tiny-dense"},
        "tokenizer": {"kind": "char"},
        "stage": [pretrain, reward_model],
    }
    config = RunConfig.model_validate(text)
    assert _stage(config, "helpful") is config.stage[1]
    with pytest.raises(
        UserError, match='serve base: that stage is of kind "pretrain"; its reward_model stages: helpful'
    ):
        _stage(config, "base")
    with pytest.raises(UserError, match="serve safety: there is no such stage"):
        _stage(config, "safety")


def test_no_folder_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_r1.cli import main

    assert main(["serve", str(tmp_path), "helpful"]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_only_run_and_stage_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "runs/x"])
    assert capsys.readouterr().err.rstrip().endswith("arguments are required: STAGE")
