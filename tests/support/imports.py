"""Who imports whom, read from the source: nothing is loaded."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from places import ROOT, SUPPORT

TESTS = SUPPORT.parent
PACKAGES = ("spell_megatron", "megatron_patches", "launchers", "tokenizer", "eval")
HEAVY = {"torch", "vllm", "megatron", "transformers"}
"""Libraries that take seconds to load."""


def modules() -> dict[str, Path]:
    """Every module of the packages by its name; a package's name is its `__init__`."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@cache
def syntax(path: Path) -> ast.Module:
    """What a file says. Nothing is finalised meanwhile: a finaliser that logs an error with its traceback parses too,
    and Python 3.11 counts the depth of both as one ("AST constructor recursion depth mismatch")."""
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    finally:
        gc.enable()


@cache
def imports(path: Path, *, on_load: bool = False) -> frozenset[str]:
    """Full names of what a file imports, modules or what they hold; `on_load`: those alone that loading it imports."""
    names: set[str] = set()
    for node in _nodes(syntax(path), on_load):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def loads(path: Path) -> set[str]:
    """Top-level packages that a test file needs: what it and its helpers import anywhere, and what that loads."""
    found, seen, todo = set[str](), set[Path](), list(imports(path))
    while todo:
        name = todo.pop()
        found.add(name.partition(".")[0])
        for file in _files(name):
            if file not in seen:
                seen.add(file)
                todo += imports(file, on_load=TESTS not in file.parents)
    return found


def circles() -> list[set[str]]:
    """Sets of modules that all import each other, by whatever way, in the order of their names."""
    known = modules()
    above = {
        name: {_module(one, known) for one in imports(path)} - {name, ""} for name, path in known.items()
    }
    reached: dict[str, set[str]] = {}
    for name in known:
        found, todo = set[str](), list(above[name])
        while todo:
            one = todo.pop()
            if one not in found:
                found.add(one)
                todo += above[one]
        reached[name] = found
    together = {frozenset({one for one in reached[name] if name in reached[one]}) for name in known}
    return sorted(map(set, filter(None, together)), key=min)


def _module(name: str, known: Mapping[str, Path]) -> str:
    """The module that a name is, or is held by; empty where it is none of ours."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def _nodes(tree: ast.AST, on_load: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if not isinstance(node, ast.expr) and not (on_load and later):
            yield from _nodes(node, on_load)


@cache
def _files(name: str) -> tuple[Path, ...]:
    """The files of ours that importing a name loads: its packages' and its own; a test's helpers lie beside it."""
    package = name.rpartition(".")[0]
    above = _files(package) if package else ()
    places = [folder / Path(*name.split(".")) for folder in (ROOT, SUPPORT)]
    own = [path for place in places for path in (place.with_suffix(".py"), place / "__init__.py")]
    return (*above, *filter(Path.is_file, own))
