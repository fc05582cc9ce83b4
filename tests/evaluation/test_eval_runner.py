"""What an endpoint or a judge that misbehaves does to a run: counted, shown, never a wrong answer."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import json
import logging
import os
import re
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from eval_standin import Capitals, StandIn, Unjudged, WordCodec, chat_reply, right, text_reply
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from eval import endpoint as endpoint_module
from eval.benchmark import Completion, Item, Terms
from eval.benchmarks import find
from eval.benchmarks.helmet import Helmet
from eval.comparison import compare
from eval.data import Data
from eval.endpoint import Endpoint, EndpointDied, Refused, RequestLimits, Unanswered
from eval.journal import KeyedJournal
from eval.judge import TRIES, JudgeModel
from eval.live import LiveBenchmarks, LiveSource
from eval.markdown import literal, table
from eval.measure import measure, plan
from eval.prompting import build, prefills_thinking
from eval.report import Report, read_report
from eval.reward import RewardJudge
from eval.run import JudgeSettings, _Work, evaluate
from eval.runner import Settings
from spell_megatron.base.terminal import Terminal, line
from spell_megatron.config import ExternalJudgeConfig, load_config
from spell_megatron.rollout.engine import EngineError, WeightsWanted
from spell_megatron.types import Question, Rollout, SpellError

pytestmark = pytest.mark.unit
PATIENCE = 60.0
QUICK = RequestLimits(timeout=PATIENCE, tries=3, wait=0.02)
SETTINGS = Settings(samples=4, concurrency=4)


class Summary(Helmet):
    def load(self, data):
        facts = {"points": ["It rained.", "It stopped."], "expert": "It rained, then stopped."}
        return [
            Item(
                "a",
                ({"role": "user", "content": "1?"},),
                "?",
                ("It rained.",),
                {"task": "books"},
                facts=facts,
            ),
            Item(
                "b",
                ({"role": "user", "content": "2?"},),
                "?",
                ("It rained.",),
                {"task": "cases"},
                facts=facts,
            ),
        ]

    def select(self, items, count, terms):
        return items


def run(
    standin: StandIn,
    home: Path,
    settings: Settings = SETTINGS,
    benchmark=None,
    judge: StandIn | None = None,
    limits: RequestLimits = QUICK,
    max_input: int = 1000,
    judge_seconds: float = PATIENCE,
) -> Report:
    async def go() -> Report:
        async with Endpoint(standin.url, limits=limits) as source:
            chosen = benchmark or Unjudged()
            plans = plan([(chosen, chosen.load(Data(None)), {})], [max_input], WordCodec(), settings)
            console = Terminal(file=io.StringIO())
            if judge is None:
                return await measure(source, WordCodec(), plans, settings, home, "m", console=console)
            with KeyedJournal(home / "verdicts.jsonl") as verdicts:
                async with Endpoint(judge.url, limits=RequestLimits(timeout=judge_seconds, tries=1)) as asked:
                    judging = JudgeModel(asked, verdicts, longest_wait=0.02)
                    return await measure(
                        source, WordCodec(), plans, settings, home, "m", judge=judging, console=console
                    )

    return asyncio.run(go())


def test_figures_and_files(tmp_path):
    with StandIn(right) as standin:
        report = run(standin, tmp_path)
        assert sorted(seed for _, seed in standin.asked) == sorted([0, 1, 2, 3] * 10)
        assert set(standin.asked.values()) == {1}
    [result] = report.results
    assert result.mean.value == 0.5
    assert result.mean.questions == 10
    assert report.complete
    assert result.best_of == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5}
    assert result.subsets["half"]["first"].value == 0.6
    assert result.subsets["half"]["second"].value == 0.4
    assert read_report(tmp_path) == report
    assert "50.0 [20.0, 80.0]" in report.markdown()
    assert (tmp_path / "report.png").stat().st_size > 1000
    json.loads((tmp_path / "report.json").read_text())


@pytest.mark.long
def test_nothing_is_asked_twice(tmp_path):
    with StandIn(right) as standin:
        first = run(standin, tmp_path)
        second = run(standin, tmp_path)
        assert standin.asked.total() == 40
        assert first == second
        run(standin, tmp_path, Settings(samples=5, concurrency=4))
        assert standin.asked.total() == 50
        run(standin, tmp_path, Settings(samples=4, concurrency=4, temperature=0.9))
        assert standin.asked.total() == 90


@pytest.mark.long
def test_passing_faults_are_retried(tmp_path):
    def behave(kind, body, number):
        faults = [(500, b"x"), (503, b"x"), (429, b"x"), (0, b""), (200, b"<html>"), (200, {"choices": []})]
        return faults[number % 12 // 2] if number % 2 else right(kind, body, number)

    with StandIn(behave) as standin:
        report = run(standin, tmp_path, limits=RequestLimits(timeout=PATIENCE, tries=20, wait=0.01))
    assert report.complete
    assert report.results[0].mean.value == 0.5
    assert not report.results[0].problems


@pytest.mark.long
def test_a_slow_answer_times_out_and_is_counted(tmp_path):
    done = threading.Event()

    def behave(kind, body, number):
        if chr(body["prompt"][-2]) == "3":
            done.wait(60)
        return right(kind, body, number)

    with StandIn(behave) as standin:
        report = run(standin, tmp_path, limits=RequestLimits(timeout=3.0, tries=1))
        done.set()
    [result] = report.results
    assert result.problems == {"request failed: timed out": 4}
    assert not result.complete
    assert result.mean.value == pytest.approx(5 / 9)
    assert result.bounds == (0.5, 0.6)
    assert "Incomplete: 50.0 if all that is missing were wrong, 60.0 if right" in report.markdown()


@pytest.mark.parametrize("reason", ["abort", None, "error"])
def test_what_a_server_has_when_it_is_ended_is_no_answer(tmp_path, reason):
    """vLLM sends the first words of what was in flight, with 200."""

    def behave(kind, body, number):
        land, half = chr(body["prompt"][-2]), text_reply("The correct answer is city", finish=reason)
        again = standin.asked[tuple(body["prompt"]), body["seed"]] > 1
        return half if land == "4" or (land == "8" and not again) else right(kind, body, number)

    with StandIn(behave) as standin:
        report = run(standin, tmp_path, Settings(samples=1, concurrency=2))
        assert standin.asked.total() == 8 + 2 + QUICK.tries
    [result] = report.results
    problem = f"request failed: the answer is not whole (finish_reason {reason!r})"
    assert result.problems == {problem: 1}
    assert result.mean.value == pytest.approx(4 / 9)
    with StandIn(right) as standin:
        assert run(standin, tmp_path, Settings(samples=1, concurrency=2)).results[0].mean.value == 0.5
        assert standin.asked.total() == 1


@pytest.mark.parametrize("reason", ["eos", "eos_token", "stop_sequence"])
def test_servers_have_other_words_for_an_end(tmp_path, reason):
    def behave(kind, body, number):
        status, answer = right(kind, body, number)
        answer["choices"][0]["finish_reason"] = reason
        return status, answer

    with StandIn(behave) as standin:
        assert run(standin, tmp_path, Settings(samples=1, concurrency=2)).complete
    journal = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert {json.loads(line)["finish"] for line in journal} == {"stop"}


def test_an_aborted_answer_in_a_journal_is_none(tmp_path):
    settings = Settings(samples=1, concurrency=2)
    with StandIn(right) as standin:
        whole = run(standin, tmp_path, settings)
    path = tmp_path / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0] |= {"text": "The correct", "finish": "abort"}
    del lines[1]["finish"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with StandIn(lambda *_: (400, {"error": "no"})) as standin:
        assert run(standin, tmp_path, settings).results[0].counts["answered"] == 8
    with StandIn(right) as standin:
        assert run(standin, tmp_path, settings) == whole
        assert standin.asked.total() == 2


def test_a_refused_sample_is_counted_and_not_retried(tmp_path):
    def behave(kind, body, number):
        if chr(body["prompt"][-2]) == "2" and body["seed"] == 1:
            return 400, {"error": {"message": f"maximum context length is 4096, found {5000 + number}"}}
        return right(kind, body, number)

    with StandIn(behave) as standin:
        report = run(standin, tmp_path)
        assert standin.asked.total() == 40
    [result] = report.results
    assert result.problems == {"request failed: HTTP 400: maximum context length is …, found …": 1}
    assert result.mean.value == 0.5
    assert not report.complete


@pytest.mark.long
def test_an_endpoint_that_dies_ends_the_run_and_keeps_what_is_done(tmp_path):
    def behave(kind, body, number):
        standin.dead = standin.dead or number > 17
        return (0, b"") if standin.dead else right(kind, body, number)

    with StandIn(behave) as standin:
        with pytest.raises(EndpointDied, match="hold what is done") as died:
            run(standin, tmp_path)
        assert died.value.exit_code != 0
        done = read_report(tmp_path).results[0].counts["answered"]
        assert 17 - SETTINGS.concurrency <= done <= 17
    with StandIn(right) as standin:
        report = run(standin, tmp_path)
        assert standin.asked.total() == 40 - done
    assert report.complete
    assert report.results[0].mean.value == 0.5


def test_an_endpoint_that_lists_models_but_answers_nothing_counts_as_dead(tmp_path):
    with StandIn(lambda *_: (500, b"")) as standin, pytest.raises(EndpointDied, match="in a row"):
        run(standin, tmp_path, limits=RequestLimits(timeout=PATIENCE, tries=1, wait=0.01))


def test_nothing_at_the_endpoint(tmp_path):
    with StandIn(right) as standin:
        url = standin.url
    with pytest.raises(EndpointDied, match="check the URL"):
        asyncio.run(_enter(url))
    with pytest.raises(SpellError, match="http://host:8000"):
        asyncio.run(_enter("localhost:8000"))


async def _enter(url: str) -> None:
    async with Endpoint(url, limits=QUICK):
        pass


def test_several_served_models_must_be_told_apart():
    with StandIn(right, models=2) as standin, pytest.raises(SpellError, match="model-0, model-1"):
        asyncio.run(_enter(standin.url + "/v1"))


CUT = "the judge's reply was cut at its output limit"


def cut_reply(text: str):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": "length"}]}


def test_half_a_reply_of_a_judge_is_no_verdict(tmp_path):
    settings = Settings(samples=1, concurrency=1)

    def judge(kind, body, number):
        return cut_reply("It does NOT") if number == 1 else chat_reply("It is the same: [[YES]]")

    with StandIn(right) as standin, StandIn(judge) as judging:
        report = run(standin, tmp_path, settings, benchmark=Capitals(), judge=judging)
        assert judging.chats == 5 + 1
    assert (report.complete, report.results[0].mean.value) == (True, 1.0)
    with StandIn(lambda *_: cut_reply("NO doubt. [[YES]]")) as judging:
        asked = ExternalJudgeConfig(url=judging.url, tries=2)
        opinion = asyncio.run(_opinion(RewardJudge(asked)))
        assert judging.chats == 2
    assert (opinion.score, "cut" in opinion.fault) == (None, True)


async def _opinion(judge: RewardJudge):
    return await judge(Question("doc_general_qa", "Who?", "plum"), "pear")


@pytest.mark.long
def test_the_judge_is_asked_only_where_the_rule_failed_and_once(tmp_path):
    def judge(kind, body, number):
        prompt = body["messages"][0]["content"]
        return chat_reply("[[YES]]" if "land 1?" in prompt else "It does NOT agree. [[NO]]")

    with StandIn(right) as standin, StandIn(judge) as judging:
        report = run(standin, tmp_path, benchmark=Capitals(), judge=judging)
        [result] = report.results
        assert judging.chats == 5  # the four samples of a question gave the same answer
        assert result.mean.value == 0.6
        assert result.rule.value == 0.5
        assert result.scoring == "max(rule, judge model-0)"
        assert result.counts["judged"] == 20
        before = judging.chats
        assert run(standin, tmp_path, benchmark=Capitals(), judge=judging) == report
        assert judging.chats == before
    with StandIn(right) as standin:
        ruled = run(standin, tmp_path, benchmark=Capitals())
    assert ruled.results[0].scoring == "rule only, no judge"


def test_official_and_bracketed_verdicts_are_both_kept(tmp_path):
    with StandIn(right) as standin, StandIn(lambda *_: chat_reply("They do NOT differ. [[YES]]")) as judging:
        spell = run(standin, tmp_path, benchmark=Capitals(), judge=judging).results[0]
        settings = Settings(samples=4, concurrency=4, mode="strict")
        strict = run(standin, tmp_path, settings, benchmark=Capitals(), judge=judging).results[0]
    assert (spell.mean.value, strict.mean.value) == (0.5, 1.0)
    assert spell.metrics["judge says yes (official)"] == 0.0
    assert spell.metrics["judge says yes (bracketed)"] == 1.0


@pytest.mark.long
@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (lambda *_: chat_reply("I would rather not say."), "no verdict in the judge's reply"),
        (lambda *_: (500, b""), "the judge is silent: HTTP 500"),
        (lambda *_: (401, {"error": "no key"}), "the judge refused: HTTP 401: no key"),
        (None, "the judge is silent: timed out"),
        (lambda *_: cut_reply("So it is NOT the same, or is [[YES]]"), CUT),
    ],
)
def test_a_judge_that_fails_leaves_samples_unjudged_not_wrong(judge, reason, tmp_path):
    settings, over = Settings(samples=2, concurrency=4), threading.Event()
    seconds = PATIENCE if judge else 0.5
    with StandIn(right) as standin, StandIn(judge or (lambda *_: over.wait(PATIENCE))) as judging:
        report = run(standin, tmp_path, settings, benchmark=Capitals(), judge=judging, judge_seconds=seconds)
        over.set()
        assert judging.chats <= 5 * TRIES  # two equal answers of a question are one request
    [result] = report.results
    assert result.problems == {f"not judged: {reason}": 10}
    assert result.mean.value == 1.0
    assert result.mean.questions == 5
    assert result.bounds == (0.5, 1.0)
    assert result.rule.value == 0.5
    assert not report.complete


@pytest.mark.long
def test_a_judge_that_recovers_is_asked_again_on_the_next_run(tmp_path):
    settings = Settings(samples=1, concurrency=4)
    with StandIn(right) as standin:
        with StandIn(lambda *_: chat_reply("hm")) as judging:
            run(standin, tmp_path, settings, benchmark=Capitals(), judge=judging)
        with StandIn(lambda *_: chat_reply("[[YES]]")) as judging:
            report = run(standin, tmp_path, settings, benchmark=Capitals(), judge=judging)
        assert standin.asked.total() == 10
        assert report.results[0].mean.value == 1.0
        assert report.complete


@pytest.mark.long
def test_unreadable_helmet_verdicts_score_zero_and_are_counted(tmp_path):
    def judge(kind, body, number):
        prompt = body["messages"][0]["content"]
        if "fluency" in prompt:
            return chat_reply('{"fluency": 1}')
        if '{"recall": 3}' in prompt:
            return chat_reply('so {"recall": 1}')
        return chat_reply('{"precision": 3, "sentence_count": 4}' if "novel" in prompt else "three of four")

    with StandIn(lambda *_: text_reply("Summary: It rained.")) as standin, StandIn(judge) as judging:
        settings = Settings(samples=4, concurrency=4, protocol="official")
        [result] = run(standin, tmp_path, settings, benchmark=Summary(), judge=judging).results
        assert standin.asked.total() == 2  # greedy: one answer each
    recall, precision = 1 / 2, 3 / 4
    f1 = 2 * recall * precision / (recall + precision)
    assert result.mean.value == pytest.approx(f1 / 2)
    assert result.problems == {"no verdict in the judge's reply (scored 0)": 1}
    assert result.scoring == "judge model-0"


@pytest.mark.long
def test_prompts_that_do_not_fit_are_skipped_or_cut(tmp_path):
    class Long(Unjudged):
        def load(self, data):
            return [Item("a", ({"role": "user", "content": "x" * 50},), "?", ("y",)), *super().load(data)]

    class Whole(Long):
        paper = Terms(cut="skip")

    with StandIn(lambda *_: text_reply("The correct answer is y.")) as standin:
        cut = run(standin, tmp_path / "cut", benchmark=Long(), max_input=20).results[0]
        assert max(len(prompt) for prompt, _ in standin.asked) == 20
        assert cut.counts["prompts cut"] == 1
        assert cut.complete
        assert cut.counts["asked"] == 44
    with StandIn(right) as standin:
        for _ in range(2):
            whole = run(standin, tmp_path / "whole", benchmark=Whole(), max_input=20).results[0]
        assert whole.counts["skipped questions"] == 1
        assert whole.complete
        assert whole.counts["asked"] == 40
        assert standin.asked.total() == 40


class Window:
    """A source whose window of tokens bounds the output; the answer needs ten."""

    identity = ("m",)

    def __init__(self, tokens: int | None) -> None:
        self.max_model_len = tokens
        self.wanted: list[int] = []

    async def complete(self, prompt, *, seed, max_tokens, temperature, top_p) -> Completion:
        self.wanted.append(max_tokens)
        if max_tokens < 10:
            return Completion("Let us see", "length", max_tokens)
        return Completion("The correct answer is city 0.", "stop", 10)

    async def alive(self) -> bool:
        return True


def test_an_answer_that_the_window_cut_is_asked_for_again_when_the_window_has_grown(tmp_path):
    class One(Unjudged):
        def load(self, data):
            return super().load(data)[:1]

    def ask(window: int | None, max_tokens: int = 50) -> tuple[list[int], float, list[str]]:
        source, asked = Window(window), Settings(samples=1, concurrency=1, max_tokens=max_tokens)
        plans = plan([(One(), One().load(Data(None)), {})], [1000], WordCodec(), asked)
        console = Terminal(file=io.StringIO())
        report = asyncio.run(measure(source, WordCodec(), plans, asked, tmp_path, "m", console=console))
        [result] = report.results
        assert result.complete
        return source.wanted, result.mean.value, list(result.problems)

    sent = len("Capital of land 0?")
    limited = ["output limited by max_model_len"]
    assert ask(sent + 5) == ([5], 0.0, limited)
    assert ask(sent + 5) == ([], 0.0, limited)
    assert ask(sent + 4) == ([], 0.0, limited)
    assert ask(sent + 7) == ([7], 0.0, limited)
    assert ask(sent + 20) == ([20], 1.0, [])
    assert ask(None) == ([], 1.0, [])
    assert ask(sent + 20, max_tokens=6) == ([6], 0.0, [])  # cut at the limit that was wanted
    assert ask(None, max_tokens=6) == ([], 0.0, [])


@pytest.mark.parametrize(
    ("error", "problem", "mean"),
    [
        (OverflowError("too large"), "the scorer failed: OverflowError: too large (scored 0)", 4 / 10),
        (ImportError("no rouge"), "not judged: the scorer lacks a library: no rouge", 4 / 9),
    ],
)
def test_an_answer_at_which_the_scorer_stumbles_is_wrong_and_counted(tmp_path, error, problem, mean):
    """A library that is not there is no fault of the answer's."""

    class Stumbles(Unjudged):
        def grade(self, item, answer, mode):
            if item.id == "2":
                raise error
            return super().grade(item, answer, mode)

    with StandIn(right) as standin:
        [result] = run(standin, tmp_path, benchmark=Stumbles()).results
    assert result.problems == {problem: 4}
    assert result.mean.value == pytest.approx(mean)
    assert result.complete == isinstance(error, OverflowError)


