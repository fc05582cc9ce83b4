"""Keys mean what they say: the type of a key reads its value, from files and from the command line.

`name: no` is a text, `eager: no` is false, `steps: 012` is twelve and `steps: no` is refused. Serves recipes and
cluster profiles alike, which are pydantic dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

from spell_megatron.config.explaining import explain, how, inside, nearest
from spell_megatron.config.yamltext import NOTHING, ConfigError, Plain, anything, load_yaml

T = TypeVar("T")


def at_home(path: str) -> str:
    """The path with `~` written out. Raises ConfigError where there is no such home."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise ConfigError(f"{path}: nobody knows that home folder (HOME is not set): write it out") from None


def _written_out(path: str) -> str:
    try:
        return at_home(path)
    except ConfigError as error:
        raise ValueError(str(error)) from None


Location = Annotated[str, AfterValidator(_written_out)]
"""A path, a hub id or an image; `~` is the user's home."""


@dataclass(frozen=True, slots=True)
class RecordName:
    """Validates the name of a record: a shipped one, or the import path of the user's own. For `Annotated[str, …]`.

    The records are upstairs; a test compares their names with these.
    """

    kind: str
    shipped: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._known, handler(source))

    def _known(self, name: str) -> str:
        if name in self.shipped or ":" in name:
            return name
        raise ValueError(
            f"no {self.kind} {name!r}{nearest(name, self.shipped)}; there are {', '.join(self.shipped)}, and your own"
            " by its import path, package.module:Name"
        )


adapter: Callable[[type], TypeAdapter[Any]] = cache(TypeAdapter)
"""Pydantic's validator of a dataclass, which is slow to make."""


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over`, section by section; a section without keys changes nothing."""
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merge(old, value)
        elif not (isinstance(old, dict) and _nothing(value)):
            base[key] = value
    return base


def override(schema: type, values: dict[str, Any], text: str, prefix: str = "") -> None:
    """Set one key of `values` as `key=value` says. Where the key wants a text, it is the value as it stands."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"an override is {prefix}key=value, found {prefix + text!r}")
    *parents, leaf = key.split(".")
    kind: Any = schema
    for parent in parents:
        kind = inside(kind, parent)
        inner = values.setdefault(parent, {})
        if _nothing(inner):
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{prefix + text!r}: {parent!r} is a value, not a section{how(schema, parents, prefix)}"
            )
        values = inner
    values[leaf] = _value(inside(kind, leaf), value.strip(), prefix + text)
    if is_dataclass(inside(kind, leaf)) and not isinstance(values[leaf], dict):
        raise ConfigError(f"{prefix + text!r}: this is a section{how(schema, [*parents, leaf], prefix)}")


def build(schema: type[T], values: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """The dataclass of these values. Raises ConfigError with every fault, and how each key is written."""
    try:
        made: T = adapter(schema).validate_python(_typed(schema, values))
        return made
    except ValidationError as error:
        faults = [explain(schema, e["loc"], e["type"], e["msg"], e["input"], prefix) for e in error.errors()]
    raise ConfigError(f"{where}:\n" + "\n".join(f"  {fault}" for fault in faults))


def _value(kind: Any, text: str, where: str) -> Any:
    """What stands behind an override's equals sign."""
    if kind is None or _is_text(kind):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        try:
            found = load_yaml(text) if quoted else text
        except ConfigError:
            found = text
        return found if isinstance(found, str) else text
    try:
        found = load_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{where!r}: {error}") from None
    return Plain("") if found is None else found


def _typed(kind: Any, value: Any) -> Any:
    """The value with every plain text read that does not stand for itself: nothing, in an optional value or an empty
    section, and anything, where anything may stand. Numbers and booleans are read from text by pydantic."""
    if isinstance(value, bool) and kind not in (bool, Any):
        return str(value)  # else pydantic takes it for a number
    if isinstance(value, Plain):
        if kind is Any:
            return anything(value)
        if value in NOTHING and NoneType in get_args(kind):
            return None
        empty = dict if is_dataclass(kind) or get_origin(kind) is dict else get_origin(kind)
        return empty() if value == "" and empty in (dict, tuple) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _typed(inside(kind, key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_typed(inside(kind, index), inner) for index, inner in enumerate(value)]
    return value


def _nothing(value: Any) -> bool:
    return isinstance(value, Plain) and value == ""


def _is_text(kind: Any) -> bool:
    return kind is str or (
        get_origin(kind) is Literal and all(isinstance(one, str) for one in get_args(kind))
    )
