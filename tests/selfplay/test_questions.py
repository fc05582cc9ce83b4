"""The questioner's JSON is read as it was meant, and what is no question gets the right reason."""

from __future__ import annotations

import json
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spell_megatron import config
from spell_megatron.selfplay.heldout import known
from spell_megatron.selfplay.parsing import parse_question
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.reading.objects import last_object
from spell_megatron.selfplay.rewards import questioner_reward
from spell_megatron.selfplay.tasks import Failure
from spell_megatron.types import Cluster, Question, SpellError

pytestmark = pytest.mark.unit

TASK = "doc_general_qa"


def outcome(text: str, task: str = TASK, key: str | None = None) -> str:
    parsed = parse_question(text, task, key)
    return parsed.outcome if isinstance(parsed, Failure) else "question"


WORDS = st.text(
    st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\"'\\‘’“”„‟«»＂"), max_size=40
)
ANSWERS = WORDS.filter(lambda text: outcome(json.dumps({"question": "Who?", "answer": text})) == "question")
QUOTES = ('""', "''", "“”", "””", "„“", "‘’", "«»", "＂＂")


def written(fields: dict[str, str], quotes: str, comma: str, note: str, bare: bool) -> str:
    open_, close = quotes
    names = {name: name if bare else f"{open_}{name}{close}" for name in fields}
    pairs = f",{note} ".join(f"{names[name]} :{note} {open_}{text}{close}" for name, text in fields.items())
    return f"Reasoning with {{braces}}.\n```json\n{{{note}{pairs}{comma}{note}}}\n```\nDone."


@settings(max_examples=400)
@given(
    WORDS.filter(str.strip),
    ANSWERS,
    st.sampled_from(QUOTES),
    st.sampled_from(["", ",", " ,\n"]),
    st.sampled_from(["", "\n", " // so it is\n", " /* from document 2 */ ", " # see above\n"]),
    st.booleans(),
)
def test_spellings_with_one_meaning_are_read(
    question: str, answer: str, quotes: str, comma: str, note: str, bare: bool
) -> None:
    assume(not any(mark in question + answer for mark in ("<think>", "</think>")))
    text = written({"question": question, "answer": answer}, quotes, comma, note, bare)
    parsed = parse_question(text, TASK)
    if isinstance(parsed, Failure):  # nothing but the question can be at fault
        assert outcome(json.dumps({"question": question, "answer": "Ada"})) == parsed.outcome == "bad_format"
    else:
        assert (parsed.text, parsed.answer) == (question.strip(), answer.strip())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS.map(str.strip), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.long
@settings(max_examples=300)
@given(
    st.dictionaries(WORDS.map(str.strip), values, max_size=3),
    WORDS,
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_valid_json_is_read_as_it_is(
    fields: dict, question: str, ascii_only: bool, indent: int | None
) -> None:
    fields = {**fields, "question": question}
    found = last_object(f"x {json.dumps(fields, ensure_ascii=ascii_only, indent=indent)} y", "question")
    assert found is not None
    assert found.value == fields


COMMANDS = (
    *(
        "alpha",
        "beta",
        "frac{1}{2}",
        "text{EBIT}",
        "times",
        "theta",
        "tau",
        "rho",
        "nu",
        "neq",
        "nabla",
        "not",
        "bar x",
    ),
    *(
        "right",
        "underline{x}",
        "upsilon",
        "forall",
        "binom{2}{1}",
        "to",
        "tan",
        "$",
        "%",
        "&",
        "_",
        "(x)",
        "[x]",
        "{",
        "sum",
    ),
    *(
        "geq",
        "Delta",
        "mathbf{x}",
        "boxed{2}",
        "nonumber",
        "textbf{x}",
        "rightarrow",
        "begin{x}",
        "footnote{x}",
        "url{x}",
    ),
)


@pytest.mark.parametrize(("command", "escape"), product(COMMANDS, ("\\", "\\\\")))
def test_latex_keeps_its_backslashes(command: str, escape: str) -> None:
    parsed = parse_question(f'{{"question": "What is {escape}{command} here?", "answer": "drag"}}', TASK)
    assert isinstance(parsed, Question)
    assert parsed.text == f"What is \\{command} here?"


@pytest.mark.parametrize(
    ("escaped", "meant"),
    [
        ("one\\ntwo", "one\ntwo"),
        ("one\\n\\ntwo", "one\n\ntwo"),
        ("one\\tThe rest", "one\tThe rest"),
        ('\\"x\\"', '"x"'),
        ("a\\/b", "a/b"),
        ("\\u00e9", "é"),
        ("\\ud83d\\ude00", "😀"),
        ("\\ud83d!", "\ufffd!"),
        ("it\\'s", "it's"),
        ("C:\\\\temp", "C:\\temp"),
    ],
)
def test_escapes_of_json_mean_what_they_mean(escaped: str, meant: str) -> None:
    parsed = parse_question(f'{{"question": "Which {escaped}", "answer": "Ada"}}', TASK)
    assert isinstance(parsed, Question)
    assert parsed.text == f"Which {meant}"


@pytest.mark.parametrize(
    "text",
    [
        '{"question": "What is "EBIT" here?", "answer": "profit"}',
        "{'question': 'What's her name?', 'answer': 'Ada'}",
        "{‘question’: ‘What’s her name?’, ‘answer’: ‘Ada’}",
        '{"question": "What does {\'question\': 1, \'answer\': 2} mean?", "answer": "a dictionary"}',
        '{"note": {"question": 1}, "question": "Who?", "answer": "Ada", "sure": true, "tries": None, "rank": 1.5}',
        '{"question": "Who is in $\\frac{a_{1}}{b}$?", "answer": "Ada"}',
    ],
)
def test_quotes_apostrophes_and_braces_inside(text: str) -> None:
    parsed = parse_question(text, TASK)
    assert isinstance(parsed, Question)
    assert parsed.text[-1] == "?"


@pytest.mark.parametrize(
    "text",
    [
        '{"question": "Who?", "answer": "Ada"',
        '{"question": "Who?" "answer": "Ada"}',
        '{"question": "Who?",, "answer": "Ada"}',
        '{"question": "Who?", "answer": Ada}',
        '{"question": "Who?", "answer": "Ada}',
        '{"question": Who?, "answer": "Ada"}',
        "question: Who? answer: Ada",
        '{"question": "Who?", "answer": NaN}',
        '{"question": "Who?" /* never closed',
        '{"question": ' * 20 + '"Who?"' + "}" * 20,
    ],
)
def test_what_would_have_to_be_guessed_is_refused(text: str) -> None:
    assert outcome(text) == "bad_format"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"question": "What does </think> mean?", "answer": "the end"}', "question"),
        ('{"question": "What does <think> mean?", "answer": "the start"}', "question"),
        ('<think>hm</think>{"question": "Who wrote </think>?", "answer": "Ada"}', "question"),
        ('<think>a draft {"question": "Who?", "answer": "Ada"}', "dropped:over_long"),
        ('<think>a draft {"question": "Who?", "answer": "Ada"}</think> nothing', "bad_format"),
        ('{"question": "Who?", "answer": "Ada"}</think> nothing', "bad_format"),
        ('{"question": "Who?", "answer": "Ada"} <think>once more', "dropped:over_long"),
    ],
)
def test_tags_of_thought_may_be_named(text: str, kind: str) -> None:
    assert outcome(text) == kind


