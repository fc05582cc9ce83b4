"""The table of experiments: what is run, how the roles are measured, and the figures' arithmetic."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import experiments
from spell_megatron.config import load_config
from spell_megatron.corpus import hard
from spell_megatron.corpus.worlds import WORLDS
from spell_megatron.selfplay.episode import Episode, Response
from spell_megatron.types import Question, Rollout

pytestmark = pytest.mark.unit

WORLD = WORLDS["hard-small"]


def episode(index: int, question: Question | None, *responses: tuple[str, int | None, float]) -> Episode:
    rollout = Rollout([1], [2], [-0.1], "stop", 0)
    return Episode(
        1,
        0,
        index,
        WORLD.cluster(0, index).id,
        "hard-small",
        "doc_general_qa",
        8,
        question=question,
        responses=tuple(
            Response(rollout, text, None, rule, verdict=verdict) for text, verdict, rule in responses
        ),
    )


def test_every_variant_is_a_configuration() -> None:
    configs = {name: load_config("hard", overrides) for name, overrides in experiments.ALL.items()}
    assert len(set(map(repr, configs.values()))) == len(configs)
    assert set(experiments.ASKED_FOR) <= set(configs)


def test_roles_are_measured_against_the_truth() -> None:
    cluster = WORLD.cluster(0, 0)
    asked = hard.ask(
        cluster.documents, "doc_general_qa", random.Random(0), links=2, kind="value", paraphrased=0
    )
    assert asked is not None
    true, value = asked.question, asked.question.answer
    false = replace(true, answer="Nobody Atall")
    unknown = replace(true, text="What is the colour of the moon?")
    right, wrong = f"The correct answer is {value}.", "The correct answer is Nobody Atall."
    found = experiments.roles(
        [
            episode(0, true, (right, 1, 1.0), (wrong, 1, 0.0)),
            replace(episode(0, false, (right, 1, 0.0), (wrong, None, 1.0)), outcome="kept"),
            episode(0, unknown, (right, 0, 0.0)),
            episode(0, None),
        ]
    )
    assert found == {
        "valid": 3 / 4,
        "understood": 2 / 3,
        "true": 1 / 3,
        "trained": 0.0,
        "links": 2.0,
        "documents": asked.solution.documents,
        "verifier": 2 / 3,
        "rule": 1 / 2,
    }


def row(variant: str, seed: int, after: float) -> dict[str, Any]:
    names = (
        "mean",
        "links/1",
        "links/2",
        "links/3",
        "links/4",
        "length/1x",
        "length/2x",
        "length/4x",
        "best/mean",
        *(f"best/links/{links}" for links in range(1, 5)),
    )
    role = {"valid": 0.5, "true": after}
    return {
        "variant": variant,
        "seed": seed,
        "heldout": {
            "0": dict.fromkeys(names, 0.2),
            "10": dict.fromkeys(names, 0.9),
            "20": dict.fromkeys(names, after),
        },
        "roles": {"first": role, "last": role},
        "generated": 1e6,
        "seconds": 60.0,
    }


def test_variants_are_compared_with_spell_seed_by_seed() -> None:
    rows = [row("spell", seed, 0.6 + seed / 10) for seed in range(3)]
    rows += [row("no-memory", seed, 0.5 + seed / 10) for seed in range(3)]
    summary = experiments.summarise(rows)
    assert summary["spell"]["after"]["best/mean"] == pytest.approx(0.7)
    assert summary["spell"]["difference"]["links/3"]["mean"] == pytest.approx(0.5)
    pair = summary["no-memory"]["against_spell"]["mean"]
    assert (pair["mean"], pair["half_width"]) == (pytest.approx(-0.1), pytest.approx(0.0, abs=1e-9))
    assert summary["spell"]["roles"]["last"]["true"] == pytest.approx(0.7)
    assert len(experiments.tables(summary)) == 3


def test_two_links_and_more_are_the_mean_of_their_kinds() -> None:
    rows = [row("spell", seed, 0.2) for seed in range(3)]
    for made in rows:
        made["heldout"]["20"] |= {"links/1": 1.0, "links/2": 0.5, "links/3": 0.4, "links/4": 0.3}
        made["heldout"]["20"] |= {"best/links/2": 0.9, "best/links/3": 0.5, "best/links/4": 0.4}
    change = experiments.summarise(rows)["spell"]["difference"]
    assert change["links/2+"]["mean"] == pytest.approx(0.4 - 0.2)
    assert change["best/links/2+"]["mean"] == pytest.approx(0.6 - 0.2)
