"""What a reply says besides its answer is not its answer: remarks, explanations, denials, a second one."""

from __future__ import annotations

from itertools import product

import pytest

from spell_megatron.selfplay.grading import extract_answer, rule_reward
from spell_megatron.selfplay.numbers import parse_number
from spell_megatron.selfplay.tasks.number import math_equal
from spell_megatron.types import Question

pytestmark = pytest.mark.unit

NUMBER, LETTER, WORDS = "docmath_qa", "doc_mc", "doc_general_qa"


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("So the answer is a drop of 37 tonnes.\nNote: the answer is rounded to 3 decimal places.", "37"),
        ("The answer is a drop of 37 tonnes. The answer is found in table 4.", "37"),
        ("The answer is a rise of 8.25 rounded to 2 decimal places.", "8.25"),
        ("The answer is by 3-digit rounding.", None),
        ("The final answer is:\n\nThe answer is obtained as 42", "42"),
        ("So the answer is not 7.\nThe answer is found in the last row: 37.", "37"),
        ("The answer is found in the last row: it sold 37.", "37"),
        ("The correct answer is at least 37 tonnes. I hope the answer is helpful.", "37"),
    ],
)
def test_a_remark_never_beats_a_number_that_is_announced(response: str, number: str | None) -> None:
    answer = extract_answer(NUMBER, response)
    assert answer is None if number is None else answer is not None and math_equal(answer, number)


@pytest.mark.parametrize("letter", "ABCD")
@pytest.mark.parametrize(
    ("response", "reads"),
    [
        ("The correct answer is the Rhine.\nThe answer is given in option {}", True),
        ("So the answer is not E. It is too low. The answer is found in option ({}).", True),
        ("The answer is the Rhine ({}). The answer is confirmed by annex (E).", True),
        ("The correct answer is given in plan X, so ({}). I hope the answer is clear.", True),
        ("The correct answer is in option ({}).", True),
    ],
)
def test_a_remark_never_beats_a_choice_that_is_announced(response: str, reads: bool, letter: str) -> None:
    assert extract_answer(LETTER, response.format(letter)) == (letter if reads else None)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (
            "The correct answer is on 5 May 1921.\nThe answer is stated in the second document.",
            "on 5 May 1921",
        ),
        ("The correct answer is Simple Minds.\n\nI hope this answer is useful!", "Simple Minds"),
        ("I hope this answer is useful!\nThe correct answer is by train.", "by train"),
        ("The answer is Oslo. The correct answer is given below.", "Oslo. The"),
    ],
)
def test_of_answers_that_begin_like_remarks_the_announced_one_counts(response: str, answer: str) -> None:
    assert extract_answer(WORDS, response) == answer


@pytest.mark.parametrize(
    "said",
    [
        *("Oslo. It cannot be Bergen, which is smaller", "Oslo. It can't be Bergen", "Oslo (not Bergen)"),
        *("Oslo, not Bergen", "Oslo and not “Bergen”", "Oslo, and not the Bergen", "Oslo – never Bergen"),
        *(
            "Oslo rather than Bergen",
            "Oslo instead of a Bergen",
            "Oslo as opposed to Bergen",
            "Oslo. No Bergen",
        ),
        *("not Bergen but Oslo", "unlike Bergen, Oslo", "Oslo; it isn't Bergen, nor not also Bergen"),
        *(
            "neither Bergen nor Turku but Oslo",
            "Oslo. Nor Bergen",
            "anything but Bergen: Oslo",
            "Oslo, not in Bergen",
        ),
        *(
            "Oslo, excluding Bergen",
            "Oslo, except for Bergen",
            "all but Bergen, so Oslo",
            "Oslo, other than Bergen",
        ),
    ],
)
@pytest.mark.parametrize("form", ["The correct answer is {}.", "The answer is ({}).", "\\boxed{{{}}}"])
def test_what_words_deny_is_not_covered(said: str, form: str) -> None:
    for name, reward in (("Oslo", 1.0), ("Bergen", 0.0)):
        assert rule_reward(WORDS, form.format(said), Question(WORDS, "Which?", name)) == reward


@pytest.mark.parametrize(
    ("said", "reference"),
    [
        *((same, same) for same in ("not guilty", "Not Bob but Ann Lee", "quality rather than quantity")),
        *((same, same) for same in ("1. Ann Lee", "Fr. Brown", "Ph.D. Program", "J. S. Bach", "No. 5")),
        *(("not only Ann Lee but also Bob", name) for name in ("Ann Lee", "Bob")),
        *(
            ("not Bob but Ann Lee", "Ann Lee"),
            ("not Bob. Bob was it", "Bob"),
            ("clear. It is Ann Lee", "Ann Lee"),
        ),
        *(("Chanel No. 5", "5"), ("no, Ann Lee", "Ann Lee"), ("a knot", "knot"), ("nothing", "nothing")),
        *(("a rise. It did not fall", "did not fall"), ("Oslo. August", "Oslo. August")),
        *(("none other than Ann Lee", "Ann Lee"), ("neither Ann nor Bob", "neither Ann nor Bob")),
    ],
)
def test_words_are_covered_where_one_mention_is_not_denied(said: str, reference: str) -> None:
    for response in (f"The correct answer is {said}.", f"The answer is ({said})."):
        assert rule_reward(WORDS, response, Question(WORDS, "Which?", reference)) == 1.0, response


@pytest.mark.parametrize(
    "said",
    [
        *('"Oslo", and "Bergen" is older', "(Oslo), (Bergen is older)", "(Oslo), [Document 1]"),
        *("(Oslo), (see Bergen)", "[Oslo], [Document 1]", "(Oslo), “Bergen”"),
    ],
)
def test_what_stands_in_other_brackets_is_no_second_name(said: str) -> None:
    assert extract_answer(WORDS, f"The correct answer is {said}.") == "Oslo"


