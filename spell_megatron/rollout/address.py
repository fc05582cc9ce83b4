"""Where an engine server listens, and the secret without which it answers nobody.

Whoever reaches a vLLM server owns it: its routes replace weights, write files and run methods of its workers. A
server on this machine therefore listens on a Unix socket in a folder of its user's, one elsewhere on a port, and
both ask every request for a secret (`door`).
"""

from __future__ import annotations

import hmac
import ssl
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import httpx

from spell_megatron.base.secret import new_secret
from spell_megatron.rollout import door


class Unproven(httpx.RequestError):
    """Whoever listens at an address does not know its secret. It was not sent, and neither was the request."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server's URL, the Unix socket it listens on instead of the URL's port, and the secret that it wants.

    The secret is never part of the text of an address: that goes into logs and messages.
    """

    url: str
    socket: str = ""
    secret: str = field(default="", repr=False)

    def client(self, **arguments: Any) -> httpx.Client:
        """A client of this server; `arguments` are httpx's. Raises Unproven where somebody else answers at its port."""
        return httpx.Client(**self._arguments(httpx.HTTPTransport, arguments))

    def async_client(self, **arguments: Any) -> httpx.AsyncClient:
        """The same, asynchronous."""
        return httpx.AsyncClient(**self._arguments(httpx.AsyncHTTPTransport, arguments))

    def _arguments(self, transport: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
        arguments = {"base_url": self.url, "auth": self._auth, **arguments}
        if not self.url.startswith("https:"):
            # httpx reads every certificate of the machine for each client, some 25 ms; here none is shown.
            arguments.setdefault("verify", ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))  # which trusts nobody
        if self.socket:  # a transport has limits of its own
            own = {name: arguments.pop(name) for name in ("limits", "verify") if name in arguments}
            arguments["transport"] = transport(uds=self.socket, **own)
        return arguments

    @property
    def _auth(self) -> httpx.Auth | None:
        if not self.secret:
            return None
        return _Known(self.secret) if self.socket else _Proven(self.secret)

    def __str__(self) -> str:
        return self.socket or self.url


class _Known(httpx.Auth):
    """Sends the secret, where its user alone can listen."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._secret}"
        yield request


class _Proven(_Known):
    """Has the door prove itself before every request, as `door` says: by the next one another may have its port."""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        nonce = new_secret()
        hello = httpx.Request(
            "GET",
            request.url.join("/"),
            headers={"Authorization": f"{door.SCHEME} {nonce}"},
            extensions=request.extensions,  # its time limits
        )
        answer = yield hello
        stream = answer.extensions.get("network_stream")
        where = door.place(stream.get_extra_info("server_addr") if stream else None)
        words = answer.headers.get("WWW-Authenticate", "").split(" ")
        theirs, proof = words[1:] if len(words) == 3 else ("", "")
        if not hmac.compare_digest(
            proof.encode(), door.server_seal(self._secret, nonce, theirs, where).encode()
        ):
            raise Unproven(
                f"whoever listens at {request.url.netloc.decode()} does not know the secret of this server: another"
                " run's server may have this port, rollout.servers.secret_file may not be that of its own, or a"
                f" tunnel or a map of ports lies before it (it was reached as {where})",
                request=hello,
            )
        seal = door.client_seal(self._secret, nonce, theirs, where)
        request.headers["Authorization"] = f"{door.SCHEME} {nonce} {seal}"
        yield request
