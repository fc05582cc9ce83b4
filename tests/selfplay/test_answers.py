"""Answers are read in whatever form they are written, each letter as well as the others."""

from __future__ import annotations

import unicodedata
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.selfplay.grading import extract_answer, rule_reward
from spell_megatron.selfplay.numbers import parse_number
from spell_megatron.selfplay.reading.latex import plain
from spell_megatron.selfplay.reading.texts import normalise
from spell_megatron.selfplay.tasks.general import cover_exact_match
from spell_megatron.selfplay.tasks.number import math_equal
from spell_megatron.types import Question

pytestmark = pytest.mark.unit

LEADS = (
    *("The correct answer is {}", "Therefore, the answer is {}", "**Answer is:** {}", "The answer is:\n\n{}"),
    *("The **correct answer** is {}", "The answer is most likely {}", "So the final answer is clearly {}"),
)
DRESSES = (
    *(
        "{}",
        "({})",
        "**{}**",
        "`{}`",
        "“{}”",
        "‘{}’",
        "'{}'",
        '"{}"',
        "{}.",
        "{})",
        "[{}]",
        "${}$",
        "«{}»",
        "__{}__",
    ),
    *(
        "*{}*",
        "***{}***",
        "**({})**",
        "(**{}**)",
        "(({}))",
        "<b>{}</b>",
        "<answer>{}</answer>",
        "→ {}",
        "> {}",
    ),
    *(
        r"\boxed{{{}}}",
        r"\text{{{}}}",
        r"\mathbf{{{}}}",
        r"\textbf{{({})}}",
        r"$\boxed{{\text{{{}}}}}$",
        r"\({}\)",
    ),
    *(
        r"\[\boxed{{{}}}\]",
        r"\boxed{{({})}}",
        r"\boxed{{\text{{Option {}}}}}",
        r"{{\bf {}}}",
        r"\underline{{{}}}",
    ),
    *("Option {}", "option ({})", "choice {}", "**Option {}**", "letter {}", "the option {}", "statement {}"),
)
TAILS = (
    *(
        ".",
        "",
        " because both reports agree.",
        ": the blue one.",
        " - Paris.",
        " (Paris)",
        "\nI hope this helps.",
    ),
    *(
        " as stated in document 2.",
        ". The answer is supported by document 3.",
        " and the others are wrong.",
        " Paris.",
    ),
)
LETTERS = "ABCD"


def dressed(letter: str) -> list[str]:
    """The letter itself, a small one, and its full-width and circled characters."""
    place = ord(letter) - ord("A")
    return [letter, letter.lower(), chr(0xFF21 + place), chr(0x24B6 + place), chr(0x1F150 + place)]


@pytest.mark.long
def test_every_letter_is_recalled_alike_and_always() -> None:
    """About 19,000 phrasings for each letter; a bias of one would be a bias of the reward."""
    phrasings = [
        (lead, dress, tail, form) for lead, dress, tail in product(LEADS, DRESSES, TAILS) for form in range(5)
    ]
    missed = dict.fromkeys(LETTERS, 0)
    for lead, dress, tail, form in phrasings:
        for letter in LETTERS:
            response = lead.format(dress.format(dressed(letter)[form])) + tail
            missed[letter] += extract_answer("doc_mc", response) != letter
    assert len(phrasings) > 10_000
    assert missed == dict.fromkeys(LETTERS, 0)


@pytest.mark.parametrize(
    "link", [", ", " or ", "; ", " | ", "|", " and ", " to ", ", or ", " units or ", " and/or "]
)
@pytest.mark.parametrize("dress", ["{}", "({})", "[{}]", "\\boxed{{{}}}", "**{}**"])
def test_two_numbers_are_none_whichever_is_right(link: str, dress: str) -> None:
    for first, second in (("42", "43"), ("-7.5", "$1,200"), ("$3.5 million", "(12)")):
        response = f"The correct answer is {dress.format(first + link + second)}."
        assert extract_answer("docmath_qa", response) is None, response
    assert extract_answer("docmath_qa", "The correct answer is not 40 but more.") is None
    assert extract_answer("docmath_qa", "The correct answer is 10, 20 and 30.") is None


