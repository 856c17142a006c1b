"""A chat-completions server on this machine whose answers, refusals and pauses a test decides."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple

from megatron_r1.config.judges import EndpointConfig


class Reply(NamedTuple):
    """What the server does with a request; `text` None: `body` as it stands."""

    text: str | None = None
    status: int = 200
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    pause: float = 0.0  # seconds


Answer = Callable[[dict[str, Any], int], Reply]
"""(request's JSON, its number from 0) -> what to do."""


class JudgeServer:
    """Serves while it is a context; `requests` holds what it was asked, `most` the most requests at a time."""

    def __init__(self, answer: Answer, port: int = 0) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            """Hands requests to the owner."""

            def do_POST(self) -> None:
                owner.serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        assert handler.path == "/v1/chat/completions"
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.keys.append(handler.headers.get("Authorization"))
            self._now += 1
            self.most = max(self.most, self._now)
        reply = self.answer(request, number)
        time.sleep(reply.pause)
        with self._lock:
            self._now -= 1
        body = reply.body
        if reply.text is not None:
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply.text}}]})
        data = body.encode()
        handler.send_response(reply.status)
        for name, value in (*reply.headers, ("Content-Length", str(len(data)))):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def asked(self) -> list[str]:
        """The last message of every request."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def config(self, **changes: Any) -> EndpointConfig:
        """How to reach it."""
        return EndpointConfig(**{"url": self.url, "model": "judge-1", **changes})

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.shutdown()
        self.http.server_close()
