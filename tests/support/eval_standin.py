"""A small HTTP server that misbehaves on request, for the faults of endpoints. It counts what it is asked."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from eval.benchmark import Item
from eval.benchmarks.reading import Reading
from eval.data import Data

Reply = tuple[int, Any]
"""Status and JSON value (bytes are sent as they are). Status 0 drops the connection."""


def text_reply(text: str, finish: str = "stop") -> Reply:
    return 200, {"choices": [{"text": text, "finish_reason": finish}], "usage": {"completion_tokens": 3}}


def chat_reply(text: str) -> Reply:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


class StandIn:
    """`behave(kind, body, number)` answers; kind is "completions" or "chat", number counts from 1."""

    def __init__(
        self, behave: Callable[[str, dict[str, Any], int], Reply], models: int = 1, root: str = ""
    ) -> None:
        self.asked: Counter[tuple[tuple[int, ...], int]] = Counter()
        self.answered: Counter[tuple[tuple[int, ...], int]] = Counter()
        self.chats = 0
        self.keys: set[str | None] = set()
        self.dead = False
        self._behave, self._lock, self._number = behave, threading.Lock(), 0
        standin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                listed = [{"id": f"model-{i}", "root": root, "max_model_len": 4096} for i in range(models)]
                self._send(0 if standin.dead else 200, {"data": listed})

            def do_POST(self) -> None:
                standin.keys.add(self.headers["Authorization"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                kind = "chat" if "messages" in body else "completions"
                status, value = standin._answer(kind, body)
                self._send(status, value)
                if kind == "completions" and status == 200:
                    with standin._lock:
                        standin.answered[tuple(body["prompt"]), body["seed"]] += 1

            def _send(self, status: int, value: Any) -> None:
                if status == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                """A client that was killed is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, kind: str, body: dict[str, Any]) -> Reply:
        with self._lock:
            self._number += 1
            number = self._number
            if kind == "chat":
                self.chats += 1
            else:
                self.asked[tuple(body["prompt"]), body["seed"]] += 1
        return (0, b"") if self.dead else self._behave(kind, body, number)


class WordCodec:
    """One token per character of the messages' contents: enough of a tokenizer for a stand-in."""

    def conversation(self, messages: Sequence[Any]) -> list[int]:
        return self.encode("\n".join(message["content"] for message in messages))

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def count(self, text: str) -> int:
        return len(text)


class Capitals(Reading):
    """Ten questions with the answers "city 0" to "city 9"."""

    name = "capitals"
    title = "Capitals"

    def load(self, data: Data) -> list[Item]:
        return [
            Item(
                id=str(i),
                messages=({"role": "user", "content": f"Capital of land {i}?"},),
                question=f"Capital of land {i}?",
                references=(f"city {i}",),
                labels={"half": "first" if i < 5 else "second"},
            )
            for i in range(10)
        ]


class Unjudged(Capitals):
    judged = False


def right(kind: str, body: dict[str, Any], number: int) -> Reply:
    """The right answer for even lands, always; a wrong one for odd lands."""
    land = int(chr(body["prompt"][-2]))
    return text_reply(f"The correct answer is city {land if land % 2 == 0 else 'X'}.")
