"""Model output of any kind is read in bounded time, without an error and without being run."""

from __future__ import annotations

import json
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.selfplay.grading import extract_answer
from spell_megatron.selfplay.parsing import parse_question, parse_verdict
from spell_megatron.selfplay.reading.thoughts import strip_thinking
from spell_megatron.selfplay.tasks import Failure
from spell_megatron.selfplay.tasks.number import math_equal
from spell_megatron.types import Question

pytestmark = pytest.mark.unit

TASKS = ("doc_general_qa", "docmath_qa", "doc_mc")
OPTIONS = {"A": "one", "B": "two", "C": "three", "D": "four"}


def outcome(text: str, task: str, key: str | None = None) -> str:
    parsed = parse_question(text, task, key)
    return parsed.outcome if isinstance(parsed, Failure) else "question"


def written(**fields: object) -> str:
    return f"Some reasoning with {{braces}}.\n```json\n{json.dumps(fields)}\n```"


def test_a_good_question_of_each_task():
    assert parse_question(written(question=" Who? ", answer=" Ada "), "doc_general_qa") == Question(
        "doc_general_qa", "Who?", "Ada"
    )
    assert parse_question(written(question="How many?", answer=12.5), "docmath_qa") == Question(
        "docmath_qa", "How many?", "12.5"
    )
    padded = {f" {letter}": f" {text} " for letter, text in OPTIONS.items()}
    assert parse_question(written(question="Which?", options=padded, answer=" C"), "doc_mc", "C") == Question(
        "doc_mc", "Which?", "C", OPTIONS
    )


def test_the_last_object_with_a_question_counts():
    text = written(question="First?", answer="a") + written(question="Second?", answer="b")
    parsed = parse_question(text + ' and {"note": 1}', "doc_general_qa")
    assert isinstance(parsed, Question)
    assert parsed.text == "Second?"


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("no object", "doc_general_qa"),
        ('{"question": "Who?"', "doc_general_qa"),
        (written(question="Who?"), "doc_general_qa"),
        (written(answer="Ada"), "doc_general_qa"),
        (written(question="", answer="Ada"), "doc_general_qa"),
        (written(question="Who?", answer=" "), "doc_general_qa"),
        (written(question="Who?", answer=["Ada"]), "doc_general_qa"),
        (written(question={"x": 1}, answer="Ada"), "doc_general_qa"),
        (written(question="How many?"), "docmath_qa"),
        (written(question="How many?", answer=True), "docmath_qa"),
        (written(question="How many?", answer=None), "docmath_qa"),
        (written(question="Which?", answer="A"), "doc_mc"),
        (written(question="Which?", answer="E", options=OPTIONS), "doc_mc"),
        (written(question="Which?", answer="one", options=OPTIONS), "doc_mc"),
        (written(question="Which?", answer="A", options=list(OPTIONS.values())), "doc_mc"),
        (written(question="Which?", answer="A", options={"A": "one", "B": "two", "C": "three"}), "doc_mc"),
        (written(question="Which?", answer="A", options=OPTIONS | {"E": "five"}), "doc_mc"),
        (written(question="Which?", answer="A", options=OPTIONS | {"B": "One"}), "doc_mc"),
        (written(question="Which?", answer="A", options=OPTIONS | {"B": "One."}), "doc_mc"),
        (written(question="Which?", answer="A", options=OPTIONS | {"B": " "}), "doc_mc"),
        (written(question="Which?", answer="A", options=OPTIONS | {"B": None}), "doc_mc"),
    ],
)
def test_bad_formats(text: str, task: str):
    assert outcome(text, task) == "bad_format"


def test_another_key_than_the_one_asked_for_is_a_bad_format():
    text = written(question="Which?", answer="A", options=OPTIONS)
    assert outcome(text, "doc_mc", "A") == "question"
    assert outcome(text, "doc_mc", "B") == "bad_format"


@pytest.mark.parametrize(
    ("text", "task", "kind"),
    [
        ("<think> without an end", "doc_mc", "dropped:over_long"),
        (written(question="How many?", answer=0), "docmath_qa", "dropped:not_a_number"),
        (written(question="How many?", answer="0.0"), "docmath_qa", "dropped:not_a_number"),
        (written(question="How many?", answer="many"), "docmath_qa", "dropped:not_a_number"),
        (written(question="How many?", answer="3 or 4"), "docmath_qa", "dropped:not_a_number"),
        (written(question="Who?", answer="word " * 41), "doc_general_qa", "dropped:long_reference"),
    ],
)
def test_what_is_dropped_without_a_penalty(text: str, task: str, kind: str):
    assert outcome(text, task) == kind


def test_a_reference_of_just_the_limit_is_accepted():
    assert outcome(written(question="Who?", answer="word " * 40), "doc_general_qa") == "question"