HOSTILE = [
    "![.](https://evil.example/x.png)",
    "[sign in](https://evil.example)",
    "[1, 2](https://evil.example)",
    "[[1, 2]](https://evil.example)",
    "<img src=https://evil.example/x.png>",
    "<https://evil.example>",
    "`code` **bold** _leaning_ __bold__",
    "a | b \\| c \\",
    "&lt;b&gt; &amp;",
    "\\[x](https://evil.example)",
]
FRIENDLY = [
    "50.0 [20.0, 80.0]",
    "+20.0 [-1.0, +41.0], 2/0",
    "max(rule, judge gpt_oss-120b)",
    "runs/qwen3_4b-16k/hf",
    "o200k tokens",
    "4K-8K",
    "p.m., 12:30 – 5 × 4",
]


@pytest.mark.parametrize("words", [*HOSTILE, *FRIENDLY])
def test_words_in_a_page_stay_words(words):
    render = MarkdownIt("commonmark").enable("table").render
    page = [
        "# " + literal(words),
        "",
        "* 1 × " + literal(words),
        "",
        *table(["head", words], [["cell", words]]),
    ]
    shown = render("\n".join(page))
    tags = r"h1|ul|li|table|thead|tbody|tr|th|td"
    assert re.sub(rf"</?(?:{tags})>|\n", " ", shown).count("<") == 0
    plain = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert shown.count(plain) == 4
    assert "://" not in "\n".join(page)
    assert (literal(words) == words) == (words in FRIENDLY)


