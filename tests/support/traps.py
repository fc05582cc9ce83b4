"""Files of a user's working folder with the names of modules, ours and others'. They tell when they are imported."""

from __future__ import annotations

from pathlib import Path

NAMES = (
    *("eval", "tokenizer", "launchers", "megatron_patches", "conftest"),
    *("types", "random", "json", "typing", "logging", "enum", "signal", "copy", "stat", "secrets", "inspect"),
    *("torch", "vllm", "numpy", "pydantic", "rich", "typer", "yaml", "httpx", "regex", "uvloop"),
)
_SPRUNG = "sprung-"


def lay(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Lay traps in a new folder."""
    folder.mkdir()
    for name in names:
        mark = folder / f"{_SPRUNG}{name}"
        (folder / f"{name}.py").write_text(
            f"open({str(mark)!r}, 'w')\nraise ImportError('a file of the user')\n"
        )
    return folder


def sprung(folder: Path) -> list[str]:
    """Names of the files that were imported."""
    return [path.name.removeprefix(_SPRUNG) for path in sorted(folder.glob(f"{_SPRUNG}*"))]
