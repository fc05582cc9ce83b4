"""Recipes and overrides: what is accepted, and what a mistake is answered with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from pydantic.fields import FieldInfo

from spell_megatron.config import RECIPES, Config, ConfigError, dump_config, load_config, parse_config

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_is_valid_and_survives_a_round_trip(recipe: str) -> None:
    config = load_config(recipe)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_the_defaults_are_those_of_the_paper() -> None:
    config = Config()
    play, loss, optimizer = config.selfplay, config.policy.loss, config.policy.optimizer
    assert (play.questions, play.round_questions, play.max_rounds) == (128, 480, 10)
    assert (play.group_size, play.documents, play.memory) == (8, 5, 3)
    assert (play.sampling.temperature, play.sampling.top_p) == (0.7, 0.95)
    assert (loss.clip_low, loss.clip_high, loss.kl, loss.entropy) == (0.2, 0.2, 0.0, 0.0)
    assert (optimizer.lr, optimizer.clip_grad, config.policy.minibatches) == (2e-6, 1.0, 1)


def test_overrides_reach_every_depth() -> None:
    config = load_config(
        "toy", ["steps=3", "policy.optimizer.lr=1e-5", "selfplay.verifier_agreement=[0.6, 0.9]"]
    )
    assert config.steps == 3
    assert config.policy.optimizer.lr == 1e-5
    assert config.selfplay.verifier_agreement == (0.6, 0.9)


def test_a_recipe_inherits_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("inherit: toy\nsteps: 2\nselfplay: {questions: 5}\n", encoding="utf-8")
    config, base = load_config(str(path)), load_config("toy")
    assert (config.steps, config.selfplay.questions) == (2, 5)
    assert config.selfplay.group_size == base.selfplay.group_size


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("selfplay.questons=4", "did you mean 'selfplay.questions'"),
        ("stepz=4", "did you mean 'steps'"),
        ("policy.layout.tensr=2", "did you mean 'policy.layout.tensor'"),
        ("steps=many", "steps: "),
        ("steps=0", "steps: "),
        ("steps", "key=value"),
        ("steps.deep=1", "'steps' is a value"),
        ("model.prompts=long", "'full'"),
        ("policy.layout.sequence=true", "policy.layout.tensor > 1"),
        ("policy.optimizer.overlap=true", "policy.optimizer.distributed"),
        ("policy.optimizer.cpu_offload=true", "policy.optimizer.distributed=true"),
        ("policy.fp8=blockwise", "policy.dtype=bfloat16"),
        ("policy.fp8=e4m3", "'delayed'"),
        ("selfplay.verifier_agreement=[0.9, 0.5]", "lower bound"),
        ("selfplay.memory_range=[1, 0]", "selfplay.memory_range: the lower bound"),
        ("selfplay.verifier_share=-1", "selfplay.verifier_share: "),
        ("selfplay.sampling.temperature=0", "selfplay.sampling.temperature: "),
        ("rollout.kv_cache_mib=-5", "rollout.kv_cache_mib: "),
        ("policy.loss.importance_cap=-1", "policy.loss.importance_cap: "),
        ("policy.layout.virtual_pipeline=0", "policy.layout.virtual_pipeline: "),
        ("policy.optimizer.betas=[0.9, 1.0]", "policy.optimizer.betas.1: "),
        ("policy.optimizer.min_lr=1", "policy.optimizer.min_lr"),
        ("heldout.limit=-1", "heldout.limit: "),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("toy", [override])
    assert hint in str(error.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'toy'"):
        load_config("toyy")


@pytest.mark.parametrize("text", ["- a list", "{broken", "steps: [1"])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_config(str(path))


UNBOUNDED = {"seed", "heldout.seed"}
"""Any integer is a seed."""


def numbers(section: type, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a section whose values are numbers, or pairs of them."""
    for name, field in section.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(field.annotation):
            yield from numbers(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif field.annotation is not bool and {int, float} & parts(field.annotation):
            yield prefix + name, field


def parts(kind: object) -> set[object]:
    """The types that an annotation is made of; those of mappings are somebody else's keys."""
    if get_origin(kind) in (dict, Literal):
        return set()
    return {kind, *(part for inner in get_args(kind) for part in parts(inner))}


def test_every_number_has_a_range() -> None:
    found = dict(numbers(Config))
    assert len(found) > 60
    for key in found.keys() - UNBOUNDED:
        path, values = key.split("."), [10**9, -(10**9)]
        refused = []
        for value in values:
            pair = "[{0}, {0}]" if "tuple" in str(found[key].annotation) else "{0}"
            try:
                load_config("toy", [f"{key}={pair.format(value)}"])
            except ConfigError as error:
                refused.append(f"  {'.'.join(path)}" in str(error))
        assert any(refused), f"{key} takes any number: give it a range"


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_no_number_is_infinite(value: str) -> None:
    for key, field in numbers(Config):
        if float in parts(field.annotation) and "tuple" not in str(field.annotation):
            with pytest.raises(ConfigError, match=key):
                load_config("toy", [f"{key}={value}"])
