"""What the processes of a run know each other by: a secret that only their user can read, and what it seals. And
what looks like somebody's secret, and belongs into no file that others read."""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
from pathlib import Path

from spell_megatron.types import SpellError

PORT_PIPE, RANKS_SECRET = "SPELL_PORT_PIPE", "SPELL_RANKS_SECRET"
"""Variables that a starter sets for its ranks: the descriptor of a pipe by which rank 0 tells the others its store's
port, and what ranks know each other by whose run has no secret."""
_DIGEST = "sha256"
DIGEST_BYTES = 32
_SHORTEST = 16
"""Characters of a secret: fewer could be guessed."""
_PRINTABLE = re.compile(r"[!-~]+")
_NAMED = re.compile(
    r"(?i)api[\W_]?keys?(?![a-z])|secret|passw(?:or)?d|passphrase|credentials?"
    r"|(?:^|[\W_])(?:key|token|pwd)(?:[\W_]?\d+)?$|[\W_](?:pass|pat)$"
)
_IN_URL = re.compile(r"://[^/\s]*@")


def names_secret(name: str) -> bool:
    """Whether what goes by this name is nobody else's to read: HF_TOKEN, WANDB_API_KEY, api-key, PGPASSWORD."""
    return _NAMED.search(name) is not None


def is_secret(name: str, value: object) -> bool:
    """Whether a setting is nobody else's to read: by its name, or since it is a URL with a password."""
    return names_secret(name) or _IN_URL.search(str(value)) is not None


def holds_secret(url: str) -> bool:
    """Whether a server's URL may hold a key: a user's, or a parameter's. A server needs neither."""
    return "@" in url or "?" in url


def new_secret() -> str:
    return secrets.token_hex(32)


def write_secret(file: Path) -> None:
    """Keep a new secret in a file that only its user can read. Raises FileExistsError where there is one."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as out:
        os.fchmod(descriptor, 0o600)  # whatever the umask takes away
        out.write(new_secret() + "\n")


def read_secret(file: Path) -> str:
    """The secret in a file. Raises SpellError where it is missing, too short, or open to other users."""
    try:
        with file.open(encoding="ascii") as opened:
            found = os.fstat(opened.fileno())
            text = opened.read(4096).strip()
    except (OSError, ValueError) as error:
        raise SpellError(f"cannot read the secret {file}: {error}") from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise SpellError(
            f"the secret {file} can be read by others than its user: chmod 600, and make a new one"
        )
    if len(text) < _SHORTEST or not _PRINTABLE.fullmatch(text):
        raise SpellError(
            f"the secret {file} is not one line of at least {_SHORTEST} printable characters:"
            f" openssl rand -hex 32 >{file}"
        )
    return text


def seal(key: bytes, *parts: bytes) -> bytes:
    """What only somebody who knows the key can make of these parts."""
    whole = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return hmac.digest(key, whole, _DIGEST)


def sealed(proof: bytes, key: bytes, *parts: bytes) -> bool:
    """Whether a proof is their seal. Takes as long whatever the proof is."""
    return hmac.compare_digest(proof, seal(key, *parts))
