"""Recipes and overrides: what is accepted, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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
        ("selfplay.judge=false", "train_verifier"),
        ("selfplay.verifier_agreement=[0.9, 0.5]", "lower bound"),
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
