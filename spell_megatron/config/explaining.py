"""What a wrong key or value is answered with: what is wrong, the nearest right key, and how it is written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin

from spell_megatron.config.yamltext import written


def inside(kind: Any, part: int | str) -> Any:
    """The type of what stands under a key or an index; None where nothing can."""
    if kind is Any:
        return Any
    if is_dataclass(kind):
        field = getattr(kind, "__pydantic_fields__", {}).get(part)
        return field.annotation if field else None
    inner = get_args(kind)
    if get_origin(kind) is dict:
        return inner[1]
    if get_origin(kind) is tuple and isinstance(part, int):
        return inner[0] if inner[-1] is Ellipsis else inner[part] if part < len(inner) else None
    return None


def nearest(word: str, words: Iterable[str], prefix: str = "", cutoff: float = 0.5) -> str:
    """The hint at what was meant, to stand behind a wrong word; empty where no word is as near as `cutoff`."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def explain(schema: type, loc: Sequence[int | str], kind: str, message: str, found: Any, prefix: str) -> str:
    key = prefix + ".".join(map(str, loc))
    if kind == "unexpected_keyword_argument":
        *parents, leaf = loc
        section: Any = schema
        for part in parents:
            section = inside(section, part)
        names = [field.name for field in fields(section)]
        siblings = prefix + "".join(f"{part}." for part in parents)
        hint = nearest(str(leaf), names, siblings) or _elsewhere(schema, str(leaf), prefix)
        return f"unknown key {key!r}{hint or '; the keys here: ' + ', '.join(names)}"
    said = {"dataclass_type": "this is a section of keys", "tuple_type": "this is a list"}
    said |= {"dict_type": "this is a mapping of names to values", "string_type": "this is one text"}
    text = said.get(kind, message.removeprefix("Value error, "))
    given = f", found {found!r}" if isinstance(found, str) else ""
    return f"{key}: {text[0].lower()}{text[1:]}{given}{how(schema, loc, prefix, found)}"


def _elsewhere(schema: type, leaf: str, prefix: str) -> str:
    """A key of the same name in another section; written with dots, it was a path in a file."""
    if "." in leaf:
        *parents, last = leaf.split(".")
        opened = "".join(f"{part}: {{" for part in parents)
        return f"; in a file this is written {opened}{last}: …{'}' * len(parents)}"
    found = next((key for key in _keys(schema) if key.endswith(f".{leaf}")), None)
    return f"; did you mean {prefix + found!r}?" if found else ""


def _keys(schema: Any, path: str = "") -> Iterator[str]:
    for field in fields(schema):
        inner = inside(schema, field.name)
        yield path + field.name
        if is_dataclass(inner):
            yield from _keys(inner, f"{path}{field.name}.")


def how(schema: type, loc: Sequence[int | str], prefix: str, found: Any = None) -> str:
    """How to write the key, by an example of its type: its default, if it has a telling one."""
    kind: Any = schema
    default: Any = schema()
    keys: list[str] = []
    for part in loc:
        within = inside(kind, part)
        if within is None or isinstance(part, int):
            break
        default = default.get(part) if isinstance(default, dict) else getattr(default, part, None)
        kind = within
        keys.append(str(part))
    if not keys:
        return ""
    key = prefix + ".".join(keys)
    if is_dataclass(kind):
        return f"; write its keys one by one, as {key}.{fields(kind)[0].name}=…"
    return (
        f"; written {key}={example(kind, default, found)}{' or null' if NoneType in get_args(kind) else ''}"
    )


def example(kind: Any, default: Any, found: Any = None) -> str:
    """A value of a key of this type, as it is written: the default, if it tells anything."""
    if isinstance(found, str) and found and kind == tuple[str, ...]:
        return written([str(found)])
    if default or default == 0 or isinstance(default, str):
        if isinstance(default, tuple) and is_dataclass(default[0]):
            name = fields(default[0])[0].name
            return f"[{{{name}: {written(getattr(default[0], name))}}}]"
        return written(default)
    if get_origin(kind) is dict:
        return "{NAME: value}"
    if get_origin(kind) is tuple:
        return "[one, another]"
    return next((text for part, text in ((int, "1"), (float, "1.0")) if part in get_args(kind)), "text")