SAME = [
    ("the  Rhine", "the Rhine"),
    ("the\u00a0Rhine", "The\u2003Rhine."),
    ("Rhine", "\uff32hine"),
    ("Rh\u00adine", "Rhine"),
    ("O\u2019Neil", "O'Neil"),
    ("\u201cyes\u201d", '"Yes"'),
    ("1.0", "1"),
    ("1,000", "1000.00"),
    ("3\u20135", "3-5"),
    ("\u22125", "-5"),
    ("the cat", "cat"),
    *(
        ("50%", "50 %"),
        ("5 km", "5km"),
        ("Apollo 11", "Apollo11"),
        ("x = 5", "x=5"),
        ("1 000 km", "1,000 km"),
    ),
    *(
        ("$5 million", "$5,000,000"),
        ("5.50 Million dollars", "5,500,000 dollars"),
        ("1.5 trillion", "1.5万亿"),
    ),
    *(("5万元", "50,000元"), ("0.5 million", "500 thousand")),
    ("[[x", "[ [x"),  # as the verifier is shown them
    ("<said> x", "(said> x"),
    ("\u2039ref> x", "<ref> x"),
]
OTHER = [
    *(
        ("-5", "5"),
        ("C++", "C"),
        ("A+", "A-"),
        ("5 million", "5 billion"),
        ("1.5", "15"),
        ("1/2", "12"),
        ("a", "an"),
    ),
    *((".5", "5"), ("10\u2076", "106"), ("x\u00b2", "x2"), (".NET", "NET"), ("5!", "5"), ("3.1", "3.10")),
    *(
        ("5 km", "5 miles"),
        ("5 km", "5 m"),
        ("1 1/2", "11/2"),
        ("no one", "noone"),
        ("5 6", "56"),
    ),
    *(
        ("-$5 million", "$5 million"),
        ("5 million", "5"),
        ("5 millionth", "5000000th"),
    ),
    ("9" * 40, "9" * 39 + "8"),
]


@pytest.mark.parametrize(("one", "other"), [*SAME, *OTHER])
def test_choices_that_read_alike_are_no_choices(one: str, other: str) -> None:
    """A guess among them is right half the time, which pays the questioner most."""
    options = {"A": "Meuse", "B": one, "C": other, "D": "Moselle"}
    text = json.dumps({"question": "Which river?", "options": options, "answer": "B"})
    assert outcome(text, "doc_mc") == ("bad_format" if (one, other) in SAME else "question")


def variants(text: str) -> list[str]:
    return [text, text.upper(), f"{text}.", f"<{text}>", f"“{text}”", f"  {text.title()}?", f"[{text}]"]


