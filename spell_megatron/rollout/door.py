"""What stands before every route of a vLLM server: without the secret nothing is answered.

vLLM's own `--api-key` guards some routes, not those that replace weights. This is loaded by its `--middleware`, and
takes the secret from the environment: a command line is there for all to read.

At a port anybody may listen, so there the secret is never sent. A client says `Spell NONCE`; the door answers 401 with
a nonce of its own and a seal of both; and the client's next request, `Spell NONCE SEAL`, bears another seal of both.
Each end has then shown that it knows the secret, and a stranger has learned nothing: the seals are of these nonces and
of the address at which the server was reached, so that they open no other server, nor this one once it was started
anew. In a socket's folder, where only its user can listen, our clients say the secret itself (`Bearer SECRET`). A port
takes that as well, from who knows the secret and whom it talks to: `curl` on the node, say.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from typing import Any

from spell_megatron.base.secret import new_secret, seal

VARIABLE = "SPELL_ENGINE_SECRET"
"""A variable of the server's environment, which its user alone can read."""
SCHEME = "Spell"
_LONGEST_NONCE = 128
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
        self._secret, self._nonce = secret, new_secret()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._app(scope, receive, send)
            case "http":
                given, where = _given(scope), place(scope.get("server"))
                if self._knows(given, where):
                    return await self._app(scope, receive, send)
                headers = [(b"content-length", b"0"), (b"www-authenticate", self._challenge(given, where))]
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
            case "websocket":  # no route that a fleet uses is one
                await send({"type": "websocket.close", "code": 1008})
            case other:
                raise ValueError(f"a scope of type {other!r} is not served")

    def _knows(self, given: list[str], where: str) -> bool:
        match given:
            case ["Bearer", secret]:
                wanted = self._secret
            case [scheme, nonce, secret] if scheme == SCHEME:
                wanted = client_seal(self._secret, nonce, self._nonce, where)
            case _:
                return False
        return hmac.compare_digest(secret.encode(), wanted.encode())

    def _challenge(self, given: list[str], where: str) -> bytes:
        match given:
            case [scheme, nonce] if scheme == SCHEME and len(nonce) <= _LONGEST_NONCE:
                return (
                    f"{SCHEME} {self._nonce} {server_seal(self._secret, nonce, self._nonce, where)}".encode()
                )
        return SCHEME.encode()


def server_seal(secret: str, theirs: str, ours: str, where: str) -> str:
    """What a door answers to a client's nonce."""
    return seal(secret.encode(), b"door", theirs.encode(), ours.encode(), where.encode()).hex()


def client_seal(secret: str, ours: str, theirs: str, where: str) -> str:
    """What a client answers to a door's nonce."""
    return seal(secret.encode(), b"client", ours.encode(), theirs.encode(), where.encode()).hex()


def place(address: object) -> str:
    """A server's end of a connection, as both ends write it; nothing for a Unix socket."""
    if not isinstance(address, (tuple, list)) or address[1] is None:
        return ""
    found = ip_address(str(address[0]).partition("%")[0])
    return f"{getattr(found, 'ipv4_mapped', None) or found}:{address[1]}"


def _given(scope: _Message) -> list[str]:
    """The words of the request's one Authorization."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    return given[0].decode("latin-1").split(" ") if len(given) == 1 else []
