"""One rank of `megatron-r1 serve`: rank 0 listens, all ranks score.

The HTTP threads of rank 0 read and tokenise requests and lay them on a desk; rank 0's main thread takes what lies
there, tells the other ranks, and hands the values back. `rewards/reward_client.py` is the other side.
"""

from __future__ import annotations

import json
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import RewardModelStage
from megatron_r1.pipeline import worker
from megatron_r1.rewards.reward_client import Item
from megatron_r1.types import Sample

logger = logging.getLogger(__name__)

MAX_BODY = 1 << 30
"""Bytes of the largest request."""
HEARTBEAT = 30.0
"""Seconds after which the other ranks are told that there is nothing to do: a collective that waits longer than the
run's `timeout_minutes` would end them."""
_LOOK = 0.2  # seconds between two looks at the stop signal

Write = Callable[[str, str], tuple[Sample, bool]]
"""(question, answer) -> what the model reads, and whether it was cut."""


class BadRequest(Exception):
    """What a client must mend."""


class Stopping(Exception):
    """No values come any more."""


@dataclass(eq=False, slots=True)
class _Order:
    samples: list[Sample]
    done: threading.Event = field(default_factory=threading.Event)
    values: list[float] | None = None


class Desk:
    """Where requests wait for the ranks. `stopping` ends it."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._taken: list[_Order] = []

    def values(self, samples: list[Sample]) -> list[float]:
        """The values of a request, when its turn has come. Raises Stopping when none comes any more."""
        if not samples:
            return []
        order = _Order(samples)
        self._orders.put(order)
        while not order.done.wait(_LOOK):
            if self.stopping.is_set() and order not in self._taken:
                raise Stopping
        if order.values is None:
            raise Stopping
        return order.values

    def take(self, seconds: float) -> list[Sample] | None:
        """The sequences of everything that waits; [] when nothing came in so many seconds; None: stop."""
        deadline = time.monotonic() + seconds
        while not self.stopping.is_set() and time.monotonic() < deadline:
            try:
                first = self._orders.get(timeout=_LOOK)
            except queue.Empty:
                continue
            self._taken = [first]
            while not self._orders.empty():
                self._taken.append(self._orders.get())
            return [sample for order in self._taken for sample in order.samples]
        return None if self.stopping.is_set() else []

    def answer(self, values: Sequence[float]) -> None:
        """Hand out the values of what was taken."""
        start = 0
        for order in self._taken:
            order.values = list(values[start : start + len(order.samples)])
            start += len(order.samples)
            order.done.set()
        self._taken = []

    def close(self) -> None:
        """Nothing is answered any more."""
        self.stopping.set()
        for order in self._taken:
            order.done.set()
        self._taken = []


def main(config: RunConfig, stage: RewardModelStage, checkpoint: Path, host: str, port: int) -> int:
    """Serve until SIGTERM; returns the exit status: 0, 2 after a user's mistake, 1 when it cannot go on. Collective."""
    worker.set_up_process(config)
    from megatron_r1.parallel import world as worlds

    try:
        world = worlds.start(config.parallel, config.seed, config.timeout_minutes)
        _serve(config, stage, checkpoint, (host, port), world)
    except (UserError, RunFailed) as error:
        worker.say(f"error: {error}")
        return 2 if isinstance(error, UserError) else 1
    finally:
        worlds.stop()
    return 0


def _serve(config: RunConfig, stage: RewardModelStage, checkpoint: Path, address: tuple[str, int], world: Any) -> None:
    from megatron_r1.data.tokenizers import build_tokenizer
    from megatron_r1.model.presets import architecture
    from megatron_r1.train.reward_scoring import RewardScorer

    desk = Desk()
    # Rank 0 tells the others when to stop; one that stopped by itself would leave them waiting.
    stop: Any = (lambda *_: desk.stopping.set()) if world.rank == 0 else signal.SIG_IGN
    signal.signal(signal.SIGTERM, stop)
    listener = _listen(address) if world.rank == 0 else None
    tokenizer = build_tokenizer(config.tokenizer)
    model = config.model_of(stage)
    scorer = RewardScorer.load(
        checkpoint,
        model,
        architecture(model, tokenizer.vocab_size),
        world,
        tokenizer,
        template=stage.template,
        micro_batch_tokens=stage.micro_batch_tokens,
        packed=stage.packing,
        parked=False,
    )
    about = {"stage": stage.name, "checkpoint": str(checkpoint)}
    if listener is not None:
        listener.open(desk, scorer.sequence, about)
        host, port = listener.server_address[:2]
        print(f"megatron-r1: reward model {stage.name!r} ({checkpoint}) at http://{host!s}:{port}", flush=True)
    try:
        _work(desk, scorer.values, world)
    finally:
        desk.close()
        if listener is not None:
            listener.close()