@pytest.mark.parametrize(
    ("said", "number"),
    [("1/2 or 0.5", "1/2"), ("12 (or 12.0)", "12"), ("15, 3 more than the others", "15"), ("1,204", "1204")],
)
def test_one_number_said_twice_or_explained_is_one(said: str, number: str) -> None:
    answer = extract_answer("docmath_qa", f"The correct answer is {said}.")
    assert answer is not None
    assert parse_number(answer) == parse_number(number)


NO_LETTER = (
    *("{} company with many shops.", "not ({}).", "{}-12", "{}'s brother", "{}++", "{} = 5"),
    *("({})(E)", "{} E F", "{}; E.", "{}|E|F", "({}) (E).", "{}. E. F.", "{}, E", "both {} and E"),
    *("vitamin {}x", "both of them", "({}) or (E) or (A) or (C)", "neither {} nor E", "{}.{}. King"),
)


@pytest.mark.parametrize("ending", NO_LETTER)
def test_what_is_no_choice_is_none_for_any_letter(ending: str) -> None:
    for letter in LETTERS:
        response = "The correct answer is " + ending.replace("{}", letter)
        assert extract_answer("doc_mc", response) is None, response


@pytest.mark.parametrize("link", [", ", ",", "; ", " and ", " or ", ", or ", " / ", " & "])
@pytest.mark.parametrize(
    "dress", ["{}", "({})", "[{}]", "\\boxed{{{}}}", "**{}**", "one of {}", "among ({})", "in my view, {}"]
)
def test_several_letters_are_none_whichever_is_last(link: str, dress: str) -> None:
    """A reader that took the last of a list would pay for listing all of them."""
    for count in (2, 3, 4):
        for letters in permutations(LETTERS, count):
            response = f"The correct answer is {dress.format(link.join(letters))}."
            assert extract_answer("doc_mc", response) is None, response


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The correct answer is (A) or (B).", None),
        ("The correct answer is A and B.", None),
        ("The correct answer is the one given as (D): hepatitis A and B.", "D"),
        ("The correct answer is found in plan A/B tests, so (C).", "C"),
        ("The correct answer is, between A and B, what the text supports (A).", "A"),
        ("The correct answer is not A but B.", None),
        ("The answer is (B). I hope the answer is clear.", "B"),
        ("The correct answer is Paris (C).", "C"),
        ("The correct answer is B, C is wrong.", "B"),
        ("The correct answer is B. A is wrong.", "B"),
        ("The correct answer is C: A Tale of Two Cities", "C"),
        ("The correct answer is (D) A 5% rise", "D"),
        ("The answer is, in my view, D.", "D"),
        ("The answer is (E).\n\\boxed{C}", "C"),
        ("\\boxed{A}. But the answer is (B).", "B"),
    ],
)
def test_choices(response: str, letter: str | None) -> None:
    assert extract_answer("doc_mc", response) == letter


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("Therefore, the answer is (42).\n\n*Note*: the answer is given in table 3.", "42"),
        ("Therefore, the answer is (1,234.5).\nThe answer is based on 2019 figures.", "1234.5"),
        ("The answer is rounded to 2 decimals: 3.14", "3.14"),
        ("The answer is:\n\\[\n\\boxed{42}\n\\]", "42"),
        ("The answer is:\n\\begin{equation*}\n42\n\\end{equation*}", "42"),
        ("The answer is:\n```\n42\n```", "42"),
        ("The answer is (approximately 12 apples out of 20).", "12"),
        ("The answer is (1 + 2) / 4.", "0.75"),
        ("The answer is \\frac{84}{2} = 42 apples.", "42"),
        ("The answer is $x = 42$, since $y = 7$.", "42"),
        ("\\boxed{3} so the answer is (x).", "3"),
        ("\\boxed{42}\nThe answer is found by adding 40 and 2.", "42"),
        ("The answer is found by adding 40 and 2.", None),
        ("The answer is found in table three: they sold 42.", "42"),
        ("The answer is 42 (40 + 2).", "42"),
        ("The answer is 12.5% (0.125).", "12.5"),
        ("The answer is 42, up from 40.", "42"),
        ("The answer is ((-8)^(1/3)).", None),
        ("The answer is (41). Wait: \\boxed{42}", "42"),
        ("\\boxed{41}. No, the answer is (42).", "42"),
        ("<answer>42</answer>", "42"),
        ("The answer is (€1.234,50).", "1234.5"),
        ("The answer is 2⅔.", "2.6666667"),
        ("The answer is 5 million dollars in 2019.", "5"),
        ("The answer is (3–5).", None),
        ("The answer is 2018-2019.", None),
        ("The answer is Q3.", None),
        ("The answer is (ten).", None),
        ("The answer is (5 apples and 3 pears).", None),
        ("The answer is (12 apples and some pears).", "12"),
        ("The answer is (2019: 42).", "42"),
        ("The answer is 2019: $42 million.", "42"),
        ("The answer is 2019: that is when it ended.", "2019"),
        ("The answer is 2019 : 42.", "42"),
        ("The answer is $2000: 1500.", "2000"),
        ("The answer is 1950: 650 a year for 3 years.", "1950"),
        ("The answer is $3.5 million 7-year loan.", "3.5"),
        ("The answer is 3.5 : 1.", None),
        ("The answer is 3 log10 units.", "3"),
        ("The answer is 5 TRİLLİON.", "5"),
        ("The answer is $1.5 trillion in 2019.", "1500000000000"),
        ("The answer is 1 million 200 thousand.", None),
        ("The answer is $1 million $200 thousand.", None),
        ("The answer is 42 thousand 500.", None),
        ("The answer is 42 million [1].", "42"),
        ("The answer is $3-$5 million.", None),
        ("The answer is log(100).", None),
        ("The answer is 2 \\cdot \\log_{10}(100).", None),
        ("The answer is \\log_{10}(100) = 2.", "2"),
        ("The answer is 5 : 10.", None),
    ],
)
def test_numbers_in_sentences(response: str, number: str | None) -> None:
    answer = extract_answer("docmath_qa", response)
    assert answer is None if number is None else answer is not None and math_equal(answer, number), answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The correct answer is (Paris), because the answer is in document 2.", "Paris"),
        ("The correct answer is Paris.\nI hope this answer is helpful!", "Paris"),
        ("First the answer is (wrong). Later: the correct answer is Paris.", "Paris"),
        ("The correct answer is (the (old) bridge).", "the (old) bridge"),
        ("The correct answer is:\n\n**Paris**", "Paris"),
        ("The correct answer is (\nParis\n).", "Paris"),
        ("The correct answer is in 1998.", "in 1998"),
        ("The correct answer is \\boxed{\\text{New York}}.", "New York"),
        ("The correct answer is “Paris”.", "Paris"),
        ("The correct answer is $5 million and $3 million.", "$5 million and $3 million"),
        ("The correct answer is (insert answer here).", None),
    ],
)
def test_words_in_sentences(response: str, answer: str | None) -> None:
    assert extract_answer("doc_general_qa", response) == answer


