"""What stands before every route of a vLLM server: without the secret nothing is answered.

vLLM's own `--api-key` guards some routes, not those that replace weights. This is loaded by its `--middleware`, and
takes the secret from the environment: a command line is there for all to read.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

VARIABLE = "SPELL_ENGINE_SECRET"
"""A variable of the server's environment, which its user alone can read."""
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


class Door:
    """ASGI middleware: a request without the secret is answered 401, anything but a request is refused."""

    def __init__(self, app: _App) -> None:
        self._app = app
        if not (secret := os.environ.get(VARIABLE, "")):
            raise ValueError(f"{VARIABLE} is not set: a server without a secret would be open to everybody")
        self._wanted = f"Bearer {secret}".encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._app(scope, receive, send)
            case "http" if self._knows(scope):
                await self._app(scope, receive, send)
            case "http":
                headers = [(b"content-length", b"0"), (b"www-authenticate", b"Bearer")]
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
            case "websocket":  # no route that a fleet uses is one
                await send({"type": "websocket.close", "code": 1008})
            case other:
                raise ValueError(f"a scope of type {other!r} is not served")

    def _knows(self, scope: _Message) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._wanted)
