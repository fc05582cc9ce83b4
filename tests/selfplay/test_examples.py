"""What a user adds without a fork: a role, a task, an advantage, a loss of their own, each in its two small files."""

from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from cispo import CISPO
from failures import FAILURES
from places import ROOT
from selfplay_stage import Corpus, Engine, act, role_of, selfplay, settings
from summariser import Summariser
from table import NO_CELL

from spell_megatron.config import ConfigError, LossConfig, load_config
from spell_megatron.policy.loss import SURROGATES, Surrogate, TokenTerms, token_losses
from spell_megatron.rollout.kinds import ENGINES
from spell_megatron.run.record import RunFolder, read_metrics
from spell_megatron.run.train import train
from spell_megatron.selfplay import Prompts, prompts_of, step_metrics
from spell_megatron.selfplay.advantages import ADVANTAGES, standardise_by
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.grading import rule_reward
from spell_megatron.selfplay.parsing import parse_question
from spell_megatron.selfplay.roles import ROLES
from spell_megatron.selfplay.tasks import TASKS
from spell_megatron.types import Question, SpellError

EXAMPLES = ROOT / "examples"


@pytest.mark.unit
@pytest.mark.parametrize("recipe", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_two_small_files_and_its_recipe_is_valid(recipe: Path) -> None:
    assert prompts_of(load_config(str(recipe)))
    lines = [
        line for path in EXAMPLES.glob(f"{recipe.stem}.*") for line in path.read_text("utf-8").splitlines()
    ]
    assert len(lines) <= 120
    assert len(list(EXAMPLES.glob(f"{recipe.stem}.*"))) == 2


@pytest.mark.unit
def test_the_names_that_a_recipe_may_use_are_those_of_the_records() -> None:
    """The configuration cannot ask the rooms upstairs; each of its names has a record there, and the other way."""
    shipped = {
        "corpus.sources": (TASKS, "corpus.sources=[{tasks: [%s]}]"),
        "selfplay.roles": (ROLES, "selfplay.roles=[%s, responder]"),
        "selfplay.advantage": (ADVANTAGES, "selfplay.advantage=%s"),
        "policy.loss.surrogate": (SURROGATES, "policy.loss.surrogate=%s"),
        "rollout.kind": (ENGINES, "rollout.kind=%s"),
    }
    for key, (registry, override) in shipped.items():
        for name in registry.shipped:
            load_config("toy", [override % name])
        with pytest.raises(ConfigError, match="and your own by its import path") as error:
            load_config("toy", [override % (registry.shipped[0] + "x")])
        assert f"did you mean {registry.shipped[0]!r}" in str(error.value), key
        said = str(error.value).partition("there are ")[2].partition(", and your own")[0]
        assert set(said.split(", ")) == set(registry.shipped), key


@pytest.mark.unit
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["corpus.sources=[{tasks: ['table:Tabel']}]"], "did you mean 'Table'"),
        (["selfplay.roles=[questioner, 'table:Table', responder]"], "of type spell_megatron.selfplay.roles"),
        (["selfplay.roles=[questioner, verifier]"], "the responder is one of them"),
        (["selfplay.roles=[responder, questioner, responder]"], "each role plays once"),
        (["selfplay.roles=[responder, questioner]"], "the responder needs a question"),
        (["selfplay.roles=[responder, verifier]"], "the responder needs a question"),
        (["selfplay.roles=[questioner, verifier, responder]"], "and the verifier its answers"),
        (["selfplay.roles=['test_examples:Impostor', responder]"], "calls itself 'responder'"),
    ],
)
def test_what_is_no_record_is_refused_at_the_start(overrides: list[str], said: str) -> None:
    with pytest.raises(SpellError, match=said.replace("(", r"\(")):
        prompts_of(load_config("toy", overrides))


class Impostor(Summariser):
    name = "responder"


ANOTHER = Surrogate("cispo", CISPO.compute, metrics=("clipped",))


@pytest.mark.unit
def test_an_own_record_is_one_and_no_other_has_its_name() -> None:
    """A task is asked for with every question: what its path leads to is made once."""
    key = "corpus.sources.tasks"
    assert TASKS.find("table:Table", key) is TASKS.find("table:Table", key) is TASKS["table"]
    assert SURROGATES.find("cispo:CISPO", "policy.loss.surrogate") is CISPO
    with pytest.raises(SpellError, match="calls itself 'cispo', and so does another loss"):
        SURROGATES.find("test_examples:ANOTHER", "policy.loss.surrogate")


@pytest.mark.unit
def test_a_question_of_the_users_task_is_parsed_and_graded_by_it() -> None:
    TASKS.find("table:Table", "corpus.sources.tasks")

    def parsed(text: str) -> Any:
        return parse_question(json.dumps({"question": text, "answer": "goat"}), "table", examples=())

    question = parsed("What is the pet of Nora?")
    assert question == Question("table", "What is the pet of Nora?", "goat")
    assert parsed("Who keeps a goat?") == NO_CELL
    assert rule_reward("table", "The correct answer is (Goat).", question) == 1.0
    assert rule_reward("table", "The correct answer is (a goat or a cat).", question) == 0.0
    free = Question("doc_general_qa", question.text, "goat")
    assert rule_reward("doc_general_qa", "The correct answer is (a goat or a cat).", free) == 1.0
    asked = prompts_of(load_config(str(EXAMPLES / "table.yaml"))).questioner("table", ())
    assert asked == Prompts("short").questioner("doc_general_qa", ())


