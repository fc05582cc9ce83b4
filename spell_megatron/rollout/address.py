"""Where an engine server listens, and the secret without which it answers nobody.

Whoever reaches a vLLM server owns it: its routes replace weights, write files and run methods of its workers. A
server on this machine therefore listens on a Unix socket in a folder of its user's, one elsewhere on a port, and
both ask every request for a secret (`door`).
"""

from __future__ import annotations

import os
import re
import secrets
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from spell_megatron.rollout.engine import EngineError

_SHORTEST = 16
"""Characters of a secret: fewer could be guessed."""
_PRINTABLE = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Address:
    """A server's URL, the Unix socket it listens on instead of the URL's port, and the secret that it wants.

    The secret is never part of the text of an address: that goes into logs and messages.
    """

    url: str
    socket: str = ""
    secret: str = field(default="", repr=False)

    def client(self, **arguments: Any) -> httpx.Client:
        """A client of this server; `arguments` are httpx's."""
        return httpx.Client(**self._arguments(httpx.HTTPTransport, arguments))

    def async_client(self, **arguments: Any) -> httpx.AsyncClient:
        """The same for a coroutine."""
        return httpx.AsyncClient(**self._arguments(httpx.AsyncHTTPTransport, arguments))

    def _arguments(self, transport: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.secret}"} if self.secret else {}
        arguments = {"base_url": self.url, "headers": headers, **arguments}
        if not self.url.startswith("https:"):
            # httpx reads every certificate of the machine for each client, some 25 ms; here none is shown.
            arguments.setdefault("verify", ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))  # which trusts nobody
        if self.socket:  # a transport has limits of its own
            own = {name: arguments.pop(name) for name in ("limits", "verify") if name in arguments}
            arguments["transport"] = transport(uds=self.socket, **own)
        return arguments

    def __str__(self) -> str:
        return self.socket or self.url


def new_secret() -> str:
    return secrets.token_hex(32)


def write_secret(file: Path) -> None:
    """Keep a new secret in a file that only its user can read. Raises FileExistsError where there is one."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as out:
        os.fchmod(descriptor, 0o600)  # whatever the umask takes away
        out.write(new_secret() + "\n")


def read_secret(file: Path) -> str:
    """The secret in a file. Raises EngineError where it is missing, too short, or open to other users."""
    try:
        with file.open(encoding="ascii") as opened:
            found = os.fstat(opened.fileno())
            text = opened.read(4096).strip()
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read the engines' secret {file}: {error}") from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise EngineError(
            f"the engines' secret {file} can be read by others than its user: chmod 600, and make a new one"
        )
    if len(text) < _SHORTEST or not _PRINTABLE.fullmatch(text):
        raise EngineError(
            f"the engines' secret {file} is not one line of at least {_SHORTEST} printable characters:"
            f" openssl rand -hex 32 >{file}"
        )
    return text