@pytest.mark.parametrize("task", ["doc_general_qa", "docmath_qa", "doc_mc"])
def test_the_echo_of_the_template_is_no_question(task: str) -> None:
    """The example is taken from the prompt as a model sees it."""
    shown = last_object(Prompts("full").questioner(task, (), (), "C"), "question")
    assert shown is not None
    for echo in variants(shown.value["question"]):
        options = dict(zip("ABCD", ("1", "2", "3", "4"), strict=True))
        good = {"answer": "C" if task == "doc_mc" else "12", "options": options}
        assert outcome(json.dumps({"question": echo, **good}), task, "C") == "bad_format", echo
        assert outcome(json.dumps({"question": f"{echo} of Rome", **good}), task, "C") == "question", echo
    if task != "doc_mc":
        for echo in variants(shown.value["answer"]):
            assert outcome(json.dumps({"question": "How many?", "answer": echo}), task) == "bad_format", echo


def test_examples_are_those_of_the_style() -> None:
    assert Prompts("full").examples("doc_general_qa") == {"question", "short answer"}
    assert Prompts("short").examples("doc_general_qa") == frozenset()
    text = json.dumps({"question": "the question", "answer": "Ada"})
    assert isinstance(parse_question(text, TASK, examples=frozenset()), Question)


BLANKS = (
    *(
        "\u200b\u200b",
        "**",
        "\u2800",
        "\u3164",
        "\u115f\u1160",
        "\uffa0",
        "\u2060 \ufeff",
        "\ufe0f",
        "\u0301",
    ),
    *("'", "“”", "«»", "。", "`", "\u00ad", "\U000e0041", "؟!", "【】", "\x07"),
)
"""Nothing in them is a letter, a digit or a symbol."""


@pytest.mark.parametrize("blank", BLANKS)
def test_a_question_or_choice_that_shows_nothing_is_none(blank: str) -> None:
    assert outcome(json.dumps({"question": blank, "answer": "Ada"})) == "bad_format"
    options = {"A": "Meuse", "B": "Rhine", "C": "Po", "D": blank}
    assert (
        outcome(json.dumps({"question": "Which?", "options": options, "answer": "B"}), "doc_mc")
        == "bad_format"
    )


@pytest.mark.parametrize(
    ("answer", "task", "kind"),
    [
        *((gap, "doc_general_qa", "bad_format") for gap in ("...", "…", "___", "()", "<...>", "-", "?")),
        *((gap, "docmath_qa", "bad_format") for gap in ("...", "___", "?")),
        *(
            (mark, "doc_general_qa", "dropped:unreachable_reference")
            for mark in ("the", "A", "+", "your answer", "=", "≈")
        ),
        *((mark, "doc_general_qa", "question") for mark in ("€", "°", "🙂", "5", "七")),
        *((gap, "doc_general_qa", "bad_format") for gap in BLANKS),
        *(
            (date, "docmath_qa", "dropped:not_a_number")
            for date in ("2019-03-05", "5 March 2019", "12:30", "1/2/2019")
        ),
        *(
            (span, "docmath_qa", "dropped:not_a_number")
            for span in ("2018-2019", "3–5", "3 to 5", "2018/19", "10%-12%")
        ),
        *(
            (name, "docmath_qa", "dropped:not_a_number")
            for name in ("Q3", "FY2019", "H1 2020", "3rd", "COVID-19", "zero")
        ),
        *(
            (number, "docmath_qa", "question")
            for number in ("1{,}234", "$5", "12 %", "-3", "4.5 × 10⁴", "1 1/2", "2019")
        ),
    ],
)
def test_reasons_of_references(answer: str, task: str, kind: str) -> None:
    assert outcome(json.dumps({"question": "Which?", "answer": answer}), task) == kind


@pytest.mark.parametrize(
    ("task", "answer", "letters"),
    [
        ("doc_mc", "E", "ABCDE"),
        ("doc_mc", "1", "1234"),
        ("doc_mc", "b", "abcd"),
        *(("docmath_qa", answer, "") for answer in ("forty-two", "3-5")),
        ("doc_general_qa", "The", ""),
    ],
)
def test_a_held_out_question_that_nobody_can_answer_is_refused(task: str, answer: str, letters: str) -> None:
    good = (Cluster("held/1", "heldout", ()), Question("doc_general_qa", "Who?", "Nora"))
    bad = (
        Cluster("held/7", "heldout", ()),
        Question(task, "Which?", answer, {x: f"is {x}" for x in letters}),
    )
    assert known([good]) == [good]
    with pytest.raises(SpellError, match=f"question held/7 .*'{answer}'"):
        known([good, bad])


def test_only_a_fault_of_form_is_penalised() -> None:
    settings = config.SelfPlayConfig()
    assert questioner_reward("bad_format", 0.0, settings) == -1.0
    for reason in ("over_long", "not_a_number", "long_reference", "unreachable_reference"):
        assert questioner_reward(f"dropped:{reason}", 0.0, settings) is None
