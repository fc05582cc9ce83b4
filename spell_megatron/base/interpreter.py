"""Starts Python so that no file of the folder where the user works is imported in place of ours, or of Python's own.

`python -m` and `python -c` look into the working folder before anywhere else: an `eval.py` or a `random.py` there would
be run by every process of ours. So ours are started with `-P`, which leaves that folder out, and what they start
themselves (libraries do, too) with PYTHONSAFEPATH. Our packages have common names, and a foreign one may be found first
in other ways; `check_rooms` notices.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from spell_megatron.base.secret import PORT_PIPE, RANKS_SECRET
from spell_megatron.types import SpellError

ROOT = Path(__file__).resolve().parents[2]
_OF_A_RANK = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    PORT_PIPE,
    RANKS_SECRET,
)
ROOMS = ("spell_megatron", "megatron_patches", "launchers", "tokenizer", "eval")


def python(module: str, *arguments: str) -> list[str]:
    """The command line of a module of ours, or of a library."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """The environment of a process of ours that is no rank: this one's, without what would make it take itself for one.

    It finds the same packages of ours, and nothing in the working folder.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_RANK and not name.startswith("TORCHELASTIC_")
    }
    path = [entry for entry in inherited.get("PYTHONPATH", "").split(os.pathsep) if entry]
    known = (*path, sysconfig.get_path("purelib"))
    if str(ROOT) not in known:  # found because it was the working folder, say
        path.insert(0, str(ROOT))
    return {**inherited, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


def check_rooms() -> None:
    """Raise SpellError where a package of ours would be imported from elsewhere."""
    for room in ROOMS:
        spec = find_spec(room)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or not found.is_relative_to(ROOT / room):
            raise SpellError(
                f"`{room}` is taken from {found or 'nowhere'}, not from {ROOT / room}: rename that file, or"
                " take its folder out of PYTHONPATH; a package of the same name that is installed has to go"
                " (pip uninstall), or start from another virtual environment"
            )