@pytest.mark.parametrize(
    "text",
    [
        *(
            "2019-03-05",
            "05.03.2019",
            "3/5/2019",
            "2018-2019",
            "2018–19",
            "2018/19",
            "3-5",
            "3 – 5",
            "$3-$5 million",
        ),
        *(
            "10%-12%",
            "Q3",
            "Q3 2019",
            "2H 2020",
            "FY2019",
            "FY'19",
            "March 2019",
            "5 March 2019",
            "March 5, 2019",
        ),
        *("third quarter of 2019", "3rd", "12:30", "3:1", "555-1234", "COVID-19", "1.2.3", "3 to 5", "1,2,3"),
    ],
)
def test_dates_ranges_and_names_are_no_numbers(text: str) -> None:
    assert parse_number(text) is None
    assert parse_number(f"({text})") is None


@pytest.mark.parametrize(
    ("written", "number"),
    [
        *(("1.5 trillion", "1,500 billion"), ("1.5 trillion", "1500000000000"), ("$1.5$ trillion", "1.5e12")),
        *(("½ trillion", "500 billion"), ("(1.5) trillion", "1.5e12"), ("2 × 10^3 trillion", "2e15")),
        *(("1 1/2 trillion", "1.5e12"), ("-5 trillion", "-5e12"), ("1,234-trillion", "1.234e15")),
        *(("5万", "50000"), ("500万元", "500"), ("3亿元", "300000000"), ("3万亿", "3 trillion")),
        *(("₹1,234.5 crore", "1,234.5"), ("5 lakh", "500000"), ("5 lakhs", "0.5 million")),
        *(("1.5 lakh crore", "1.5 trillion"), ("5.2~\\text{trillion}", "5.2 trillion")),
        *(("(1.5 trillion - 1.2 trillion)/1.2 trillion", "25%"), ("300 billion / 2 trillion", "0.15")),
    ],
)
def test_words_of_scale_are_worth_what_they_say(written: str, number: str) -> None:
    assert math_equal(written, number)
    assert math_equal(number, written)
    assert not math_equal(written, f"{parse_number(number)!r} * 20")