def test_what_an_endpoint_says_is_no_markup_of_a_report(tmp_path):
    def behave(kind, body, number):
        return 400, {"error": {"message": "![.](https://evil.example/x.png) <img src=x> [sign in](//evil)"}}

    with StandIn(behave) as standin:
        page = run(standin, tmp_path).markdown()
    shown = MarkdownIt("commonmark").enable("table").render(page)
    assert "evil" in shown
    assert not re.search("<(?:img|a)[ >]", shown)


def test_head_cut_drops_the_tail_of_the_context_alone():
    context = "".join(map(str, range(100)))
    item = Item(
        "a", ({"role": "user", "content": f"Read: {context}\nNow write."},), "?", ("y",), context=context
    )
    prompt = build("head", item, WordCodec(), 60)
    text = WordCodec().decode(prompt.ids)
    assert len(text) <= 60
    assert text.startswith("Read: 0123456789")
    assert text.endswith("\nNow write.")
    assert build("head", item, WordCodec(), 10).ids is None
    assert build("skip", item, WordCodec(), 60).ids is None


def test_a_template_that_opens_thinking_is_noticed():
    class Thinker(WordCodec):
        def conversation(self, messages):
            return super().conversation(messages) + self.encode("<think>\n")

    assert prefills_thinking(Thinker())
    assert not prefills_thinking(WordCodec())