def test_boxes_and_tags_are_read_to_their_end() -> None:
    for said in ("Enough Said. The Film", "war, not peace", "in 1921", "Simple Minds"):
        assert extract_answer(WORDS, f"\\boxed{{{said}}}\nI hope the answer is what you want.") == said
        assert extract_answer(WORDS, f"<answer>{said}</answer>") == said


@pytest.mark.parametrize(
    "dress", ['"{}"', "({})", "“{}”", "**{}**", "'{}'", "*{}*", '*"{}"*', "[{}]", "`{}`"]
)
@pytest.mark.parametrize("link", [" and ", ", ", ", and ", "; ", " & "])
def test_two_names_in_their_own_dress_are_both_there(dress: str, link: str) -> None:
    question = Question(WORDS, "Which two?", "Alien" + link + "Brazil")
    said = dress.format("Alien") + link + dress.format("Brazil")
    for response in (f"The correct answer is {said}.", f"The answer is {said}"):
        assert rule_reward(WORDS, response, question) == 1.0, response
    if dress[0] not in "*'":
        alone = f"The correct answer is {dress.format('Alien')}, and others are not."
        assert extract_answer(WORDS, alone) == "Alien"


DRESSES = (
    "({})",
    "${}$",
    '"{}"',
    "**{}**",
    "[{}]",
    "“{}”",
    "`{}`",
    r"\({}\)",
    r"\text{{{}}}",
    "**({})**",
    "<b>{}</b>",
)


@pytest.mark.parametrize(("dress", "link"), product(DRESSES, (" or ", " and ", " to ", ", ", "-", "–")))
def test_two_numbers_in_their_own_dress_are_none(dress: str, link: str) -> None:
    for first, second in (("31", "35"), ("2.5", "1,200")):
        said = dress.format(first) + link + dress.format(second)
        assert extract_answer(NUMBER, f"The answer is {said}.") is None, said


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("(35) - (31)", "4"),
        ("(35) or (35.0)", "35"),
        ("(35) - 4 more than the others", "35"),
        ("(35), 4 more than the others", "35"),
        (r"\frac{1990}{1991}", "0.99950"),
        ("(0.5) (or 1/2)", "0.5"),
        # A range is none, and a difference is one.
        ("(1,204) - (1,350) = -146", "-146"),
        ("($100) - ($150) = ($50)", "50"),
        ("(5)-(12)=-7", "-7"),
        # One value in two notations.
        ("(0.125) or 12.5%", "0.125"),
        ("(1.2 billion) or 1,200 million", "1.2"),
        ("(3 hours), or 180 minutes", "3"),
        ("(42); 2019", "42"),
        ("(42) to 3 s.f.", "42"),
        ("(42) to 3 d.p.", "42"),
        ("(42) to 3 digits, from 41.96", "42"),
        ("(42) in 12 months", "42"),
    ],
)
def test_one_number_in_brackets_and_what_is_said_of_it(said: str, number: str) -> None:
    answer = extract_answer(NUMBER, f"The answer is {said}.")
    assert answer is not None
    assert math_equal(answer, number)


@pytest.mark.parametrize(
    ("said", "number"),
    [
        (r"\sqrt[3]{64}", 4),
        (r"2 \cdot \sqrt[4]{16}", 4),
        (r"\sqrt[n]{64}", None),
        (r"60^{\circ}", 60),
        (r"60^\circ", 60),
        (r"18^{\circ}\text{C}", 18),
        (r"18^{\circ C}", 18),
        *((f"{hours}h", hours) for hours in range(1, 10)),
        *((period, None) for period in ("4h 2021", "2h2021", "1h '21", "3H", "3H 2021", "2Q")),
        *(
            (span, None)
            for span in ("3h 20m", "3h20", "3 h 20 min", "12h05", "2 hours 30 minutes", "3 days, 4 hours")
        ),
        *(("5 ft 4 in", None), ("2 years 3 months in all", None), ("5 kg 20 g", None)),
        *(("7 hours", 7), ("7 hours in 2021", 7), ("7 days 3 times", 7), ("7 hours, 3 more than before", 7)),
        *(("30% in 5 years", 30), ("$5 million in 6 months", 5)),
        *(("1 in 6", None), ("31 in 2021", 31), ("7 in 2 rooms", 7)),
    ],
)
def test_numbers_with_roots_degrees_and_units(said: str, number: float | None) -> None:
    for statement in (f"({said})", said):
        answer = extract_answer(NUMBER, f"The answer is {statement}.")
        found = None if answer is None else parse_number(answer)
        assert found == (None if number is None else pytest.approx(number)), statement


@pytest.mark.parametrize("tag", "abcd")
@pytest.mark.parametrize("letter", "ABCD")
def test_tags_of_small_letters_are_no_choices(tag: str, letter: str) -> None:
    open_, close = f"<{tag}>", f"</{tag}>"
    for said in (
        *(f"{open_}({letter}) Rome\n{close}", f"{open_}{letter}", f"{open_} {letter}"),
        f"{open_}{open_}{letter}</b></b>",
    ):
        assert extract_answer(LETTER, f"The correct answer is {said}") == letter
    assert extract_answer(LETTER, f"The correct answer is {open_}.") is None
    for said in (f"<{letter}>.", f"<{letter}/>", f"\\boxed{{<{letter}>}}"):
        assert extract_answer(LETTER, f"The correct answer is {said}") == letter
    assert rule_reward(NUMBER, f"The correct answer is {open_}42", Question(NUMBER, "How many?", "42")) == 1.0
