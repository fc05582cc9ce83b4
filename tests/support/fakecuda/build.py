"""The device's library, built by the compiler that is there; no torch is imported."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def build(folder: Path) -> Path:
    """Compile into a folder; the library must be loaded before torch is imported. Takes 4 s."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch, library = Path(spec.origin).parent, folder / "fakecuda.so"
    command = [
        *(
            compiler() or "g++",
            "-O0",
            "-std=c++20",
            "-shared",
            "-fPIC",
            str(Path(__file__).with_name("device.cpp")),
        ),
        *("-I", str(torch / "include"), "-L", str(torch / "lib"), "-lc10", "-ltorch_cpu"),
        *(f"-Wl,-rpath,{torch / 'lib'}", "-o", str(library)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return library
