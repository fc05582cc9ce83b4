"""YAML whose values stay text: it would turn `no`, `012`, `1_000`, `12:30:00` and `2025-01-01` into something else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import count as counted
from pathlib import Path
from typing import Any

import yaml

from spell_megatron.types import SpellError

NOTHING = ("", "~", "null", "Null", "NULL")
MOST_VALUES = 100_000
"""Of a file: no recipe has a hundredth of it, and a few lines of aliases within aliases come to any number."""
_STR = "tag:yaml.org,2002:str"


class ConfigError(SpellError):
    exit_code = 2


class Plain(str):
    """A scalar without quotes: what it stands for, its key's type will say."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """Scalars stay text, and so do keys, none of which may come twice."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # noqa: RUF012

    def text(self, node: yaml.ScalarNode) -> str:
        value = self.construct_scalar(node)
        return Plain(value) if node.style is None else str(value)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges (`<<`), each key once: merges of merges would come to any number of pairs."""
        super().flatten_mapping(node)
        node.value = list({_name(key): (key, value) for key, value in node.value}.values())

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if (name := _name(key)) in seen:
                twice = f"the key {name!r} stands here twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key.start_mark)
            seen.add(name)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


def _name(key: yaml.Node) -> str:
    if isinstance(key, yaml.ScalarNode):
        return str(key.value)
    raise yaml.constructor.ConstructorError(None, None, "a key is a text", key.start_mark)


_Loader.add_constructor(_STR, _Loader.text)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that would be read as something else where anything may stand."""

    def text(self, value: str) -> yaml.ScalarNode:
        return self.represent_scalar(_STR, value, style=None if anything(value) == value else "'")

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.text)
_Dumper.add_representer(Plain, _Dumper.text)


def load_yaml(text: str) -> Any:
    """Mappings and lists of texts; those without quotes are `Plain`. Raises ConfigError."""
    try:
        return _unshared(yaml.load(text, _Loader), counted())
    except RecursionError:
        raise ConfigError("this is not YAML: it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(
            f"this is not YAML: {error.problem}{where}; quote a text with one of # : [ ] {{ }} or a tab"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"this is not YAML: {error}") from None


def _unshared(value: Any, count: Iterator[int]) -> Any:
    """A copy in which an anchor and its aliases are apart. `count` gives out the numbers of its values."""
    if next(count) == MOST_VALUES:
        raise ConfigError(f"this is more than {MOST_VALUES:,} values, with each alias (*) written out")
    if isinstance(value, dict):
        return {key: _unshared(inner, count) for key, inner in value.items()}
    return [_unshared(inner, count) for inner in value] if isinstance(value, list) else value


def dump_yaml(value: Any, **options: Any) -> str:
    """What `load_yaml` and the keys' types read as the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, **options)
    return text


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """A file's keys. Raises ConfigError that names the file."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"cannot read the {what} {path}: {error}") from None
    if values is None or values == "":
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a {what} is a mapping of keys, as `steps: 3`, and this is none")
    return values


def written(value: Any) -> str:
    """A value as one would write it after the equals sign; of a section, only what differs from its default."""
    if is_dataclass(value) and not isinstance(value, type):
        default = type(value)()
        names = [field.name for field in fields(value)]
        value = {n: getattr(value, n) for n in names if getattr(value, n) != getattr(default, n)}
    return dump_yaml(_plain(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def anything(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema, where no type says what it is."""
    if text in NOTHING:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text) if len(text) < 40 else str(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    return str(text)
