"""Where things lie, and where a server may listen, for tests in whatever folder."""

from __future__ import annotations

import socket
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
VECTORS = ROOT / "tests" / "vectors"
_ASSETS = ROOT / "spell_megatron" / "weights" / "assets"
TOY_SEED, HARD_SEED = _ASSETS / "toy-seed", _ASSETS / "hard-seed"


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
