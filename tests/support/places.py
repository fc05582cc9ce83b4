"""Where things lie, for tests in whatever folder."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
VECTORS = ROOT / "tests" / "vectors"
_ASSETS = ROOT / "spell_megatron" / "weights" / "assets"
TOY_SEED, HARD_SEED = _ASSETS / "toy-seed", _ASSETS / "hard-seed"