def test_thinking():
    assert strip_thinking("<think>a</think>b") == "b"
    assert strip_thinking("a</think>b</think>c") == "c"
    assert strip_thinking("plain") == "plain"
    assert strip_thinking("<think>open") is None
    assert strip_thinking("<think>a</think>b<think>c") is None


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("They agree. [[YES]]", 1),
        ("They differ. [[NO]]", 0),
        ("[[yes]]", 1),
        ("[[YES]] or [[NO]]", None),
        ("YES", None),
        ("", None),
        ("<think>[[YES]]", None),
        ("<think>[[NO]]</think>[[YES]]", 1),
    ],
)
def test_verdicts(text: str, vote: int | None):
    assert parse_verdict(text) == vote


PIECES = (
    *('{"question": "', '", "answer": "', '"}', "{", "}", "[", "]", '"', "\\", "\\u", "\\ud800", ":", ","),
    *(
        '{"question": "Q", "answer": ',
        '{"question": "Q", "options": {"A": "',
        '"options": ',
        "null",
        "NaN",
        "-Infinity",
    ),
    *(
        "The correct answer is (",
        "Therefore, the answer is ",
        "answer is",
        "\\boxed{",
        "(",
        ")",
        "A",
        "a",
        "**",
    ),
    *(
        "<think>",
        "</think>",
        "[[YES]]",
        "[[NO]]",
        "1e999",
        "-",
        "9",
        "9,",
        "/",
        "^",
        "10^",
        "*",
        "\\frac{1}{",
        ".",
        " ",
    ),
    *(
        "\n",
        "\x00",
        "\ufeff",
        "İ",
        "ß",
        "北",
        "\u202e",
        "🙂",
        "million",
        "approximately",
        "__import__('os')",
        "{{ x }}",
    ),
    *(
        "<answer>",
        "</answer>",
        "\\begin{equation}",
        "\\text{",
        "^{",
        "{,}",
        "\\,",
        "“",
        "’",
        "½",
        "⁴",
        "Ⓑ",
        "\u00a0",
    ),
    *(
        "Option ",
        " and B",
        "//",
        "/*",
        "#",
        "'",
        "Q3 ",
        "2019-03-05",
        "<sup>",
        "$$",
        "```",
        "\ufdfa",
        "§",
        " or ",
    ),
)


def hostile(draw: random.Random) -> str:
    """A string made of the pieces that parsers stumble over, now and then deep or huge."""
    kind = draw.random()
    if kind < 0.9:
        return "".join(draw.choices(PIECES, k=draw.randrange(1, 14)))
    if kind < 0.99:
        return "".join(draw.choices(string.printable, k=draw.randrange(1, 200)))
    if kind < 0.998:
        return draw.choice(PIECES) * draw.randrange(1, 3_000)
    return "".join(draw.choices(PIECES, k=4)) + draw.choice(PIECES) * 200_000


@pytest.mark.long
def test_a_hundred_thousand_hostile_strings():
    draw = random.Random(5)
    for number in range(100_000):
        text, task = hostile(draw), TASKS[number % 3]
        assert isinstance(parse_question(text, task, "A"), Question | Failure)
        assert parse_verdict(text) in (None, 0, 1)
        answer = extract_answer(task, text)
        assert answer is None or math_equal(answer, "12") in (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "{" * 1_000_000,
        "[" * 1_000_000,
        '{"question":' * 300_000,
        '{"question": "Q", "answer": ' + "[" * 500_000,
        '{"question": "Q", "answer": ' + "[" * 30_000,
        '{"question": "Q", "answer": ' + '{"a":' * 5_000,
        '{"question": "Q", "answer": ' + "9" * 100_000 + "}",
        '{"question": "Q", "answer": ' + "9" * 10_000 + "}",
        '{"question": "' + "Q" * 5_000_000,
        "\\boxed{" * 300_000,
        "answer is " * 300_000,
        "the answer is " + "(" * 300_000 + "1" + ")" * 300_000,
        "the answer is " + "1+" * 300_000 + "1",
        "the answer is " + "9" * 1_000_000,
        "the answer is " + "1," * 500_000,
        "answer" + " " * 1_000_000,
        "<think>" * 300_000,
    ],
    ids=lambda text: text[:24],
)
def test_endless_and_bottomless_texts(text: str):
    for task in TASKS:
        assert isinstance(parse_question(text, task), Question | Failure)
        extract_answer(task, text)
    math_equal(text, text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.long
@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from(["question", "answer", "options", " answer", "A"]), json_values),
    st.sampled_from(TASKS),
)
def test_any_object_is_a_question_or_a_failure(fields: dict, task: str):
    parsed = parse_question(f"x {json.dumps(fields)} y", task, "A")
    if isinstance(parsed, Question):
        assert parsed.text
        assert parsed.text == parsed.text.strip()
        assert parsed.answer
        assert (set(parsed.options) == set("ABCD")) == (task == "doc_mc")
        parsed.text.encode(), parsed.answer.encode()
