"""What seed models are taught from: true where it should be, and half-competent by the shares that are asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spell_megatron.corpus.demonstrations import CLEAN, Demonstrations, Habits, Transcript
from spell_megatron.corpus.hard import reach
from spell_megatron.corpus.hard.transcripts import SMALL_DEMONSTRATIONS
from spell_megatron.corpus.toy import DEMONSTRATIONS, toy_cluster
from spell_megatron.corpus.worlds import WORLDS
from spell_megatron.selfplay.grading import rule_reward
from spell_megatron.selfplay.parsing import parse_question, parse_verdict
from spell_megatron.types import Question

pytestmark = pytest.mark.unit

SHOWN = pytest.mark.parametrize("shown", [DEMONSTRATIONS, SMALL_DEMONSTRATIONS], ids=lambda shown: shown.name)


def is_hasty(answer: Transcript) -> bool:
    """Whether it begins with the answer's sentence: nothing was looked up."""
    return answer.reply.startswith(("The correct answer is", "Therefore"))


@SHOWN
def test_clean_ones_are_read_and_graded_as_right(shown: Demonstrations) -> None:
    habits = replace(CLEAN, spelled=0.0, long_reference=0.0, hops=0.6)
    world = WORLDS[shown.name]
    for index in range(40):
        cluster = shown.cluster(2, index, shown.whole)
        for exchange in shown.transcripts(2, index, habits=habits):
            if exchange.role == "questioner":
                question = parse_question(exchange.reply, exchange.task, exchange.variables["key"] or None)
                assert isinstance(question, Question), exchange.reply
                assert world.truth(cluster, question) == world.plain(question.answer)
            elif exchange.role == "verifier":
                given = [world.plain(exchange.variables[name]) for name in ("answer", "reference")]
                assert parse_verdict(exchange.reply) == (given[0] == given[1])
            elif exchange.variables["documents"]:
                assert rule_reward(exchange.task, exchange.reply, exchange.variables["question"]) == 1


@SHOWN
def test_without_documents_nothing_is_answered(shown: Demonstrations) -> None:
    empty = [
        exchange
        for index in range(30)
        for exchange in shown.transcripts(2, index, habits=Habits())
        if exchange.role == "responder" and not exchange.variables["documents"]
    ]
    assert empty
    assert all(rule_reward(e.task, e.reply, e.variables["question"]) == 0 for e in empty)


@pytest.mark.long
@SHOWN
def test_habits_have_their_shares(shown: Demonstrations) -> None:
    habits = Habits(hasty=0.5, slip=0.2, spelled=0.0, wrong_verdict=0.2)
    exchanges = [e for index in range(300) for e in shown.transcripts(3, index, habits=habits)]
    answers = [e for e in exchanges if e.role == "responder" and e.variables["documents"]]
    hasty = [e for e in answers if is_hasty(e)]
    assert len(hasty) / len(answers) == pytest.approx(0.5, abs=0.03)
    careful = [e for e in answers if e not in hasty]
    right = sum(rule_reward(e.task, e.reply, e.variables["question"]) for e in careful)
    assert right / len(careful) == pytest.approx(0.8, abs=0.03)
    verdicts = [e for e in exchanges if e.role == "verifier"]
    wrong = [
        e
        for e in verdicts
        if parse_verdict(e.reply)
        != (shown.plain(e.variables["answer"]) == shown.plain(e.variables["reference"]))
    ]
    assert len(wrong) / len(verdicts) == pytest.approx(0.2, abs=0.04)


def test_haste_grows_with_the_facts_that_an_answer_takes() -> None:
    habits = Habits(hasty=0.2, hasty_further=0.5, spelled=0.0, hops=0.6)
    hasty: dict[int, list[bool]] = {1: [], 2: [], 3: []}
    for index in range(250):
        cluster = SMALL_DEMONSTRATIONS.cluster(3, index, SMALL_DEMONSTRATIONS.whole)
        for exchange in SMALL_DEMONSTRATIONS.transcripts(3, index, habits=habits):
            if exchange.role == "responder" and exchange.variables["documents"]:
                found = reach(cluster, exchange.variables["question"])
                assert found is not None
                if len(found.steps) in hasty:
                    hasty[len(found.steps)].append(is_hasty(exchange))
    shares = [sum(guesses) / len(guesses) for guesses in hasty.values()]
    assert shares == pytest.approx([0.2, 0.6, 0.8], abs=0.08)


@SHOWN
def test_restated_facts_are_those_of_the_documents(shown: Demonstrations) -> None:
    documents, facts = shown.restated(0, 0)
    assert documents == shown.cluster(0, 0, shown.whole).documents
    assert sorted(facts) == sorted(shown.quotes(documents)), "the same in another order"
    assert facts != shown.quotes(documents)
    said = " ".join(document.text for document in documents)
    for fact, value in facts:
        assert value in fact
        assert value in said


def test_every_fact_of_the_toy_world_is_restated() -> None:
    documents, facts = DEMONSTRATIONS.restated(0, 0)
    assert documents == toy_cluster(0, 0).documents
    assert len(facts) == sum(document.text.count(".") for document in documents)
