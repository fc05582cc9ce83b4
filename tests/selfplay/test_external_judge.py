"""An external judge behind a real HTTP server: its word counts, its failures are counted, and none of them is a 0."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import ClassVar

import pytest
from eval_standin import StandIn, chat_reply
from selfplay_stage import Corpus, Engine, act, selfplay, settings

from eval import endpoint as endpoint_module
from eval import reward_judge
from eval.endpoint import Endpoint, EndpointDied, RequestLimits, Unanswered
from eval.reward import KEY, RewardJudge
from spell_megatron.config import ConfigError, ExternalJudgeConfig, load_config
from spell_megatron.selfplay import StarvedError, step_metrics
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.rewards import UNJUDGED
from spell_megatron.selfplay.tasks.general import General
from spell_megatron.types import Question, SpellError

pytestmark = pytest.mark.unit
QUESTION = Question("doc_general_qa", "Which fruit?", "orange")


def strict(kind, body, number):
    """Says YES to a plum or to the reference itself, and writes of NO."""
    prompt = body["messages"][0]["content"]
    reference, answer = re.findall(r"Reference answer: (.*)\nStudent's answer: (.*)\n", prompt)[-1]
    return chat_reply("NO doubt. [[YES]]" if answer in (reference, "plum") else "Perhaps [[YES]]? [[NO]]")


def external(server: StandIn, **changes) -> ExternalJudgeConfig:
    return ExternalJudgeConfig(**({"url": server.url, "timeout_seconds": 60.0, "tries": 2} | changes))


def asked(judge: RewardJudge, *answers: str) -> list:
    async def go() -> list:
        return await asyncio.gather(*(judge(QUESTION, answer) for answer in answers))

    return asyncio.run(go())


def played(server: StandIn, generator: Engine | None = None, **changes):
    """A step of self-play with a judge at a server."""
    options = {name: changes.pop(name) for name in ("place", "concurrency", "tries") if name in changes}
    judge = external(server, **options)
    chosen = settings(external_judge=judge, **changes)
    parts = {"judge": RewardJudge(judge), "clusters": Corpus(tasks=["doc_general_qa"])}
    room = selfplay(chosen, generator=generator or Engine(), **parts)
    return room, asyncio.run(room.play(0))


def test_equal_answers_are_one_request_and_so_many_run_at_once():
    running, most, lock = 0, 0, threading.Lock()

    def behave(kind, body, number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.02)
        with lock:
            running -= 1
        return strict(kind, body, number)

    with StandIn(behave) as server:
        judge = RewardJudge(external(server, concurrency=3), "a key")
        answers = [f"fruit {i % 8}" for i in range(40)]
        opinions = asked(judge, *answers, "plum", "orange")
        assert [opinion.score for opinion in opinions] == [0.0] * 40 + [1.0, 1.0]
        assert server.chats == 10
        assert most <= 3
        assert server.keys == {"Bearer a key"}


@pytest.mark.parametrize(
    ("behave", "fault", "requests"),
    [
        (lambda *_: chat_reply("It is hard to say: YES and NO."), "no verdict in the reply", 2),
        (lambda *_: (500, b""), "HTTP 500", 2),
        (lambda *_: (401, {"error": {"message": "no key"}}), "HTTP 401: no key", 1),
        (lambda *_: (307, {"error": "go to another host"}), "HTTP 307: go to another host", 1),
        (lambda *_: (200, b"x" * 3000), "an answer of more than 0 MiB", 1),
    ],
)
def test_a_failure_is_no_opinion(behave, fault, requests, monkeypatch):
    monkeypatch.setattr(endpoint_module, "LARGEST", 2000)
    with StandIn(behave) as server:
        [opinion] = asked(RewardJudge(external(server)), "plum")
        assert (opinion.score, opinion.fault) == (None, fault)
        assert server.chats == requests


def test_what_failed_is_asked_again():
    down = True

    def behave(kind, body, number):
        return (400, {"error": "busy"}) if down else strict(kind, body, number)

    async def go(judge: RewardJudge) -> list:
        nonlocal down
        first = await judge(QUESTION, "plum")
        down = False
        return [first.score, (await judge(QUESTION, "plum")).score]

    with StandIn(behave) as server:
        assert asyncio.run(go(RewardJudge(external(server)))) == [None, 1.0]


def test_an_answer_that_trickles_ends_at_the_time_limit():
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.02)

    async def go() -> None:
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        source = Endpoint(url, model="m", limits=RequestLimits(timeout=0.2, tries=1))
        with pytest.raises(Unanswered, match="timed out"):
            await source.chat("?", max_tokens=1, seed=0)
        server.close()

    asyncio.run(go())


def test_the_judge_takes_the_rules_place():
    """Paper, Table 4: a plum is right by the judge, an orange by both; the verifier is held to the judge's word."""
    with StandIn(strict) as server:
        _, play = played(server, place="rule", combine="min")
        responses = [r for e in play.episodes for r in e.responses if r.answer is not None]
        assert {r.answer for r in responses} >= {"orange", "plum", "pear"}
        for response in responses:
            assert response.judged == response.rule == float(response.answer != "pear")
            votes = [response.rule] if response.verdict is None else [response.rule, response.verdict]
            assert response.reward == min(votes)
        values = step_metrics(play)
        assert values["judge/asked"] == len(responses)
        assert values["judge/failed"] == 0
        again = [Episode.from_dict(episode.to_dict()) for episode in play.episodes]
        assert tuple(again) == play.episodes


