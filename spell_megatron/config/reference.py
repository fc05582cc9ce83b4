"""Every key as Markdown, read from the schema: values, default, meaning. `docs/reference.md` is what this writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from spell_megatron.config.explaining import example, nearest
from spell_megatron.config.reading import RecordName
from spell_megatron.config.schema import Config
from spell_megatron.config.yamltext import ConfigError

_HEAD = """# Every key

Written by `spell-megatron config > docs/reference.md` from `spell_megatron/config/schema.py`; a test compares the two.
`spell-megatron config policy.loss` prints one section. In a recipe sections nest; on a command line a key
is written with dots, as `policy.loss.kl=0.01`. [Recipes](recipes.md) says which keys make up the paper's ablations.
"""
_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def reference(under: str = "") -> str:
    """Markdown of all sections, or of one and those inside it. ConfigError where there is no such section."""
    every = dict(_sections(Config, ""))
    chosen = [
        path for path in every if not under or path == under or path.startswith((f"{under}.", f"{under}["))
    ]
    if not chosen:
        raise ConfigError(
            f"no section {under!r}{nearest(under, every)}; there are {', '.join(filter(None, every))}"
        )
    pages = [_section(path, every[path]) for path in chosen]
    links = " · ".join(f"[{_title(path)}](#{_anchor(path)})" for path in chosen)
    return "\n".join(pages if under else [_HEAD, links + "\n", *pages]).rstrip("\n")


def _sections(section: type, path: str) -> Iterator[tuple[str, type]]:
    """A section and those inside it, each with its path; of what a list holds, with `[]` behind the list's key."""
    yield path, section
    for name, field in _fields(section):
        key = f"{path}.{name}" if path else name
        inner = get_args(field.annotation)[0] if get_origin(field.annotation) is tuple else field.annotation
        if is_dataclass(inner):
            yield from _sections(inner, key if inner is field.annotation else f"{key}[]")  # type: ignore[arg-type]


def _section(path: str, section: type) -> str:
    rows = [
        f"| `{name}` | {_values(field.annotation, field.metadata, path, name)} | {_default(field)} | {_text(field)} |"
        for name, field in _fields(section)
        if not is_dataclass(field.annotation)
    ]
    table = ["", "| key | values | default | meaning |", "| --- | --- | --- | --- |", *rows] if rows else []
    return "\n".join([f"## {_title(path)}", "", cleandoc(section.__doc__ or ""), *table, ""])


def _values(kind: Any, limits: Iterable[Any], path: str, name: str) -> str:
    """What may stand behind a key of this type within these limits."""
    limits, parts = list(limits), get_args(kind)
    if get_origin(kind) is Annotated:
        extra = [
            one for part in parts[1:] for one in (part.metadata if isinstance(part, FieldInfo) else [part])
        ]
        return _values(parts[0], [*limits, *extra], path, name)
    entry = next((one for one in limits if isinstance(one, RecordName)), None)
    if entry is not None:
        return f"{_choice(entry.shipped)}, `package.module:Name`"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("`null`" if one is NoneType else _values(one, limits, path, name) for one in parts)
    if get_origin(kind) is Literal:
        return _choice(parts)
    if get_origin(kind) is dict:
        return "names with values"
    if get_origin(kind) is tuple and parts[-1] is not Ellipsis:
        return f"{len(parts)} of: {_values(parts[0], limits, path, name)}"
    if get_origin(kind) is tuple:
        return f"list of {_values(parts[0], limits, path, name)}"
    if is_dataclass(kind):
        inner = f"{path}.{name}[]" if path else f"{name}[]"
        return f"[sections](#{_anchor(inner)})"
    if kind is str:
        return "path" if any(isinstance(one, AfterValidator) for one in limits) else "text"
    bounds = [
        f"{sign} {getattr(one, name):.12g}"
        for one in limits
        for name, sign in _BOUNDS.items()
        if hasattr(one, name)
    ]
    named = {bool: "`true`, `false`", int: "integer", float: "number"}.get(kind, "anything")
    return f"{named} {', '.join(bounds)}".rstrip()


def _choice(names: Iterable[Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "`null`"
    return "empty" if value in ("", (), {}) else f"`{example(field.annotation, value)}`"


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def _fields(section: type) -> Iterable[tuple[str, FieldInfo]]:
    return section.__pydantic_fields__.items()  # type: ignore[attr-defined, no-any-return]


def _title(path: str) -> str:
    return path or "A run"


def _anchor(path: str) -> str:
    """The anchor of a heading, as the usual renderers of Markdown make it."""
    return "".join(char for char in _title(path).lower().replace(" ", "-") if char.isalnum() or char in "-_")