def test_journal_survives_a_half_written_line_and_damage(tmp_path, monkeypatch, caplog):
    def without_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    path = tmp_path / "j.jsonl"
    with KeyedJournal(path) as journal:
        journal.append("a", {"text": "1"})
        journal.append("b", {"text": "zwei ≠ 2"})
    with path.open("ab") as stream:
        stream.write(b"\xff garbage\n" + b"[" * 200_000 + b"\n")
        stream.write(b'{"key": "c", "te')
    with KeyedJournal(path) as journal:
        assert len(journal) == 2
        assert journal.damaged == 2
        assert journal.get("b") == {"text": "zwei ≠ 2"}
        journal.append("c", {"text": "3"})
        with pytest.raises(SpellError, match="another run"):
            KeyedJournal(path)
        monkeypatch.setattr(fcntl, "flock", without_locks)
        with KeyedJournal(path) as other:
            assert other.get("c") == {"text": "3"}
        assert "cannot be locked (Function not implemented)" in caplog.text
    with KeyedJournal(path) as journal:
        assert journal.get("c") == {"text": "3"}


@pytest.mark.long
def test_comparison_is_paired_by_question(tmp_path):
    with StandIn(right) as standin:
        before = run(standin, tmp_path / "before")
    better = {0, 1, 2, 3, 4, 6, 8}

    def behave(kind, body, number):
        land = int(chr(body["prompt"][-2]))
        return text_reply(f"The correct answer is city {land if land in better else 'X'}.")

    with StandIn(behave) as standin:
        after = run(standin, tmp_path / "after")
    [(_, means, [difference])] = compare([before, after]).rows
    assert [mean.value for mean in means] == [0.5, 0.7]
    assert (difference.difference.value, difference.better, difference.worse) == (pytest.approx(0.2), 2, 0)
    assert "+20.0" in compare([before, after]).markdown()