@pytest.mark.parametrize(
    ("combine", "together"), [("mean", lambda votes: sum(votes) / len(votes)), ("sum", sum)]
)
def test_in_the_rules_place_it_is_one_opinion_and_not_two(combine, together):
    with StandIn(strict) as server:
        _, play = played(server, place="rule", combine=combine)
        responses = [r for e in play.episodes for r in e.responses if r.verdict is not None]
        assert {r.rule + r.verdict for r in responses} > {1.0}, "nowhere do the two differ"
        for response in responses:
            assert response.reward == together([response.rule, response.verdict])


def test_beside_the_verifier_it_is_asked_where_it_could_count():
    with StandIn(strict) as server:
        _, play = played(server, place="beside", judge=False)
        for response in (r for e in play.episodes for r in e.responses if r.answer is not None):
            assert response.judged == (None if response.rule else float(response.answer == "plum"))
            assert response.reward == float(response.answer in ("orange", "plum"))
            assert not response.judgements


def test_failures_drop_the_question_and_are_never_a_zero():
    """Every third answer has no verdict: no reward hangs on it, memory and batch know nothing of its question."""

    def flaky(kind, body, number):
        return chat_reply("?") if "plum" in body["messages"][0]["content"] else strict(kind, body, number)

    with StandIn(flaky) as server:
        room, play = played(server, place="beside", round_questions=60, tries=1)
        unjudged = [e for e in play.episodes if e.outcome == UNJUDGED]
        assert unjudged
        for episode in play.episodes:
            hanging = [r for r in episode.responses if r.unjudged and max(r.rule, r.verdict or 0) < 1]
            assert (episode.outcome == UNJUDGED) == bool(hanging)
            if hanging:
                assert episode.reward is None
        failed = sum(bool(r.unjudged) for e in play.episodes for r in e.responses)
        values = step_metrics(play)
        assert values["judge/failed"] == failed > 0
        assert values["outcome/unjudged"] == len(unjudged)
        known = {e.question.text for e in unjudged}
        rings = room.state()["memory"]
        assert not known & {entry["question"]["text"] for ring in rings for entry in ring["questions"]}


def test_a_judge_that_is_down_ends_the_run_with_its_name():
    with StandIn(lambda *_: (400, {"error": "no"})) as server:
        with pytest.raises(StarvedError, match=r"unjudged.*selfplay\.external_judge") as starved:
            played(server, place="rule", max_rounds=1)
        assert starved.value.exit_code == 1, "the judge may answer the next attempt"
        url = server.url
    judge = ExternalJudgeConfig(url=url)
    with pytest.raises(EndpointDied, match="check the URL"):
        asked(RewardJudge(judge), "plum")


def test_multiple_choice_needs_no_judge():
    with StandIn(strict) as server:
        chosen = settings(external_judge=external(server))
        judge = RewardJudge(chosen.external_judge)
        room = selfplay(chosen, judge=judge, clusters=Corpus(tasks=["doc_mc"]), generator=Engine(act))
        assert asyncio.run(room.play(0)).outcomes["kept"] == 6
        assert server.chats == 0


def test_the_key_is_in_the_environment_alone(monkeypatch):
    with pytest.raises(ConfigError, match="SPELL_JUDGE_KEY"):
        load_config("toy", ["selfplay.external_judge.url=https://user:key@host"])
    assert reward_judge(load_config("toy")) is None
    monkeypatch.setenv(KEY, "from the environment")
    with StandIn(strict) as server:
        config = load_config("toy", [f"selfplay.external_judge.url={server.url}"])
        asked(reward_judge(config), "plum")
        assert server.keys == {"Bearer from the environment"}


class Riddle(General):
    name, label = "riddle", "riddle"
    templates: ClassVar = {
        "verifier_riddle.j2": "Is {{ answer }} as good an answer to {{ question.text }} as {{ reference }}?"
    }


def test_it_is_asked_about_a_task_of_ones_own_in_the_words_that_the_task_brings():
    told = []

    def behave(kind, body, number):
        told.append(body["messages"][0]["content"])
        return chat_reply("[[YES]]")

    def judge(task: str) -> RewardJudge:
        url = f"selfplay.external_judge.url={server.url}"
        return reward_judge(load_config("toy", [url, f"corpus.sources=[{{path: toy, tasks: ['{task}']}}]"]))

    with StandIn(behave) as server:
        riddle = Question("riddle", "What has a neck and no head?", "a bottle")
        opinion = asyncio.run(judge("test_external_judge:Riddle")(riddle, "a shirt"))
        assert opinion.score == 1.0
        assert told == ["Is a shirt as good an answer to What has a neck and no head? as a bottle?"]
        with pytest.raises(SpellError, match=r"none of the templates verifier_table\.j2.*your own brings it"):
            judge("table:Table")