@pytest.mark.parametrize(
    "text", ["3-5 trillion", "$3-$5 trillion", "3 to 5万", "3万5000", "1 trillion 200 billion"]
)
def test_ranges_and_compounds_of_scaled_numbers_are_no_numbers(text: str) -> None:
    assert parse_number(text) is None
    assert extract_answer("docmath_qa", f"The answer is ({text}).") is None


NO_BREAK = ("\u00a0", "\u2009", "\u202f", "\u2007", " ")
SEPARATORS = (",", "{,}", "\\,", "\\ ", "~", "'", "’", "_", "\\_", "\\;", ",\\!", *NO_BREAK)
WRAPPERS = (
    *(
        "{}",
        "({})",
        "${}$",
        r"\boxed{{{}}}",
        r"$\boxed{{\text{{{}}}}}$",
        "**{}**",
        r"\({}\)",
        "“{}”",
        "<b>{}</b>",
    ),
    *(
        "$$\n{}\n$$",
        r"\textbf{{{}}}",
        "approximately {}",
        "{} million",
        "${}",
        r"\${}",
        r"{}\%",
        "x = {}",
        "{} USD",
    ),
)


def grouped(number: int, separator: str, indian: bool = False) -> str:
    digits, groups = str(number), []
    size = 3
    while len(digits) > size:
        groups, digits = [digits[-size:], *groups], digits[:-size]
        size = 2 if indian else 3
    return separator.join([digits, *groups])


@settings(max_examples=400)
@given(
    st.integers(1, 10**9),
    st.sampled_from(SEPARATORS),
    st.sampled_from(WRAPPERS),
    st.sampled_from(["", ".5", ".25"]),
)
def test_separators_of_every_spelling(number: int, separator: str, wrapper: str, decimals: str) -> None:
    written = wrapper.format(grouped(number, separator) + decimals)
    answer = extract_answer("docmath_qa", f"Therefore, the answer is {written}.")
    assert answer is not None, written
    assert parse_number(answer) == number + float(decimals or 0), written


@settings(max_examples=100)
@given(st.integers(1, 10**9))
def test_groups_of_two_and_points_of_thousands(number: int) -> None:
    assert parse_number(grouped(number, ",", indian=True)) == number
    assert parse_number(grouped(number, ".") + ",5") == number + 0.5


RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@settings(max_examples=200)
@given(st.integers(1, 999), st.integers(-9, 9), st.sampled_from(WRAPPERS))
def test_powers_of_ten(digits: int, power: int, wrapper: str) -> None:
    mantissa, value = digits / 100, digits / 100 * 10.0**power
    raised = str(power).translate(RAISED)
    for form in (
        *(f"{mantissa} × 10{raised}", f"{mantissa}e{power}", f"{mantissa} \\times 10^{{{power}}}"),
        *(f"{mantissa} x 10^{power}", f"{mantissa} \\cdot 10^{{{power}}}", f"{mantissa}*10**({power})"),
        *(f"{mantissa}×10<sup>{power}</sup>", f"{mantissa}E{power:+03d}"),
    ):
        answer = extract_answer("docmath_qa", f"The answer is {wrapper.format(form)}.")
        assert answer is not None, form
        assert parse_number(answer) == pytest.approx(value), form


