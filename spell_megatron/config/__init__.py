"""Configuration: typed dataclasses, YAML recipes, `key=value` overrides. No torch.

`load_config("toy", ["steps=3", "policy.optimizer.lr=1e-4"])` reads `recipes/toy.yaml`, follows its
`inherit:` chain, applies the overrides and validates the whole. An unknown key, a wrong type or a
contradiction raises `ConfigError`, which names the key, the nearest right one and how it is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spell_megatron.config.contradictions import check_contradictions, untrainable
from spell_megatron.config.explaining import nearest
from spell_megatron.config.reading import Location, adapter, at_home, build, merge, override
from spell_megatron.config.schema import (
    EVERY_TEXT,
    BeyondConfig,
    ClusterConfig,
    Config,
    CorpusConfig,
    Dtype,
    ExternalJudgeConfig,
    FusionsConfig,
    HeldOutConfig,
    LayoutConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RecordConfig,
    RolloutConfig,
    SamplingConfig,
    SelfPlayConfig,
    ServersConfig,
    SourceConfig,
    StageConfig,
)
from spell_megatron.config.yamltext import ConfigError, dump_yaml, read_mapping, written

__all__ = [
    "EVERY_TEXT",
    "RECIPES",
    "BeyondConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "CorpusConfig",
    "Dtype",
    "ExternalJudgeConfig",
    "FusionsConfig",
    "HeldOutConfig",
    "LayoutConfig",
    "Location",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "RecordConfig",
    "RolloutConfig",
    "SamplingConfig",
    "SelfPlayConfig",
    "ServersConfig",
    "SourceConfig",
    "StageConfig",
    "dump_config",
    "load_config",
    "model_recipes",
    "parse_config",
    "untrainable",
    "written",
]

RECIPES = Path(__file__).parent / "recipes"


def load_config(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe (a name in `recipes/` or a path), apply `key=value` overrides, validate."""
    values = _read(_find(recipe))
    for text in overrides:
        override(Config, values, text)
    return parse_config(values, where=recipe)


def model_recipes() -> list[str]:
    """Names of the shipped recipes that train a model of the hub; the others are parts of them, and the toy."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [name for name in names if "/" in load_config(name).model.path]


def parse_config(values: Mapping[str, Any], where: str = "config") -> Config:
    config = build(Config, values, f"{where} is not a valid configuration")
    check_contradictions(config, where)
    return config


def dump_config(config: Config) -> str:
    """YAML of every key, defaults included: `parse_config(yaml.safe_load(text)) == config`."""
    return dump_yaml(adapter(Config).dump_python(config, mode="json"))


def _find(recipe: str, beside: Path | None = None) -> Path:
    """A recipe's file; for the base of another recipe, one `beside` it comes before the shipped ones."""
    path = Path(at_home(recipe))
    near = [beside.parent / path.with_name(f"{path.name}.yaml"), beside.parent / path] if beside else []
    for found in (*near, RECIPES / f"{recipe}.yaml", path):
        if found.is_file() and not (beside and found.samefile(beside)):
            return found
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise ConfigError(
        f"{f'{beside}: inherit: ' if beside else ''}no recipe {recipe!r}{nearest(recipe, names)};"
        f" recipes: {', '.join(names)} (or give a path)"
    )


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's keys over those of the recipes that it inherits; `below` are those that inherit it."""
    chain = (*below, path.resolve())
    if path.resolve() in below:
        raise ConfigError(f"recipes inherit each other in a circle: {' → '.join(map(str, chain))}")
    values = read_mapping(path, "recipe")
    bases = values.pop("inherit", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: inherit is a recipe's name, or a list of names, as `inherit: toy`")
    merged: dict[str, Any] = {}
    for base in filter(None, bases):  # the later ones have the say
        merged = merge(merged, _read(_find(base, path), chain))
    return merge(merged, values)