def test_a_difference_is_weighed_as_the_headline_is(tmp_path):
    class Sets(Unjudged):
        name = "helmet-rag"
        macro = "set"

        def load(self, data):
            items = super().load(data)
            return [replace(item, labels={"set": "a" if item.id < "8" else "b"}) for item in items]

    with StandIn(lambda *_: text_reply("none")) as standin:
        before = run(standin, tmp_path / "before", benchmark=Sets())
    with StandIn(right) as standin:
        after = run(standin, tmp_path / "after", benchmark=Sets())
    [(_, means, [gain])] = compare([before, after]).rows
    assert [mean.value for mean in means] == [0.0, 0.5]
    assert gain.difference.value == 0.5
    assert (gain.better, gain.worse) == (5, 0)

    def wrong_in_one_set(kind, body, number):
        return right(kind, body, number) if chr(body["prompt"][-2]) < "8" else text_reply("none")

    with StandIn(wrong_in_one_set) as standin:
        after = run(standin, tmp_path / "half", benchmark=Sets())
    [(_, means, [gain])] = compare([before, after]).rows
    assert means[1].value == gain.difference.value == 0.25


def test_endpoint_tells_refusal_from_silence():
    async def ask(url: str) -> str:
        async with Endpoint(url, limits=QUICK) as endpoint:
            return await endpoint.chat("?", max_tokens=1, seed=0)

    with (
        StandIn(lambda *_: (422, {"error": {"message": "bad"}})) as standin,
        pytest.raises(Refused, match="bad"),
    ):
        asyncio.run(ask(standin.url))
    with StandIn(lambda *_: (200, {"choices": [{"message": {"content": None}}]})) as standin:
        with pytest.raises(Unanswered, match="no message"):
            asyncio.run(ask(standin.url))
        assert standin.chats == QUICK.tries