@settings(max_examples=200)
@given(st.integers(0, 50), st.integers(1, 8), st.integers(2, 9), st.sampled_from(WRAPPERS[:9]))
def test_fractions(whole: int, above: int, below: int, wrapper: str) -> None:
    above = above % below or 1
    plain_forms = [
        f"{above}/{below}",
        f"\\frac{{{above}}}{{{below}}}",
        f"\\tfrac{above}{below}",
        f"{above}⁄{below}",
    ]
    for form in plain_forms:
        assert parse_number(wrapper.format(form)) == pytest.approx(above / below), form
    if whole:
        for form in (
            f"{whole} {above}/{below}",
            f"{whole}\\frac{{{above}}}{{{below}}}",
            f"{whole} \\dfrac{above}{below}",
        ):
            answer = extract_answer("docmath_qa", f"The answer is {wrapper.format(form)}")
            assert answer is not None, form
            assert parse_number(answer) == pytest.approx(whole + above / below), form


REMARKS = (
    *(
        "Note: the answer is rounded to {} decimals.",
        "The answer is given in table {}.",
        "I hope this answer is helpful!",
    ),
    *(
        "The answer is based on documents {} and 7.",
        "This answer is also supported by ({}).",
        "the answer is clear",
    ),
    *("The answer is in thousands.", "Each answer is checked.", "The answer is not rounded."),
)


@settings(max_examples=300)
@given(
    st.integers(10, 10**6),
    st.lists(st.sampled_from(REMARKS), max_size=4),
    st.integers(2, 9),
    st.sampled_from(["\n", " ", "\n\n"]),
)
def test_a_remark_about_the_answer_is_not_the_answer(
    number: int, remarks: list[str], other: int, gap: str
) -> None:
    tail = "".join(gap + remark.format(other) for remark in remarks)
    question = Question("docmath_qa", "?", str(number))
    assert rule_reward("docmath_qa", f"Therefore, the answer is ({number}).{tail}", question) == 1.0
    assert extract_answer("doc_general_qa", f"The correct answer is (Ada).{tail}") == "Ada"
    assert extract_answer("doc_mc", f"The correct answer is (C).{tail}") == "C"


MARKS = "’‘“”„«»–—‐‑…·。、！？：；（）【】「」¿¡′″‚‹›\u200b\u00ad\u2060ʼ"


@pytest.mark.long
@settings(max_examples=400)
@given(
    st.text(st.characters(categories=("Lu", "Ll", "Lo", "Nd")), min_size=1, max_size=20),
    st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]),
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from(MARKS)), max_size=5),
)
def test_texts_that_look_the_same_are_the_same(text: str, form: str, marks: list[tuple[int, str]]) -> None:
    other = unicodedata.normalize(form, text)
    for place, mark in marks:
        other = other[:place] + mark + other[place:]
    if normalise(text):
        assert cover_exact_match(other, text)
        assert cover_exact_match(text, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(
            ("O'Neil", "O’Neil"),
            ("O'Neil", "Oʼneil"),
            ("2010-2015", "2010–2015"),
            ("café", "cafe\u0301"),
            ("北京", "北京。"),
        ),
        *(
            ("(北京)", "（北京）"),
            ("ＡＢＣ", "abc"),
            ("Straße", "STRASSE"),
            ("naïve", "na\u00adïve"),
            ("10 km²", "10 km2"),
            ("१९४७", "1947"),
            ("٢٠٢٤م", "2024م"),
        ),
        *(
            ("¿Qué?", "qué"),
            ("«Guerre»", '"Guerre"'),
            ("½", "1/2"),
            ("fi", "ﬁ"),
            ("a\u200bb", "ab"),
            ("−5", "-5"),
        ),
    ],
)
def test_texts_match_across_scripts_and_compositions(one: str, other: str) -> None:
    assert cover_exact_match(one, other)
    assert cover_exact_match(other, one)


@settings(max_examples=300)
@given(st.text(alphabet="\\{}$^frac textbdxe123 <sup>/", max_size=120))
def test_undressing_takes_anything_and_adds_little(text: str) -> None:
    assert len(plain(text)) <= 3 * len(text) + 16
