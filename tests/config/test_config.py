"""Recipes and overrides: what is accepted, and what a mistake is answered with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from spell_megatron.base.secret import names_secret
from spell_megatron.config import (
    RECIPES,
    Config,
    ConfigError,
    dump_config,
    load_config,
    parse_config,
    untrainable,
)
from spell_megatron.config.reading import override
from spell_megatron.config.yamltext import load_yaml

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


def test_a_recipe_inherits_several_and_the_later_have_the_say(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("steps: 7\nselfplay: {sampling: {responder_tokens: 99}}\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("inherit: [toy, long]\nselfplay: {questions: 5}\n")
    config, base = load_config(str(mine)), load_config("toy")
    assert (config.steps, config.selfplay.questions) == (7, 5)
    assert config.selfplay.sampling == replace(base.selfplay.sampling, responder_tokens=99)
    mine.write_text("inherit: {toy: 1}\n")
    with pytest.raises(ConfigError, match=r"inherit is a recipe's name, or a list of names"):
        load_config(str(mine))


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
        ("policy.layout.sequence=true", "policy.layout.tensor > 1"),
        ("policy.optimizer.overlap=true", "policy.optimizer.distributed"),
        ("policy.optimizer.cpu_offload=true", "policy.optimizer.distributed=true"),
        ("policy.fp8=blockwise", "policy.dtype=bfloat16"),
        ("policy.recompute_layers=2", "policy.recompute=all_but_attention"),
        ("policy={recompute: full, offload_layers: 1}", "set policy.recompute_layers"),
        ("policy={dtype: bfloat16, fp8: delayed, offload_layers: 1}", "leave one of them out"),
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


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("policy.stream_tokens=256", "rollout.max_model_len"),
        ("policy.optimizer={decay_steps: 4, warmup_steps: 4, min_lr: 1e-7}", "ends before warmup_steps=4"),
        ("policy.optimizer.decay_steps=4", "steps=20 goes on"),
        ("policy.optimizer.min_lr=1e-7", "set policy.optimizer.decay_steps"),
        ("record={checkpoint_every: 10, keep_every: 25}", "a multiple"),
        ("record={checkpoint_every: 0, keep_every: 5}", "a multiple"),
        ("selfplay.combine=sum", "selfplay.combine=mean"),
        ("selfplay.group_size=2", "raise selfplay.group_size"),
        ("selfplay={group_size: 6, verifier_agreement: [0.9, 0.95]}", "widen the bounds"),
    ],
)
def test_what_no_run_should_begin_with_can_be_read_all_the_same(override: str, hint: str) -> None:
    """The folder of a run that was begun with it is watched, exported and reported."""
    assert hint in untrainable(load_config("toy", ["steps=20", override]))
    assert untrainable(load_config("toy")) == ""


@pytest.mark.parametrize(
    "changes",
    [
        ["selfplay.train_verifier=false"],
        ["selfplay.vote_tie=first", "selfplay.verifier_agreement=[0.5, 0.5]"],
        ["selfplay.verdict=first", "selfplay.verifier_agreement=[0.5, 0.6]"],
        ["selfplay.verifier_agreement=[0.5, 1.0]"],
    ],
)
def test_two_votes_that_can_teach_the_verifier_are_no_fault(changes: list[str]) -> None:
    assert untrainable(load_config("toy", ["selfplay.group_size=2", *changes])) == ""


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


def of(overrides: list[str]) -> Config:
    """The defaults with overrides: no file is read."""
    values: dict[str, Any] = {}
    for text in overrides:
        override(Config, values, text)
    return parse_config(values)


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1).map(
    str.strip
)
"""What a shell can hand over, without blanks around."""
# fmt: off
LOOKALIKES = st.sampled_from([
    "no", "on", "yes", "off", "y", "n", "true", "null", "~", "012", "1_000", "0x10", "0o17", "0b1", "12:30:00", "1:30",
    "1e3", "1.10", ".5", ".inf", "2025-01-01", "=", "<<", "@x", "[a]", "{a", "*x", "&x", "!x", "%x", "|x", ">x", "a:b",
    "#x", "?", "-", "---", "'x", '"x', "x'", "-1", "a: b #c",
])
# fmt: on
"""What YAML makes something else of, or nothing."""


@settings(max_examples=40)
@given(value=(TEXTS | LOOKALIKES).filter(lambda text: text[:1] not in ("'", '"', "~", "")))
def test_a_text_is_what_was_written(value: str) -> None:
    listed = yaml.safe_dump(value, default_style='"', width=10_000)
    config = of([f"record.wandb={value}", f"model.path={value}", f"corpus.sources=[{{domain: {listed}}}]"])
    assert config.record.wandb == config.model.path == config.corpus.sources[0].domain == value
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@settings(max_examples=40)
@given(value=LOOKALIKES.filter(lambda text: re.fullmatch(r"[\w.:-]*\w", text)))
def test_a_text_in_a_file_needs_no_quotes(tmp_path_factory: pytest.TempPathFactory, value: str) -> None:
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(f"inherit: toy\nrecord: {{wandb: {value}, }}\nname: {value}\n", encoding="utf-8")
    config = load_config(str(path))
    assert config.record.wandb == config.name == value


@settings(max_examples=40)
@given(value=st.integers(1, 10**12), zeros=st.integers(0, 3))
def test_an_integer_is_decimal(value: int, zeros: int) -> None:
    for text in ("0" * zeros + str(value), f"{value:_}", f"+{value}"):
        assert of([f"corpus.toy_clusters={text}"]).corpus.toy_clusters == value


@settings(max_examples=40)
@given(value=LOOKALIKES | st.from_regex(r"[0-9]{1,2}(:[0-5][0-9]){1,2}|0[xob][0-9a-f]{1,4}", fullmatch=True))
def test_nothing_else_is_an_integer(value: str) -> None:
    try:
        steps = of([f"steps={value}"]).steps
    except ConfigError:
        return
    assert steps == int(value)


SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | TEXTS | LOOKALIKES


@settings(max_examples=40)
@given(
    engine=st.dictionaries(
        TEXTS.filter(lambda name: not names_secret(name)),
        st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)),
    )
)
def test_where_anything_may_stand_it_survives_a_round_trip(engine: dict[str, object]) -> None:
    config = parse_config({"rollout": {"engine": engine}})
    assert config.rollout.engine == engine
    assert load_text(dump_config(config)) == config


def load_text(text: str) -> Config:
    return parse_config(load_yaml(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("012", 12), ("true", True), ("1e3", 1000.0), ("'1'", "1"), ("~", None), ("1:30", "1:30")],
)
def test_where_no_type_says_what_it_is_a_value_is_of_yaml_1_2(text: str, value: object) -> None:
    assert of([f"rollout.engine.depth={text}"]).rollout.engine == {"depth": value}


def keys(section: type, prefix: str = "") -> Iterator[str]:
    for name, field in section.__pydantic_fields__.items():  # type: ignore[attr-defined]
        inner = dataclasses.is_dataclass(field.annotation)
        yield from keys(field.annotation, f"{prefix}{name}.") if inner else (prefix + name,)


def test_every_refusal_shows_how_to_write_the_key() -> None:
    for key in keys(Config):
        for value in ("{a: [", "[[x]]", "-1", "{1: 2}", ""):
            try:
                of([f"{key}={value}"])
            except ConfigError as error:
                message = str(error)
                assert f"written {key}=" in message or "not YAML" in message or "contradicts" in message, (
                    message
                )


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("corpus.sources=[toy]", "corpus.sources=[{path: toy}]"),
        ("corpus.sources.0.path=x", "corpus.sources=[{path: toy}]"),
        ("corpus.sources=", "name one at least"),
        ("corpus.sources=[{path}]", "a source without a path"),
        ("corpus.sources=[{path: hard, tasks: []}]", "without tasks"),
        ("heldout.benchmarks=docmath", "heldout.benchmarks=[docmath]"),
        ("policy.optimizer=", "policy.optimizer.lr=…"),
        ("policy.loss.importance_cap=None", "1.0 or null"),
        ("selfplay.temperature=1", "did you mean 'selfplay.sampling.temperature'"),
        ("model.path=~nobody-here/x", "write it out"),
    ],
)
def test_a_refusal_shows_how(override: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("toy", [override])
    assert hint in str(error.value)


def test_the_home_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config("toy", ["runs=~/runs", "corpus.sources=[{path: ~/texts}]", "record.wandb=~/x"])
    assert (config.runs, config.corpus.sources[0].path) == ("/home/me/runs", "/home/me/texts")
    assert config.record.wandb == "~/x"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a": "inherit: b", "b": "inherit: a"}, "in a circle"),
        ({"a": "inherit: {b: c}"}, "a recipe's name, or a list of names"),
        ({"a": "inherit: nowhere"}, "no recipe 'nowhere'"),
        ({"a": "steps: 3\nsteps: 4"}, "twice"),
        ({"a": "policy.optimizer.lr: 1"}, "policy: {optimizer: {lr: …}}"),
        ({"a": "[x]: 3"}, "a key is a text"),
        ({"a": "steps: [" * 3000}, "nested too deeply"),
        ({"a": "1: 3"}, "unknown key '1'"),
    ],
)
def test_a_recipe_that_cannot_be_followed(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path / "a.yaml"))
    assert said in str(error.value)


def test_a_recipe_may_stand_in_for_the_shipped_one_that_it_inherits(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text("\ufeffinherit: toy\nsteps: 2\npolicy:\nselfplay:\n", encoding="utf-8")
    assert load_config(str(path)) == dataclasses.replace(load_config("toy"), steps=2)
    (tmp_path / "over.yaml").write_text("inherit: toy.yaml\n", encoding="utf-8")
    assert load_config(str(tmp_path / "over.yaml")).steps == 2


def test_aliases_within_aliases_come_to_an_end(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    nine = ", ".join(["*{0}"] * 9)
    for first, layer in (("[x]", f"[{nine}]"), ("{{a: 1}}", f"{{{{<<: [{nine}]}}}}")):
        names = "abcdefghijklmnop"
        lines = [f"a: &a {first.format('')}"]
        lines += [f"{name}: &{name} {layer.format(below)}" for below, name in pairwise(names)]
        recipe.write_text("\n".join(lines))
        with pytest.raises(ConfigError, match=r"values, with each alias|is not a valid configuration"):
            load_config(str(recipe))


def test_anchors_are_shared_but_not_their_changes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "policy: {optimizer: &o {lr: 1e-5}}\nrollout: {engine: {a: *o, b: {<<: *o, eps: 1}}}\n",
        encoding="utf-8",
    )
    config = load_config(str(path), ["policy.optimizer.lr=2e-5"])
    assert config.policy.optimizer.lr == 2e-5
    assert config.rollout.engine == {"a": {"lr": 1e-5}, "b": {"lr": 1e-5, "eps": 1}}