WORDS = st.text(st.characters(exclude_categories=[]), max_size=40)
SHAPES: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["choices", "usage", "error", "message", "text", "a"]), inner)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def nowhere() -> Endpoint:
    return Endpoint("http://127.0.0.1:9", limits=RequestLimits(tries=1))


@settings(max_examples=100, deadline=None)
@given(
    status=st.sampled_from([200, 400, 429, 500]),
    answer=st.binary(max_size=80) | SHAPES.map(lambda value: json.dumps(value).encode()),
)
@example(200, b'{"choices":' + b"[" * 200_000)
@example(400, b'{"error":' + b"[" * 200_000)
@example(400, b'{"error":{"message":"\\ud800 \\u001b[2J"}}')
@example(
    200,
    b'{"choices":[{"text":"5","finish_reason":"stop"}],"usage":{"completion_tokens":' + b"9" * 5000 + b"}}",
)
@example(
    200,
    b'{"choices":[{"text":"5","finish_reason":"stop"}],"usage":{"completion_tokens":' + b"9" * 400 + b"}}",
)
@example(200, b'{"choices":[{"text":"5","finish_reason":"stop"}],"usage":{"completion_tokens":-5}}')
def test_whatever_an_endpoint_answers_is_a_completion_or_a_fault_in_words(
    nowhere: Endpoint, status: int, answer: bytes
) -> None:
    async def exchange(*_: object) -> tuple[int, bytes]:
        return status, answer

    async def ask() -> list[Any]:
        nowhere._turn = 0.0
        completion = nowhere.complete([1], seed=0, max_tokens=1, temperature=1.0, top_p=1.0)
        reply = nowhere.chat("?", max_tokens=1, seed=0)
        return await asyncio.gather(completion, reply, return_exceptions=True)

    nowhere._exchange = exchange  # type: ignore[method-assign]
    for answered in asyncio.run(ask()):
        if isinstance(answered, (Refused, Unanswered)):
            assert str(answered) == line(str(answered)) and len(str(answered)) < 300
        else:
            assert isinstance(answered, str) or 0 <= answered.tokens < 1 << 30


ONE_MODEL = b'{"data": [{"id": "m"}]}'