@pytest.mark.unit
def test_the_users_role_is_read_paid_compared_and_trained_on() -> None:
    summary = "In short: it is orange, or so they say."
    read: list[str] = []

    def actor(role: str, prompt: str, draw: random.Random) -> str:
        if prompt.startswith("<text>"):
            return summary
        if role_of(prompt) == "responder" and "\nEmpty\n" not in prompt:
            read.append(prompt)
        return act(role_of(prompt), prompt, draw)

    class Company(Engine):
        def _rollout(self, prompt: Any, text: str, seed: int, limit: int) -> Any:
            said = actor("", text, random.Random(seed))
            return super()._rollout(prompt, text, seed, limit) if said != summary else self._said(prompt)

        def _said(self, prompt: Any) -> Any:
            from spell_megatron.types import Rollout

            return Rollout(list(prompt), [ord(c) for c in summary], [-0.5] * len(summary), "stop", 7)

    roles = ("questioner", "summariser:Summariser", "responder", "verifier")
    prompts = Prompts("full", more=Summariser.templates)
    playing = selfplay(settings(roles=roles), prompts=prompts, generator=Company(), clusters=Corpus())
    play = asyncio.run(playing.play(0))
    kept = [episode for episode in play.episodes if episode.kept]
    assert all(summary in prompt for prompt in read)
    assert {name for episode in kept for name, _ in episode.rollouts()} == {
        *("questioner", "summariser", "responder", "verifier")
    }
    turns = [episode.turns[0] for episode in kept]
    assert [turn.reward for turn in turns] == [episode.mean_reward for episode in kept]
    groups = [
        group
        for group, role in zip(play.batch.train.groups, play.batch.roles, strict=True)
        if role == "summariser"
    ]
    expected = standardise_by([e.task for e in kept], [e.mean_reward for e in kept])
    assert [group.samples[0].weights[0] for group in groups] == pytest.approx(expected)
    assert step_metrics(play)["summariser/length"] == len(summary)
    assert step_metrics(play)["batch/summariser_samples"] == len(kept)
    assert all(Episode.from_dict(json.loads(json.dumps(e.to_dict()))) == e for e in play.episodes)


@pytest.mark.unit
def test_cispo_is_its_formula_and_no_token_loses_its_gradient() -> None:
    logprobs = torch.tensor([-0.1, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    old, weights = torch.tensor([-0.1, -3.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 2.0, -1.0])
    terms = TokenTerms(logprobs=logprobs, entropy=torch.zeros(3), weights=weights, old=old)
    losses, clipped = token_losses(terms, LossConfig(clip_high=0.5), CISPO)
    losses.sum().backward()
    ratios = [1.0, 1.5, math.exp(-2.0)]
    expected = [-w * r for w, r in zip([1.0, 2.0, -1.0], ratios, strict=True)]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(expected)
    assert clipped.tolist() == [False, True, False]


@pytest.mark.unit
def test_failures_teach_ten_times_what_successes_do() -> None:
    found = FAILURES.compare([1.0, 0.0, 0.0, 0.0, 1.0, 1.0], [*"aaaabb"], [*"aaaabb"])
    # A mean of 1/4 and a standard deviation of 1/2; the other group is flat.
    assert found.values == pytest.approx([0.15, -0.5, -0.5, -0.5, 0.0, 0.0], abs=1e-5)


@pytest.mark.engine
def test_all_of_them_train_together_in_the_toy_world(tmp_path: Path) -> None:
    overrides = [
        *("steps=1", "selfplay.questions=6", "selfplay.round_questions=24", "selfplay.group_size=4"),
        *("heldout.questions=6", "heldout.samples=1", "rollout.kv_cache_mib=64", f"runs={tmp_path}"),
        "corpus.sources=[{tasks: [doc_general_qa, 'table:Table']}]",
        "selfplay.roles=[questioner, 'summariser:Summariser', responder, verifier]",
        *(
            "policy.loss.surrogate=cispo:CISPO",
            "policy.minibatches=2",
            "selfplay.advantage=failures:FAILURES",
        ),
    ]
    run = Path(train(load_config("toy", overrides)).run_dir)
    rows = read_metrics(RunFolder(run))
    assert rows[-1]["batch/summariser_samples"] == 6
    assert rows[-1]["responder/reward/table"] is not None
    assert 0 <= (rows[-1]["policy/clipped"] or 0.0) <= 1
    report = (run / "report.html").read_text("utf-8")
    assert "table cell" in report
    assert "What the summariser wrote" in report
