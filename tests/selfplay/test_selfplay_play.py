"""Whole steps of self-play on a stage: order, counts, curriculum, ablations, starvation, restarts."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from contextlib import suppress
from dataclasses import replace

import pytest
from selfplay_stage import (
    Characters,
    Corpus,
    Engine,
    FixedQuestions,
    act,
    cluster,
    role_of,
    selfplay,
    settings,
)
from selfplay_stage import episode as made_episode
from selfplay_stage import response as made_response

from spell_megatron.config import SamplingConfig
from spell_megatron.selfplay import Episode, Play, Prompts, StarvedError, accuracy, step_metrics
from spell_megatron.selfplay.grading import rule_reward
from spell_megatron.selfplay.parsing import parse_verdict
from spell_megatron.selfplay.round import Round
from spell_megatron.types import Question, SpellError

pytestmark = pytest.mark.unit


def play(step: int = 0, chosen=None, **parts) -> Play:
    return asyncio.run(selfplay(chosen, **parts).play(step))


def as_json(play_: Play) -> list[dict]:
    return [episode.to_dict() for episode in play_.episodes]


def test_a_step_fills_its_batch_and_follows_every_rule():
    chosen = settings(questions=20)
    result = play(chosen=chosen)
    assert sum(e.kept for e in result.episodes) == 20
    assert result.episodes[-1].kept
    assert result.rounds == 2
    assert [e.index for e in result.episodes] == [*range(30), *range(len(result.episodes) - 30)]
    assert {"kept", "zero_variance", "bad_format", "bad_ground"} <= set(result.outcomes)
    assert result.batch.samples("responder") == 80
    room = selfplay(chosen)
    assert len(asyncio.run(room.play(0)).episodes) == room.state()["clusters"]["position"]
    for episode in result.episodes:
        check(episode, chosen.group_size)


def test_a_whole_round_is_asked_to_its_end_and_the_batch_is_its_first_questions():
    """As in the step that ends with its batch, and what comes behind is remembered besides."""
    cut, room = selfplay(), selfplay(settings(whole_rounds=True))
    short, long = (asyncio.run(one.play(0)) for one in (cut, room))
    assert len(short.episodes) < len(long.episodes) == room.state()["clusters"]["position"] == 30
    assert as_json(long)[: len(short.episodes)] == as_json(short)
    responders = [
        [
            group
            for group, role in zip(p.batch.train.groups, p.batch.roles, strict=True)
            if role == "responder"
        ]
        for p in (short, long)
    ]
    assert responders[0] == responders[1]
    assert step_metrics(long)["batch/questions"] == 6 < step_metrics(long)["outcome/kept"]
    assert long.remembered > short.remembered
    assert long.tally.aborted == long.tally.unused == 0


def check(episode: Episode, group: int) -> None:
    """Everything in an episode follows from its texts."""
    if episode.outcome in ("bad_format", "dropped:over_long", "dropped:not_a_number"):
        assert episode.probe is None
        assert not episode.responses
        assert episode.question is None
        assert episode.reward == (-1.0 if episode.outcome == "bad_format" else None)
        return
    question = episode.question
    assert question is not None
    assert episode.probe is not None
    ungrounded = rule_reward(episode.task, episode.probe.text, question) >= 0.1
    assert (episode.outcome == "bad_ground") == ungrounded
    assert len(episode.responses) == (0 if ungrounded else group)
    if episode.task == "doc_mc":
        assert question.answer == episode.key
    for response in episode.responses:
        assert response.rule == rule_reward(episode.task, response.text, question)
        assert len(response.judgements) == (group if response.answer is not None else 0)
        votes = [parse_verdict(judgement.text) for judgement in response.judgements]
        yes, no = votes.count(1), votes.count(0)
        verdict = None if yes == no or votes.count(None) > max(yes, no) else int(yes > no)
        assert response.verdict == verdict
        assert response.votes == votes
        assert response.reward == max(response.rule, verdict or 0.0)
        for judgement, vote in zip(response.judgements, votes, strict=True):
            assert judgement.reward == (-1.0 if vote is None else float(vote == verdict))
    if episode.responses:
        rewards = [response.reward for response in episode.responses]
        assert episode.kept == (len(set(rewards)) > 1)
        assert episode.mean_reward == pytest.approx(sum(rewards) / group)


def test_who_reads_what():
    """The questioner some documents, responders all of them, the probe and the verifiers none."""
    for episode in play().episodes:
        texts = {i: f"Fact {i} of" for i in range(8)}
        seen = {role: set() for role in ("questioner", "responder", "verifier", "probe")}
        for role, rollout in episode.rollouts():
            prompt = "".join(map(chr, rollout.prompt))
            role = "probe" if episode.probe and rollout is episode.probe.rollout else role
            seen[role] |= {index for index, text in texts.items() if text in prompt}
        assert seen["questioner"] == set(episode.documents)
        assert len(episode.documents) == 3
        assert seen["probe"] == seen["verifier"] == set()
        assert seen["responder"] == (set(range(8)) if episode.responses else set())


@pytest.mark.long
def test_arrival_does_not_matter():
    """Delays are random, and the number of questions in flight differs: the steps are the same."""

    def two_steps(concurrency: int, delay: float):
        room = selfplay(settings(concurrency=concurrency), generator=Engine(delay=delay), clusters=Corpus(3))
        plays = [asyncio.run(room.play(step)) for step in range(2)]
        return [as_json(p) for p in plays], [p.batch for p in plays], room.state()

    reference = two_steps(1, 0.0)
    for concurrency, delay in ((2, 0.002), (16, 0.005), (64, 0.01)):
        assert two_steps(concurrency, delay) == reference


def test_concurrency_is_bounded():
    engine = Engine(lambda role, prompt, draw: "nothing", delay=0.002)
    with pytest.raises(StarvedError):
        play(chosen=settings(concurrency=5, max_rounds=1), generator=engine)
    assert 1 < engine.most <= 5


def test_responses_do_not_wait_for_each_other_before_they_are_judged():
    """A verdict on the first response is asked for while the others are still being written."""
    judged, responses = asyncio.Event(), 0

    def says(role, prompt, draw):
        return "The correct answer is (orange)." if role == "responder" else act(role, prompt, draw)

    class Slow(Engine):
        async def generate(self, prompt, **sampling):
            nonlocal responses
            role = role_of("".join(map(chr, prompt)))
            responses += role == "responder"
            if role == "verifier":
                judged.set()
            elif responses > 1:
                await asyncio.wait_for(judged.wait(), 60)
            return await super().generate(prompt, **sampling)

    chosen = settings(concurrency=1, questions=1, max_rounds=1, grounding=False)
    asks = Corpus(tasks=["doc_general_qa"])
    with suppress(StarvedError):  # a question that everybody answers is not kept
        play(chosen=chosen, generator=Slow(says, delay=0.0), clusters=asks)
    assert responses >= chosen.group_size and judged.is_set()


def test_another_seed_and_another_step_are_other_draws():
    texts = {
        tuple(e.asked_text for e in play(step, seed=seed).episodes) for step in (0, 1) for seed in (1, 2)
    }
    assert len(texts) == 4


def test_episodes_survive_json():
    for episode in play().episodes:
        again = Episode.from_dict(json.loads(json.dumps(episode.to_dict())))
        assert again == episode
    with pytest.raises(SpellError, match="record of an episode"):
        Episode.from_dict({"step": 1})


def test_an_episode_of_a_journal_that_knows_no_updates_is_read():
    made = made_episode(0, responses=[made_response(1.0)])
    record = json.loads(json.dumps(made.to_dict()))
    for rollout in (record["asked"], *(answer["rollout"] for answer in record["responses"])):
        assert rollout.pop("updates") == []
    assert Episode.from_dict(record) == made


@pytest.mark.long
def test_an_interrupted_step_continues_where_it_was():
    """Finished episodes are not generated again, and the step is the same as without the interruption."""
    chosen = settings(questions=20)
    whole = play(chosen=chosen)
    journal: list[Episode] = []

    class Killed(Engine):
        async def generate(self, *args, **options):
            if len(journal) >= 5:
                raise RuntimeError("engine lost")
            return await super().generate(*args, **options)

    with pytest.raises(RuntimeError, match="engine lost"):
        asyncio.run(selfplay(chosen, generator=Killed(), on_episode=journal.append).play(0))
    assert len(journal) >= 5
    saved = [Episode.from_dict(json.loads(json.dumps(e.to_dict()))) for e in journal]
    engine, rest = Engine(), []
    resumed = asyncio.run(selfplay(chosen, generator=engine, on_episode=rest.append).play(0, finished=saved))
    assert as_json(resumed) == as_json(whole)
    assert resumed.batch == whole.batch
    places = [(e.round, e.index) for e in [*saved, *rest]]
    assert len(places) == len(set(places))


def test_finished_episodes_of_something_else_are_ignored():
    other = [replace(episode, cluster="elsewhere") for episode in play().episodes]
    room = selfplay()
    assert as_json(asyncio.run(room.play(0, finished=other))) == as_json(play())


def test_an_error_leaves_no_request_running():
    class Broken(Engine):
        async def generate(self, *args, **options):
            if self.requests > 20:
                raise ConnectionError("gone")
            return await super().generate(*args, **options)

    async def scene() -> int:
        with pytest.raises(ConnectionError, match="gone"):
            await selfplay(generator=Broken()).play(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(scene()) == 1


def test_what_ends_well_beside_an_error_is_handed_out_first(caplog: pytest.LogCaptureFixture) -> None:
    async def failing(message: str) -> Episode:
        raise ConnectionError(message)

    async def fine(index: int) -> Episode:
        return replace(episode, index=index)

    async def scene() -> list[int]:
        played = Round([None] * 4, wanted=4)
        works = [failing("first"), fine(1), failing("second"), fine(3)]
        for place, work in enumerate(works):
            played.begin(place, work, 0)
        handed = [index for index, _ in await played.arrivals()]
        with pytest.raises(ConnectionError, match="first"):
            await played.arrivals()
        await played.cancel()
        return handed

    [episode, *_] = asyncio.run(selfplay().play(0)).episodes
    assert asyncio.run(scene()) == [1, 3]
    gc.collect()
    assert not caplog.records  # nobody would have asked for the second one's error


def test_a_restored_room_plays_on_as_if_nothing_had_happened():
    whole = selfplay(clusters=Corpus(2))
    expected = [as_json(asyncio.run(whole.play(step))) for step in range(3)]
    first = selfplay(clusters=Corpus(2))
    assert [as_json(asyncio.run(first.play(step))) for step in range(2)] == expected[:2]
    state = json.loads(json.dumps(first.state()))
    second = selfplay(clusters=Corpus(2))
    second.restore(state)
    assert as_json(asyncio.run(second.play(2))) == expected[2]
    with pytest.raises(SpellError, match="state of self-play"):
        second.restore({})


def test_memory_widens_what_is_read():
    room = selfplay(settings(round_questions=9), clusters=Corpus(3))
    plays = [asyncio.run(room.play(step)) for step in range(4)]
    later = [e for e in plays[-1].episodes if e.history]
    assert later
    assert max(len(e.documents) for e in later) > 3
    for episode in later:
        assert {i for entry in episode.history for i in entry.documents} <= set(episode.documents)
        prompt = "".join(map(chr, episode.asked.prompt))
        assert all(entry.question.text in prompt for entry in episode.history)
    asked = [e for e in plays[-1].episodes if e.asked]
    assert step_metrics(plays[-1])["memory/hits"] == len(later) / len(asked)
    assert step_metrics(plays[0])["memory/hits"] < 1


def test_memory_is_read_as_the_round_began():
    """Questions of one round on the same cluster do not see each other, those of the next round do."""
    chosen = settings(questions=12, round_questions=12)
    result = play(chosen=chosen, clusters=Corpus(1, tasks=["docmath_qa"]))
    assert result.rounds > 1
    assert all(not e.history for e in result.episodes if e.round == 0)
    assert all(e.history for e in result.episodes if e.round == 1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "check_"),
    [
        ({"memory": 0}, lambda p: p.remembered == 0 and all(len(e.documents) == 3 for e in p.episodes)),
        (
            {"grounding": False},
            lambda p: all(e.probe is None and e.outcome != "bad_ground" for e in p.episodes),
        ),
        ({"train_verifier": False}, lambda p: p.batch.samples("verifier") == 0 and judged(p)),
        ({"train_questioner": False}, lambda p: p.batch.samples("questioner") == 0),
        (
            {"judge": False},
            lambda p: not judged(p) and rule_only(p) and not p.batch.facts["batch/verifier_wanted"],
        ),
        ({"verdict": "first"}, lambda p: all(r.verdict == r.votes[0] for r in judged_responses(p))),
        ({"vote_tie": "no"}, lambda p: all(r.verdict == 0 for r in tied(p)) and tied(p)),
        ({"invalid_vote_reward": 0.0}, lambda p: all(j.reward >= 0 for j in invalid(p)) and invalid(p)),
        (
            {"verifier_consistency": "maj"},
            lambda p: p.batch.facts["batch/verifier_pool"] >= play().batch.facts["batch/verifier_pool"],
        ),
        ({"combine": "min"}, lambda p: all(r.reward == min(r.rule, r.verdict) for r in decided(p))),
        ({"combine": "mean"}, lambda p: all(r.reward == (r.rule + r.verdict) / 2 for r in decided(p))),
        ({"questioner_reward": "reverse"}, lambda p: rewarded(p, lambda mean: 1 - mean)),
        ({"questioner_reward": "linear"}, lambda p: rewarded(p, lambda mean: 1 - 2 * abs(mean - 0.5))),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_ablations(changes, check_):
    result = play(chosen=settings(**changes))
    assert check_(result)
    assert result.batch.samples("responder") == 24


def judged_responses(result: Play) -> list:
    return [r for e in result.episodes for r in e.responses if r.judgements]


def judged(result: Play) -> bool:
    return bool(judged_responses(result))


def tied(result: Play) -> list:
    counts = [(r, *(r.votes.count(vote) for vote in (1, 0, None))) for r in judged_responses(result)]
    return [r for r, yes, no, invalid in counts if yes == no >= max(1, invalid)]


def invalid(result: Play) -> list:
    return [j for r in judged_responses(result) for j in r.judgements if j.vote is None]


def decided(result: Play) -> list:
    return [r for e in result.episodes for r in e.responses if r.verdict is not None]


def rule_only(result: Play) -> bool:
    return all(r.reward == r.rule for e in result.episodes for r in e.responses)


def pool(p):
    return p.batch.facts["batch/verifier_pool"]


def rewarded(result: Play, shape) -> bool:
    return all(e.reward == pytest.approx(shape(e.mean_reward)) for e in result.episodes if e.kept)


def test_static_questions_are_answered_and_never_asked():
    chosen = settings(static_questions=True, judge=False, train_verifier=False, train_questioner=False)
    respond = Engine(lambda role, prompt, draw: f"Therefore, the answer is ({draw.choice([12, 99])}).")
    result = play(chosen=chosen, clusters=FixedQuestions(), generator=respond)
    assert all(e.asked is None and e.probe is None and e.reward is None for e in result.episodes)
    assert set(result.batch.roles) == {"responder"}
    assert result.remembered == 0
    assert all(not e.history for e in result.episodes)


def test_starvation_names_counts_and_three_keys():
    chosen = settings(questions=4, round_questions=7, max_rounds=3)
    room = selfplay(chosen, generator=Engine(lambda role, prompt, draw: "I refuse."))
    with pytest.raises(StarvedError) as error:
        asyncio.run(room.play(5))
    message = str(error.value)
    assert "step 5" in message
    assert "0 of 4" in message
    assert "21 bad_format" in message
    assert "3 rounds of 7" in message
    keys = message.partition("help: ")[2].split("; ")
    assert len(keys) == 3
    assert all(key.startswith(("selfplay.", "model.", "corpus.", "rollout.")) for key in keys)
    assert len(error.value.episodes) == 21
    assert room.state()["clusters"] == {"position": 21}
    assert error.value.exit_code == 2, "a launched job would be started again, to read the same episodes"


def test_starvation_of_questions_that_are_too_easy_speaks_of_variance():
    engine = Engine(lambda role, prompt, draw: act(role, prompt, random.Random(7)))
    with pytest.raises(StarvedError, match=r"zero_variance.*temperature"):
        play(
            chosen=settings(max_rounds=1, grounding=False),
            generator=engine,
            clusters=Corpus(tasks=["docmath_qa"]),
        )


def test_a_question_that_is_cut_is_no_format_error():
    """An over-long question is dropped without a penalty."""
    short = SamplingConfig(questioner_tokens=10, responder_tokens=400, verifier_tokens=100)
    with pytest.raises(StarvedError) as error:
        play(chosen=settings(sampling=short, max_rounds=1))
    outcomes = {e.outcome for e in error.value.episodes}
    assert "dropped:over_long" in outcomes
    assert "bad_format" not in outcomes
    assert all(e.reward is None for e in error.value.episodes)


def test_a_response_or_verdict_that_is_cut_does_not_count_though_its_decision_stands():
    def chatter(role: str):
        def speak(who: str, prompt: str, draw: random.Random) -> str:
            return act(who, prompt, draw) + ("\n" + "more " * 200 if who == role else "")

        return Engine(speak)

    with pytest.raises(StarvedError) as error:
        play(chosen=settings(max_rounds=1), generator=chatter("responder"))
    responses = [r for e in error.value.episodes for r in e.responses]
    assert responses
    assert all(r.answer is None and r.reward == 0 and not r.judgements for r in responses)
    result = play(generator=chatter("verifier"))
    votes = [vote for e in result.episodes for r in e.responses for vote in r.votes]
    assert votes
    assert all(vote is None for vote in votes)
    assert rule_only(result)


def test_a_thought_that_the_template_opened_has_to_be_closed():
    """The model writes only what follows `<think>`: an end without `</think>` is no answer, and no penalty."""

    class Thinking(Characters):
        def prompt(self, message: str) -> list[int]:
            return super().prompt(f"{message}\nassistant: <think>\n")

    with pytest.raises(StarvedError) as error:
        play(chosen=settings(max_rounds=1), codec=Thinking())
    assert {(e.outcome, e.reward) for e in error.value.episodes} == {("dropped:over_long", None)}
    closing = Engine(lambda role, prompt, draw: f"[[YES]] or not </think>{act(role, prompt, draw)}")
    assert play(codec=Thinking(), generator=closing).outcomes == play().outcomes


def test_no_two_draws_share_a_seed():
    asked: list[int] = []

    class Listening(Engine):
        async def generate(self, prompt, *, seeds, **options):
            asked.extend(seeds)
            return await super().generate(prompt, seeds=seeds, **options)

    room = selfplay(generator=Listening())
    for step in range(2):
        asyncio.run(room.play(step))
    assert len(asked) > 200
    assert len(set(asked)) == len(asked)


def test_only_questions_with_some_reward_are_remembered():
    """Kept and solved questions are; those that nobody answered, and those that failed, are not."""
    for answer, remembered in (("12", True), ("99", False)):
        engine = Engine(
            lambda role, prompt, draw, answer=answer: {
                "questioner": '{"question": "How many?", "answer": 12}',
                "responder": "" if "\nEmpty\n" in prompt else f"Therefore, the answer is ({answer}).",
                "verifier": "[[NO]]",
            }[role]
        )
        room = selfplay(settings(max_rounds=1), generator=engine, clusters=Corpus(tasks=["docmath_qa"]))
        with pytest.raises(StarvedError):
            asyncio.run(room.play(0))
        assert (len(room.memory) > 0) == remembered


def test_long_documents_are_cut_to_the_engines_length_and_counted():
    chosen, corpus = settings(documents=40), Corpus(documents=40)
    roomy = play(chosen=chosen, clusters=corpus)
    length = max(len(e.asked.prompt) for e in roomy.episodes) + 400 - 300
    tight = play(chosen=chosen, clusters=Corpus(documents=40), max_model_len=length)
    assert step_metrics(roomy)["questioner/cut_tokens"] == 0 < step_metrics(tight)["questioner/cut_tokens"]
    for role, rollout in (pair for e in tight.episodes for pair in e.rollouts()):
        assert len(rollout.prompt) + (100 if role == "verifier" else 400) <= length


def test_lengths_without_room_for_a_prompt_are_refused():
    with pytest.raises(SpellError, match=r"questioner_tokens=400.*max_model_len=300"):
        selfplay(max_model_len=300)


def test_metrics_are_numbers_and_add_up():
    result = play()
    metrics = step_metrics(result)
    assert all(isinstance(value, float) and value == value for value in metrics.values())
    outcomes = {name: value for name, value in metrics.items() if name.startswith("outcome/")}
    assert sum(outcomes.values()) == metrics["questions"] == len(result.episodes)
    shares = [
        value
        for name, value in metrics.items()
        if name.startswith("difficulty/") and name != "difficulty/mean"
    ]
    assert sum(shares) == pytest.approx(1)
    rewards = [r.reward for e in result.episodes for r in e.responses]
    assert metrics["responder/reward"] == pytest.approx(sum(rewards) / len(rewards))
    samples = [metrics[f"batch/{role}_samples"] for role in ("questioner", "responder", "verifier")]
    assert sum(samples) == sum(len(group.samples) for group in result.batch.train.groups)


def test_held_out_accuracy_is_the_rules():
    questions = [
        (cluster(i), Question("docmath_qa", f"number {i}?", "12", labels={"links": str(i % 2)}))
        for i in range(5)
    ]
    questions += [(cluster(9), Question("doc_general_qa", f"number {i}?", "orange")) for i in range(5)]
    score = asyncio.run(
        accuracy(
            Engine(),
            Characters(),
            Prompts("full"),
            questions,
            samples=40,
            sampling=settings().sampling,
            seed=3,
            max_model_len=8000,
        )
    )
    for place, value in enumerate(score.per_question):
        assert value == pytest.approx(place % 5 / 4 * 0.95, abs=0.3)
    assert score.per_question[0] == 0.0
    assert score.per_question[4] > 0.8
    assert score.mean == pytest.approx(sum(score.per_question) / 10)
    assert score.by_task["docmath_qa"] == pytest.approx(sum(score.per_question[:5]) / 5)
    assert score.by_label == pytest.approx(
        {"links/0": sum(score.per_question[:5:2]) / 3, "links/1": sum(score.per_question[1:5:2]) / 2}
    )
    met = [float(value > 0) for value in score.per_question]
    assert score.best == pytest.approx(
        {
            "mean": sum(met) / 10,
            "docmath_qa": sum(met[:5]) / 5,
            "doc_general_qa": sum(met[5:]) / 5,
            "links/0": sum(met[:5:2]) / 3,
            "links/1": sum(met[1:5:2]) / 2,
        }
    )
    assert score.best["docmath_qa"] == 0.8, "the first question is the one that nobody answers"
