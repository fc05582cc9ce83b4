"""A user's own object by its import path, `pkg.mod:Name`, as a recipe or an option names it. No torch."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import TypeVar

from spell_megatron.config.explaining import nearest
from spell_megatron.types import SpellError

T = TypeVar("T")

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def imported(path: str, kind: type[T], key: str) -> T:
    """The object at an import path: one of type `kind`, or what a class of that type makes without arguments.

    Importing runs the module's code. `key` is where the path is written ("model.families"). Raises SpellError for a
    path that is none, a module that is not there or fails, a name that it lacks, and an object of another type.
    """
    where = f"{key}: {path!r}"
    if not _PATH.fullmatch(path):
        raise SpellError(
            f"{where} is no import path: write package.module:Name, as my_package.mine:{kind.__name__}"
        )
    module, _, name = path.partition(":")
    try:
        home = importlib.import_module(module)
    except Exception as error:  # a stranger's code raises anything
        raise SpellError(f"{where}: {_unimported(module, error)}") from error
    if not hasattr(home, name):
        raise SpellError(f"{where}: {module} has no {name!r}{nearest(name, dir(home))}")
    found = getattr(home, name)
    if isinstance(found, kind):
        return found
    if not (inspect.isclass(found) and issubclass(found, kind)):
        what = (
            f"the class {found.__qualname__}" if inspect.isclass(found) else f"of type {type(found).__name__}"
        )
        raise SpellError(
            f"{where} is {what}, and what belongs here is of type {kind.__module__}:{kind.__qualname__}"
        )
    try:
        return found()
    except Exception as error:
        raise SpellError(
            f"{where} cannot be made without arguments ({type(error).__name__}: {error}): name an object of the class"
        ) from error


def _unimported(module: str, error: Exception) -> str:
    """Whether the module is not there, or is and fails."""
    missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if missing and f"{module}.".startswith(f"{missing}."):
        return f"there is no module {missing!r}; install its package, or add its folder to PYTHONPATH on every node"
    return f"importing {module} fails with {type(error).__name__}: {error}"