def _work(desk: Desk, values: Callable[[Sequence[Sample]], list[float]], world: Any) -> None:
    """Score what rank 0 finds on its desk, until it says stop. Collective."""
    while True:
        asked = world.broadcast_from_0(desk.take(HEARTBEAT) if world.rank == 0 else None)
        if asked is None:
            return
        found = values(asked) if asked else []
        if world.rank == 0 and found:
            desk.answer(found)


def _listen(address: tuple[str, int]) -> Listener:
    try:
        return Listener(address, Handler)
    except OSError as error:
        raise UserError(
            f"cannot listen at {address[0]}:{address[1]}: {error.strerror or error}; choose another --host or --port"
        ) from error


class Listener(ThreadingHTTPServer):
    """The server of rank 0: connections wait from the start, and are answered once it is open."""

    daemon_threads = True
    request_queue_size = 128
    desk: Desk
    write: Write
    about: dict[str, str]

    def open(self, desk: Desk, write: Write, about: dict[str, str]) -> None:
        """Begin to answer, in threads of its own."""
        self.desk, self.about = desk, about
        lock = threading.Lock()

        def one_at_a_time(question: str, answer: str) -> tuple[Sample, bool]:
            with lock:  # not every tokenizer may be called by two threads
                return write(question, answer)

        self.write = one_at_a_time
        threading.Thread(target=self.serve_forever, name="http", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        if hasattr(self, "desk"):
            self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """POST /score and GET /health."""

    server: Listener
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a client may take over a line or a block of its request

    def do_GET(self) -> None:
        """/health."""
        if self.path == "/health":
            self._reply(200, {"status": "ok", **self.server.about})
        else:
            self._reply(404, {"error": f"{self.path} is unknown; there are GET /health and POST /score"})

    def do_POST(self) -> None:
        """/score."""
        try:
            items = self._items()
            written = [self._write(number, item) for number, item in enumerate(items)]
            values = self.server.desk.values([sample for sample, _ in written])
        except BadRequest as error:
            code, text = error.args
            self.close_connection = True  # what is left of the request was not read
            self._reply(code, {"error": text})
        except Stopping:
            self._reply(503, {"error": "the server is stopping"})
        else:
            cut = sum(cut for _, cut in written)
            self._reply(200, {"values": values, "cut": cut, "checkpoint": self.server.about["checkpoint"]})

    def _write(self, number: int, item: Item) -> tuple[Sample, bool]:
        try:
            return self.server.write(*item)
        except UserError as error:
            raise BadRequest(400, f"items[{number}]: {error}") from error

    def _items(self) -> list[Item]:
        if self.path != "/score":
            raise BadRequest(404, f"{self.path} is unknown; there are GET /health and POST /score")
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            raise BadRequest(411, "the request needs a Content-Length")
        if int(length) > MAX_BODY:
            raise BadRequest(413, f"the request has {length} bytes; at most {MAX_BODY} are taken: send fewer items")
        return parse_items(self.rfile.read(int(length)))

    def _reply(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Into the log instead of stderr."""
        logger.debug(format, *args)


def parse_items(body: bytes) -> list[Item]:
    """The items of a request. Raises BadRequest (400, what is wrong with it)."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"the request is no JSON: {error}") from error
    items = request.get("items") if isinstance(request, dict) else None
    if not isinstance(items, list):
        raise BadRequest(400, 'the request must be {"items": [{"prompt": "...", "response": "..."}, ...]}')
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise BadRequest(400, f"items[{number}] is no object with the texts `prompt` and `response`")
        for key in Item._fields:
            if not isinstance(item.get(key), str):
                raise BadRequest(400, f"items[{number}].{key} is {'missing' if key not in item else 'no text'}")
    return [Item(item["prompt"], item["response"]) for item in items]
