"""Random numbers that depend on what is asked, never on when it is asked.

Every draw of self-play is named by its place: (run seed, step, round, index, role, …). Its seed is a
hash of that name, so that questions may run in any order and be replayed after a crash.
"""

from __future__ import annotations

import hashlib
import random

Name = str | int


def seed_of(*name: Name) -> int:
    """A seed in [0, 2^31): equal names give equal seeds, on every machine."""
    text = "\x1f".join(map(str, name)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") & 0x7FFF_FFFF


def random_of(*name: Name) -> random.Random:
    """A generator of its own for one named draw."""
    return random.Random(seed_of(*name))