@pytest.mark.parametrize(
    ("status", "listed", "said"),
    [
        *(
            (200, listed, "no OpenAI-comp")
            for listed in (b"[" * 200_000, b"{}", b'{"data": 7}', b'{"data": ["m"]}')
        ),
        *((200, listed, "no OpenAI-comp") for listed in (b"\xff", b" " * 300_000 + ONE_MODEL)),
        (
            401,
            b'{"error": "who are you?"}',
            r"refuses the key \(HTTP 401: who are you\?\): set SPELL_API_KEY",
        ),
    ],
)
def test_an_endpoint_that_lists_no_models_is_said_to_be_none(
    status: int, listed: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "LARGEST", 250_000)

    class Odd(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(listed)

        def log_message(self, *_: object) -> None: ...

    async def ask(url: str) -> None:
        async with Endpoint(url, limits=QUICK):
            raise AssertionError("it was believed")

    with HTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(SpellError, match=said):
            asyncio.run(ask(f"http://127.0.0.1:{server.server_port}"))


def test_a_reports_words_may_be_any(tmp_path: Path) -> None:
    Report("m\ud800", {"protocol": "paper"}, [], {}).write(tmp_path)
    assert read_report(tmp_path).model == "m?"


def test_an_endpoint_that_serves_other_weights_of_the_same_folder_is_asked_anew(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"one")
    with StandIn(right, root=str(model)) as standin:
        run(standin, tmp_path / "out")
        asked = standin.asked.total()
        run(standin, tmp_path / "out")
        assert standin.asked.total() == asked > 0
        (model / "model.safetensors").write_bytes(b"another")
        run(standin, tmp_path / "out")
        assert standin.asked.total() == 2 * asked


def test_live_engines_are_a_source_too(tmp_path):
    class Engine:
        version = 3
        dead = False

        async def generate(self, prompt, *, seeds, max_tokens, temperature, top_p):
            if self.dead:
                raise EngineError("gone")
            land = chr(prompt[-2])
            tokens = WordCodec().encode(f"The correct answer is city {land if land in '02468' else 'X'}.")
            return [Rollout(prompt, tokens, [0.0] * len(tokens), "stop", self.version) for _ in seeds]

        def healthy(self):
            return not self.dead

    async def go(engine: Engine) -> Report:
        source = LiveSource(engine, WordCodec(), "run")
        plans = plan([(Unjudged(), Unjudged().load(Data(None)), {})], [1000], WordCodec(), SETTINGS)
        console = Terminal(file=io.StringIO())
        return await measure(source, WordCodec(), plans, SETTINGS, tmp_path, "live", console=console)

    engine = Engine()
    assert asyncio.run(go(engine)).results[0].mean.value == 0.5
    engine.version = 4  # other weights: nothing of version 3 counts for them
    engine.dead = True
    with pytest.raises(EndpointDied, match="gone"):
        asyncio.run(go(engine))


@pytest.mark.parametrize("fails", [False, True])
def test_a_benchmark_that_is_incomplete_is_no_point_of_a_curve(tmp_path, caplog, fails):
    """A mean of the questions that happened to be answered looks like any other."""

    class Engine:
        version = 3
        asked = 0

        async def generate(self, prompt, *, seeds, max_tokens, temperature, top_p):
            self.asked += 1
            if fails and self.asked == 2:
                raise EngineError("timed out")
            return [Rollout(prompt, [65], [0.0], "stop", self.version)]

        def healthy(self):
            return True

    settings = [
        "heldout.benchmarks=[toy]",
        "heldout.limit=4",
        "heldout.samples=1",
        "rollout.max_model_len=60000",
    ]
    live = LiveBenchmarks(load_config("toy", settings))
    with caplog.at_level(logging.WARNING):
        scores = asyncio.run(live(Engine(), WordCodec(), tmp_path))
    assert scores == ({} if fails else {"eval/toy": 0.0})
    assert ("toy: 3 of 4 samples scored" in caplog.text) == fails
    assert ("incomplete" in (tmp_path / "report.md").read_text()) == fails


def test_weights_that_an_engine_wants_again_are_for_the_run_to_send(tmp_path):
    """All engines died and came back: no death of an endpoint, and no sample that failed."""

    class Back:
        version = 3

        async def generate(self, prompt, **_):
            raise WeightsWanted("send them again")

        def healthy(self):
            return False

    async def go() -> Report:
        source = LiveSource(Back(), WordCodec(), "run")
        plans = plan([(Unjudged(), Unjudged().load(Data(None)), {})], [1000], WordCodec(), SETTINGS)
        console = Terminal(file=io.StringIO())
        return await measure(source, WordCodec(), plans, SETTINGS, tmp_path, "live", console=console)

    with pytest.raises(WeightsWanted, match="send them again"):
        asyncio.run(go())


NEUTRAL = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def test_no_sampling_is_left_to_a_generation_config():
    """A plain `vllm serve` takes from the model's what a request does not say. Others refuse what is not OpenAI's."""
    bodies: list[dict[str, Any]] = []

    def behave(kind, body, number):
        bodies.append(body)
        return chat_reply("yes") if kind == "chat" else right(kind, body, number)

    async def ask(url: str, window: int | None) -> None:
        async with Endpoint(url, limits=QUICK) as endpoint:
            assert endpoint.max_model_len == 4096
            endpoint.max_model_len = window
            await endpoint.complete([ord("1"), 1], seed=0, max_tokens=4, temperature=0.7, top_p=0.9)
            await endpoint.chat("?", max_tokens=4, seed=0)

    with StandIn(behave) as standin:
        for window in (4096, None):
            asyncio.run(ask(standin.url, window))
    said = [{name: body[name] for name in NEUTRAL if name in body} for body in bodies]
    assert said == [NEUTRAL, NEUTRAL, NEUTRAL, {}]


class Kinds(Capitals):
    """A file of three subsets, one behind the other."""

    judged = False

    def load(self, data):
        kinds = "aaaaaabbbc"
        return [replace(i, labels={"kind": kinds[int(i.id)]}) for i in super().load(data)]


def test_a_limit_takes_of_every_subset_its_share(tmp_path):
    def asked(limit: int | None) -> list[str]:
        settings = replace(SETTINGS, limit=limit)
        [chosen] = plan([(Kinds(), Kinds().load(Data(None)), {})], [1000], WordCodec(), settings)
        return [item.id for item in chosen.items]

    assert asked(5) == ["0", "6", "1", "2", "7"]
    assert asked(8) == ["0", "6", "1", "2", "7", "9", "3", "4"]
    assert asked(99) == ["0", "6", "1", "2", "7", "9", "3", "4", "8", "5"]
    assert asked(None) == [str(i) for i in range(10)]
    with StandIn(right) as standin:  # a larger limit asks for what is new
        for limit in (5, 8):
            report = run(standin, tmp_path, replace(SETTINGS, limit=limit), benchmark=Kinds())
        assert standin.asked.total() == 8 * SETTINGS.samples
    assert set(report.results[0].subsets["kind"]) == {"a", "b", "c"}


@pytest.mark.parametrize("settings", [Settings(limit=-5), Settings(limit=0), Settings(max_tokens=-1)])
def test_bounds_below_one_are_refused(settings):
    with pytest.raises(SpellError, match=r"--(limit|max-tokens) is at least 1, found -?\d"):
        evaluate(["toy"], endpoint="http://127.0.0.1:9", settings=settings)


def serving(folder: Path, names: list[str], max_input: int, window: int):
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": window, "dtype": "float32"}))
    loaded = [(benchmark, [], {}) for benchmark in find(names)]
    console = Terminal(file=io.StringIO())
    work = _Work(loaded, [max_input], Settings(max_tokens=100), JudgeSettings(), folder, console)
    return work.serving(folder)


def test_a_served_window_has_room_for_benchmarks_of_both_kinds(tmp_path):
    """Those without an input limit have prompts of up to 8,192 tokens."""
    rest = 100 + 512
    for names, limit, longest in (
        (["frames", "mmlu-pro"], 1_024, 8_192),
        (["frames"], 1_024, 1_024),
        (["frames", "mmlu-pro"], 16_384, 16_384),
        (["mmlu-pro"], 16_384, 8_192),
    ):
        assert serving(tmp_path, names, limit, 100_000).max_model_len == longest + rest
    assert serving(tmp_path, ["mmlu-pro"], 16_384, 4_096).max_model_len == 4_096
    for limit in (4_097, 8_192, 16_384):
        with pytest.raises(SpellError, match=f"--max-input {limit} is longer"):
            serving(tmp_path, ["frames"], limit, 4_096)


def test_a_rate_bounds_requests_a_second(tmp_path):
    times = []

    def behave(kind, body, number):
        times.append(time.monotonic())
        return right(kind, body, number)

    with StandIn(behave) as standin:
        limits = RequestLimits(timeout=PATIENCE, tries=1, rate=50.0)
        began = time.monotonic()
        run(standin, tmp_path, Settings(samples=2, concurrency=20), limits=limits)
    assert len(times) == 20
    for place, asked in enumerate(sorted(times)):  # each may be late, and none early
        assert asked - began >= place / 50


def test_special_tags_of_thought_are_asked_for():
    """A server leaves special tokens out of its text: a flagged `<think>` would be lost, and the reasoning graded."""
    bodies = []

    def behave(kind, body, number):
        bodies.append(body)
        return right(kind, body, number)

    async def ask(url, shows):
        async with Endpoint(url, limits=QUICK) as endpoint:
            endpoint.shows_special = shows
            await endpoint.complete([ord("1"), 1], seed=0, max_tokens=4, temperature=0.0, top_p=1.0)

    with StandIn(behave) as standin:
        for shows in (True, False):
            asyncio.run(ask(standin.url, shows))
    assert [body.get("skip_special_tokens") for body in bodies] == [False, None]
