"""What goes beyond the paper: each option by hand, and in whole steps of self-play; off where not asked for."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import statistics
from dataclasses import replace

import pytest
from selfplay_stage import Actor, Corpus, Engine, act, cluster, episode, response, selfplay, settings

from spell_megatron.config import BeyondConfig, ConfigError, StageConfig, load_config
from spell_megatron.selfplay import Play, step_metrics
from spell_megatron.selfplay.advantages import standardise_by
from spell_megatron.selfplay.baselines import DECAY, Baselines
from spell_megatron.selfplay.batch import compose
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.evidence import evidence_score, named, numbered
from spell_megatron.selfplay.gating import sampled_entropy, without_negatives
from spell_megatron.selfplay.lookup import quotes, states
from spell_megatron.selfplay.memory import Remembered
from spell_megatron.selfplay.novelty import distinct_share, novelties, novelty
from spell_megatron.selfplay.outvoting import outvoted
from spell_megatron.selfplay.probes import UNANSWERABLE, probed_documents
from spell_megatron.selfplay.stages import staged, tokens_at
from spell_megatron.types import Document, Group, Question, Sample, TrainBatch

pytestmark = pytest.mark.unit
STD = math.sqrt(1 / 3)  # of two ones and two zeros, with n - 1


def play(generator: Engine | None = None, corpus: Corpus | None = None, changes=None, **beyond) -> Play:
    chosen = settings(beyond=BeyondConfig(**beyond), **(changes or {}))
    room = selfplay(chosen, generator=generator or Engine(), clusters=corpus or Corpus())
    return asyncio.run(room.play(0))


def asked_by(actor: Actor, **beyond) -> list[Episode]:
    """Episodes of one task; a malformed question earns -0.7."""
    room = Engine(actor), Corpus(tasks=["doc_general_qa"]), {"bad_format_reward": -0.7}
    return list(play(*room, **beyond).episodes)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The correct answer is (x).\nEvidence: [1, 3]", 1.0),
        ("**Evidence:** [1,2, 3, 4]", 2 * 2 / (4 + 2)),
        ("Evidence: [2]. No, evidence: [1]", 2 / 3),
        ("Evidence: [9, 99999]", 0.0),
        ("Evidence: []", 0.0),
        ("The answer is in document 1.", 0.0),
        ("Evidence: [" + "1," * 5000 + "]", 0.0),
        ("<think>Evidence: [1, 3] so", 0.0),
        ("<think>Evidence: [1, 3]</think> The correct answer is (x).", 0.0),
        ("<think>Evidence: [2]</think> Evidence: [1, 3]", 1.0),
    ],
)
def test_evidence_is_graded_by_what_the_questioner_read(text: str, score: float):
    assert evidence_score(text, (0, 2)) == pytest.approx(score)


def test_documents_bear_the_numbers_that_are_named():
    shown = numbered(cluster(0, 3).documents)
    assert [document.text.splitlines()[0] for document in shown] == [f"[Document {n}]" for n in (1, 2, 3)]
    assert named("Evidence: [1, 3]") == {0, 2}


def test_evidence_counts_in_advantages_alone():
    """Two right and two wrong answers; of each pair one names the evidence. By hand: 1.5, 1, 0.5, 0."""
    answers = [
        replace(response(rule), text=text) for rule in (1.0, 0.0) for text in ("Evidence: [1, 2]", "-")
    ]
    made = [episode(0, responses=answers)]
    weights = {}
    for weight in (0.0, 0.5):
        chosen = settings(
            questions=1, failure_ratio=0.0, train_questioner=False, beyond=BeyondConfig(evidence=weight)
        )
        [group] = compose(made, chosen, random.Random(0)).train.groups
        weights[weight] = [sample.weights[0] for sample in group.samples]
    assert weights[0.0] == pytest.approx([0.5 / STD, 0.5 / STD, -0.5 / STD, -0.5 / STD], abs=1e-5)
    worth = [1.5, 1.0, 0.5, 0.0]
    std = statistics.stdev(worth)
    assert weights[0.5] == pytest.approx([(w - 0.75) / std for w in worth], abs=1e-5)


def test_a_response_that_was_cut_earns_nothing_by_its_evidence():
    made = [replace(response(0.0), text="Evidence: [1, 2]"), replace(response(1.0), text="-")]
    cut = replace(made[0], rollout=replace(made[0].rollout, finish="length"))
    chosen = settings(
        questions=1, failure_ratio=0.0, train_questioner=False, beyond=BeyondConfig(evidence=2.0)
    )
    for first, best in ((made[0], 0), (cut, 1)):  # 2 against 1, and 0 against 1
        [group] = compose([episode(0, responses=[first, made[1]])], chosen, random.Random(0)).train.groups
        weights = [sample.weights[0] for sample in group.samples]
        assert weights.index(max(weights)) == best


def test_evidence_is_asked_for_only_where_it_counts():
    prompts: list[str] = []

    def actor(role, prompt, draw):
        if role == "responder":
            prompts.append(prompt)
        return act(role, prompt, draw)

    play(Engine(actor), evidence=0.3)
    with_documents = [prompt for prompt in prompts if "\nEmpty\n" not in prompt]
    assert all("[Document 8]" in prompt and prompt.endswith("[1, 4]") for prompt in with_documents)
    assert all("Evidence" not in prompt for prompt in prompts if "\nEmpty\n" in prompt)
    prompts.clear()
    play(Engine(actor))
    assert not any("Evidence" in prompt or "[Document" in prompt for prompt in prompts)


def test_a_question_that_its_own_documents_do_not_answer_is_dropped():
    def actor(role, prompt, draw):
        # Short of documents (three read, two distractors of eight) nobody finds out of some clusters.
        few = role == "responder" and "\nEmpty\n" not in prompt and prompt.count("Fact ") < 8
        if few and "of cluster 1" in prompt:
            return "No idea."
        return "The correct answer is (orange)." if few else act(role, prompt, draw)

    result = play(Engine(actor), Corpus(4, tasks=["doc_general_qa"]), answerability=2)
    read = {e.outcome == UNANSWERABLE: e for e in result.episodes if e.answerability}
    assert set(read) == {True, False}
    for one in result.episodes:
        assert (one.outcome == UNANSWERABLE) == (one.answerability is not None and one.cluster == "c1")
        if one.answerability:
            assert "".join(map(chr, one.answerability.rollout.prompt)).count("Fact ") == 5
            assert one.probe
    assert read[True].reward is None
    assert not read[True].responses
    assert tuple(Episode.from_dict(e.to_dict()) for e in result.episodes) == result.episodes
    assert 0 < step_metrics(result)["questioner/unanswerable"] < 1
    assert all(e.answerability is None for e in play().episodes)


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([("Rome", 0), ("rome.", 0), ("the Rome", 0), ("Oslo", 1)], True),
        ([("Rome", 0), ("Rome", 0), ("Oslo", 1), ("Oslo", 1)], False),  # a half is no majority
        ([("Rome", 1), ("Rome", 1), ("Rome", 1), ("Oslo", 0)], False),
        (
            [("Rome", 0), ("Rome", 0), ("Rome", 1), ("Oslo", 0)],
            False,
        ),  # a verifier said once that it is right
        ([("Rome", 0), ("Oslo", 0), ("Bern", 0), ("Nice", 0)], False),  # hard, not false
        ([(None, 0), (None, 0), (None, 0), ("Oslo", 1)], False),
    ],
)
def test_a_majority_against_the_reference_outvotes_it(answers, found: bool):
    responses = [replace(response(reward), answer=text, reward=float(reward)) for text, reward in answers]
    assert outvoted(responses, "doc_general_qa") == found
    assert outvoted(responses[::-1], "doc_general_qa") == found


@pytest.mark.parametrize(
    ("task", "answers", "found"),
    [
        ("doc_mc", "A A A B", True),
        ("doc_mc", "D D D B", True),
        ("doc_mc", "A A B B", False),
        ("docmath_qa", "1.5 15 1.5 15", False),
        ("docmath_qa", "0.5 1/2 50% 7", True),
        ("docmath_qa", "1,200 1200.0 3 4", False),
        ("docmath_qa", "1,200 1200.0 1.2e3 4", True),
        ("doc_general_qa", "A A A b", True),
        ("doc_general_qa", "Rome Rome,Italy Rome,Italy Oslo", False),
    ],
)
def test_answers_are_the_same_where_their_task_says_so(task: str, answers: str, found: bool):
    responses = [replace(response(0.0), answer=text, reward=0.0) for text in answers.split()]
    assert outvoted(responses, task) == found
    assert outvoted(responses[::-1], task) == found
    paid = [replace(one, reward=1.0) for one in responses]
    assert not outvoted(paid, task)


def test_an_outvoted_question_earns_nothing_and_is_neither_trained_on_nor_remembered():
    def actor(role, prompt, draw):
        if role == "responder" and "of cluster 1" in prompt and "\nEmpty\n" not in prompt:
            return (
                "The correct answer is (apple)."
                if draw.random() < 0.75
                else "The correct answer is (orange)."
            )
        return act(role, prompt, draw)

    def whole(**beyond):
        room = selfplay(
            settings(beyond=BeyondConfig(**beyond), judge=False),
            generator=Engine(actor),
            clusters=Corpus(2, tasks=["doc_general_qa"]),
        )
        return asyncio.run(room.play(0)), room

    result, room = whole(outvoting=True)
    against = [e for e in result.episodes if e.outcome == "outvoted"]
    assert against
    assert all(outvoted(e.responses, e.task) and e.reward == 0.0 for e in against)
    assert {e.cluster for e in against} == {"c1"}
    assert not any(e.kept and outvoted(e.responses, e.task) for e in result.episodes)
    remembered = {entry.question.text for entry in room.memory.recall("doc_general_qa", "c1")}
    assert not remembered & {e.posed.text for e in against}
    assert step_metrics(result)["outcome/outvoted"] == len(against)
    assert tuple(Episode.from_dict(e.to_dict()) for e in result.episodes) == result.episodes
    plain, _ = whole()
    assert any(e.kept and outvoted(e.responses, e.task) for e in plain.episodes), "they would have been kept"
    assert "outcome/outvoted" not in step_metrics(plain)


@pytest.mark.parametrize(
    ("before", "answer", "found"),
    [
        ("The friend of Ann is Bob Hale.", "bob hale", True),
        ("The friend of Ann is Bob Hale.", "Bob", True),
        ("The friend of Ann is Bob Hale.", "Ale", False),
        ("8 + 4 = 12.", "12", True),
        ("8 + 4 = 12.", "2", False),
        ("<think>It was in 1,204.</think>", "1204", True),
        ("巴黎是法国的首都。", "法国", True),
        ("", "Rome", False),
        ("8 + 7 = 15.", "1.5", False),
        ("8 / 16 = 0.5.", "1/2", True),
        ("It was the 12th.", "1/2", False),
        ("12, all in all.", "12.0", True),
        ("It lost 1,204.50 euros.", "-1204.5", True),
        ("A tonne is 4.5 × 10⁴.", "4.5 × 10⁴", True),
        ("Version 31 came.", "version 3.1", False),
        ("Version 3.1 came.", "Version 3.1", True),
        ("The grade is A.", "A", True),
        ("The grade is B. A day later it rose.", "An", False),
        ("a + b", "+", True),
        ("It sold 5 lamps.", "5 million", False),
        ("It made 5,000 thousand.", "5 million", True),
        ("It made 5.0 million.", "$5 million", True),
        ("It rose in Q3.", "3", False),
        ("It began with COVID-19.", "19", False),
        ("In the 1990s it rose.", "1990", False),
        ("5 " + "7 " * 1_000, "5.0", False),  # only so many numbers are looked at
    ],
)
def test_a_question_is_noted_where_its_answer_stands_before_it(before: str, answer: str, found: bool):
    asked = Question("doc_general_qa", "What is it?", answer)
    written = json.dumps({"question": asked.text, "answer": answer})
    assert states(f"{before} {written}", asked) == found
    choice = Question("doc_mc", "Which?", "C", {"A": "no", "B": "nor this", "C": answer, "D": "never"})
    written = json.dumps({"question": choice.text, "options": choice.options, "answer": "C"})
    assert states(f"{before} {written}", choice) == found


def test_a_question_that_was_not_noted_is_as_bad_as_a_malformed_one_and_asked_of_nobody():
    def actor(role, prompt, draw):
        said = act(role, prompt, draw)
        return f"It is an orange: {said}" if role == "questioner" and draw.random() < 0.5 else said

    asked = asked_by(actor, noted=True)
    made_up = [e for e in asked if e.outcome == "unnoted"]
    assert made_up
    assert all(e.reward == -0.7 and not e.responses and e.probe is None for e in made_up)
    assert not any("orange" in e.asked_text.partition("{")[0] for e in made_up)
    assert all("orange" in e.asked_text.partition("{")[0] for e in asked if e.responses)
    assert "unnoted" not in {e.outcome for e in asked_by(actor)}


@pytest.mark.parametrize(
    ("before", "asked", "answer", "found"),
    [
        ("Ann Lee owns Oak Books.", "Who owns Oak Books?", "Ann Lee", True),
        (
            "Paul Roy is a friend of\nAnn Lee! Ann Lee owns the Oak Books.",
            "What does Ann Lee own?",
            "Oak Books",
            True,
        ),
        ("Oak Books sells lamps for 4. 4 + 4 = 8. C: no.", "What do two lamps cost?", "8", True),
        ("<think>Is it Paul Ray?</think> Ann Lee owns Oak Books.", "Who owns Oak Books?", "Ann Lee", True),
        ("Ann Lee owns Oak Books.", "Who owns Oak Books?", "Paul Roy", False),
        ("Ann Lee owns Oak Books. D: Paul Roy.", "Who owns Oak Books?", "Paul Roy", False),
        ("Ann Lee owns Elm Books.", "Who owns Oak Books?", "Ann Lee", False),
        ("Ann Lee owns Oak Book.", "Who owns Oak Books?", "Ann Lee", False),
        ("Ann Lee owns Oak Books. So she is rich.", "Who owns Oak Books?", "Ann Lee", False),
        ("Ann Lee owns Oak Books.", "Who owns Elm Books?", "Ann Lee", False),
        ("Ann Lee owns Oak Books.", "Who is rich: Ann Lee, Paul Roy or Ann Lee?", "Ann Lee", False),
        ("4 + 4 = 8.", "What do two lamps cost?", "8", False),
        ("Oak Books sells lamps for 4. 4 / 8 = 0.5.", "What does half a lamp cost?", "5", False),
        ("Oak Books sells lamps for 4. 4 / 8 = 0.5.", "What does half a lamp cost?", "0.50", True),
        ("", "Who owns Oak Books?", "Ann Lee", False),
    ],
)
def test_a_question_is_quoted_where_what_stands_before_it_stands_in_the_documents(
    before: str, asked: str, answer: str, found: bool
):
    documents = (
        Document("a", "Ann Lee owns Oak Books. Oak Books sells lamps for 4.", "Oak Books"),
        Document("b", "Paul Roy is a friend of Ann Lee.", "Paul Roy"),
    )
    question = Question("doc_general_qa", asked, answer)
    written = json.dumps({"question": asked, "answer": answer})
    assert quotes(f"{before} {written}", question, documents) == found
    choice = replace(question, answer="D", options={"A": "no", "B": "nor this", "C": "never", "D": answer})
    assert quotes(f"{before} {written}", choice, documents) == found


def test_a_question_that_quotes_what_was_not_read_is_as_bad_as_a_malformed_one():
    def actor(role, prompt, draw):
        said = act(role, prompt, draw)
        if role != "questioner":
            return said
        facts = re.findall(r"Fact \d of cluster \d+\.", prompt)
        quoted = draw.choice([*facts, "Fact 9 of cluster 99."])
        return said.replace("Thinking.", quoted).replace("orange", quoted.rstrip("."))

    asked = asked_by(actor, quoted=True)
    made_up = [e for e in asked if e.outcome == "unquoted"]
    assert made_up
    assert all(e.reward == -0.7 and not e.responses and e.probe is None for e in made_up)
    assert all("cluster 99" in e.asked_text for e in made_up)
    answered = [e for e in asked if e.responses]
    assert answered and not any("cluster 99" in e.asked_text for e in answered)
    assert any("cluster 99" in e.asked_text for e in asked_by(actor) if e.responses)


def test_the_probe_reads_what_was_read_and_some_others():
    for seed in range(20):
        chosen = probed_documents(10, (2, 7), 4, random.Random(seed))
        assert len(chosen) == 6
        assert {2, 7} < set(chosen) <= set(range(10))
        assert list(chosen) == sorted(chosen)
    assert probed_documents(3, (0, 2), 4, random.Random(0)) == (0, 1, 2)


def group(*values: tuple[float, float]) -> Group:
    return Group(
        [1], tuple(Sample([5, 6], [weight, weight], [logprob, logprob]) for weight, logprob in values)
    )


def test_negative_advantages_wait_for_a_policy_that_is_sure():
    batch = TrainBatch((group((1.0, -0.5), (-1.0, -1.5)), group((-2.0, -4.0))))
    assert sampled_entropy(batch) == pytest.approx((0.5 + 1.5 + 4.0) / 3)
    assert sampled_entropy(TrainBatch(())) == 0.0
    masked = without_negatives(batch)
    assert [[s.weights for s in g.samples] for g in masked.groups] == [[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0]]]
    assert masked.response_tokens == batch.response_tokens
    weights = {
        bound: [
            w for g in play(negatives_below=bound).batch.train.groups for s in g.samples for w in s.weights
        ]
        for bound in (None, 0.49, 0.51)  # the stage's engine samples at half a nat
    }
    assert min(weights[0.49]) == 0.0 > min(weights[None])
    assert weights[0.51] == weights[None]
    assert weights[0.49] == [max(weight, 0.0) for weight in weights[None]]
    assert step_metrics(play(negatives_below=0.49))["batch/gated"] == 1.0


def test_whose_standard_deviation_divides():
    """Two groups of one task and one of another, worked by hand."""
    keys, tasks = [0, 0, 1, 1, 2, 2], ["qa"] * 4 + ["math"] * 2
    rewards = [1.0, 0.0, 1.0, 1.0, 0.0, 0.5]
    by_group = standardise_by(keys, rewards)
    assert by_group == pytest.approx([0.70711, -0.70711, 0, 0, -0.70711, 0.70711], abs=1e-4)
    by_task = standardise_by(keys, rewards, tasks)  # std of 1 0 1 1 is 0.5, of 0 0.5 is 0.35355
    assert by_task == pytest.approx([1.0, -1.0, 0, 0, -0.70711, 0.70711], abs=1e-4)
    by_batch = standardise_by(keys, rewards, [None] * 6)  # of all six 0.49160
    assert by_batch == pytest.approx([1.01709, -1.01709, 0, 0, -0.50854, 0.50854], abs=1e-4)


@pytest.mark.parametrize("std", ["task", "batch"])
def test_steps_are_scaled_as_configured(std: str):
    plain, scaled = play(), play(std=std)
    for one, other in zip(plain.batch.train.groups, scaled.batch.train.groups, strict=True):
        ratios = {
            round(b.weights[0] / a.weights[0], 6)
            for a, b in zip(one.samples, other.samples, strict=True)
            if a.weights[0]
        }
        assert len(ratios) <= 1  # a group keeps its shape
    assert plain.batch.train != scaled.batch.train


def test_questions_are_compared_with_those_about_as_many_documents():
    made = [
        replace(
            episode(i, reward=reward, responses=[response(1.0), response(0.0)]), documents=tuple(range(count))
        )
        for i, (reward, count) in enumerate([(1.0, 2), (0.0, 2), (0.5, 5), (0.1, 5), (0.9, 7)])
    ]
    chosen = settings(questions=5, failure_ratio=0.0, beyond=BeyondConfig(questioner_peers="task_documents"))
    batch = compose(made, chosen, random.Random(0))
    weights = [
        g.samples[0].weights[0]
        for g, r in zip(batch.train.groups, batch.roles, strict=True)
        if r == "questioner"
    ]
    assert weights == pytest.approx([0.70711, -0.70711, 0.70711, -0.70711, 0.0], abs=1e-4)


def test_a_running_mean_outlives_the_batch_and_the_run():
    baselines = Baselines()
    assert baselines.advantages(["qa", "qa", "math"], [1.0, 0.0, 0.3]) == pytest.approx([0.5, -0.5, 0.0])
    assert baselines.advantages(["qa"], [1.0]) == pytest.approx([0.5])
    moved = DECAY * 0.5 + (1 - DECAY) * 1.0
    assert baselines.state() == pytest.approx({"qa": moved, "math": 0.3})
    again = Baselines()
    again.restore(json.loads(json.dumps(baselines.state())))
    assert again.advantages(["qa", "new"], [0.0, 1.0]) == pytest.approx([-moved, 0.0])


def test_a_restored_room_has_its_baselines():
    chosen = settings(beyond=BeyondConfig(questioner_baseline="ema"))

    async def two(room) -> Play:
        await room.play(0)
        return await room.play(1)

    whole = asyncio.run(two(selfplay(chosen)))
    first = selfplay(chosen)
    asyncio.run(first.play(0))
    state = json.loads(json.dumps(first.state()))
    second = selfplay(chosen)
    second.restore(state)
    assert asyncio.run(second.play(1)).batch.train == whole.batch.train
    forgetful = selfplay(chosen)
    forgetful.restore({**state, "baselines": {}})
    assert asyncio.run(forgetful.play(1)).batch.train != whole.batch.train


def test_stages_of_length():
    stages = (StageConfig(10, 60), StageConfig(0, 25), StageConfig(20, 1000))
    assert [tokens_at(step, stages) for step in (0, 9, 10, 19, 25)] == [25, 25, 60, 60, 1000]
    assert tokens_at(5, (StageConfig(10, 60),)) is None
    whole = cluster(0, 8)  # texts of 20 characters
    assert len(whole.documents[0].text) == 20
    kept = [len(staged(whole, tokens, len).documents) for tokens in (None, 1000, 100, 65, 5)]
    assert kept == [8, 8, 5, 3, 2]
    assert staged(whole, 65, len).documents == whole.documents[:3]
    result = play(stages=(StageConfig(0, 100),))
    assert {e.cluster_documents for e in result.episodes} == {5}


def test_novelty_against_what_is_remembered():
    assert novelty("Who built the bridge?", []) == 1.0
    assert novelty("Who built THE bridge", ["When did it open?", "the bridge: who built?"]) == 0.0
    assert novelty("Who built it?", ["Who built the bridge?"]) == pytest.approx(1 - 2 / 5)
    history = (Remembered((0,), Question("doc_general_qa", "Question 1?", "x")),)
    made = [replace(episode(i), history=history if i else ()) for i in (0, 1, 2)]
    assert novelties(made) == pytest.approx([0.0, 1 - 1 / 3])
    assert distinct_share([*made, episode(1)]) == 0.75
    assert distinct_share([]) is None


def test_options_that_contradict():
    with pytest.raises(ConfigError, match="questioner_peers"):
        load_config(
            "toy",
            ["selfplay.beyond.questioner_baseline=ema", "selfplay.beyond.questioner_peers=task_documents"],
        )
    with pytest.raises(ConfigError, match="cluster_tokens"):
        load_config("paper-16k", ["selfplay.beyond.stages=[{step: 0, tokens: 60000}]"])
