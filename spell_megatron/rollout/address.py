"""Where an engine server listens, and the secret without which it answers nobody.

Whoever reaches a vLLM server owns it: its routes replace weights, write files and run methods of its workers. A
server on this machine therefore listens on a Unix socket in a folder of its user's, one elsewhere on a port, and
both ask every request for a secret (`door`).
"""

from __future__ import annotations

import os
import re
import secrets
import stat
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
        if self.socket:  # a transport has limits of its own
            limits = arguments.pop("limits", httpx.Limits())
            arguments["transport"] = httpx.HTTPTransport(uds=self.socket, limits=limits)
        return httpx.Client(base_url=self.url, headers=self._headers, **arguments)

    def async_client(self, **arguments: Any) -> httpx.AsyncClient:
        if self.socket:
            limits = arguments.pop("limits", httpx.Limits())
            arguments["transport"] = httpx.AsyncHTTPTransport(uds=self.socket, limits=limits)
        return httpx.AsyncClient(base_url=self.url, headers=self._headers, **arguments)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"} if self.secret else {}

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
