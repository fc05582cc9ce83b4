"""The rule: what a response answers, and whether that equals the reference. 0 or 1, never a model.

Extraction looks for the last "… answer is …" sentence; where that holds no answer of the task's kind,
for the last `\\boxed{…}`. An echo of the template's placeholder is no answer. Nothing is evaluated and
every pattern is linear, because responses are hostile text.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter

from spell_megatron.selfplay.numbers import first_number, parse_number
from spell_megatron.selfplay.parsing import strip_thinking
from spell_megatron.types import Question

TOLERANCE = 0.0015
"""Relative difference within which two numbers are equal: 0.15 %."""
SCALES = (100.0, 1e3, 1e6, 1e9)
"""Factors that a percent sign, "thousand", "million" or "billion" stand for."""

_TAIL = 32_768
_LONGEST_ANSWER = 1_000
_SENTENCE = re.compile(r"answer\s{1,4}is\b\s{0,4}:?", re.IGNORECASE)
_LETTER = re.compile(r"[\s(\[{*\"'`$]{0,8}(?:\\text\{)?([A-D])(?![\w'\u2019-])")
_LOWER_LETTER = re.compile(r"\s?\(([a-d])\)")
_ARTICLE = re.compile(r"[\s*\"'`$]{0,8}A\s+[a-z]")
_PLACEHOLDERS = {
    "insert answer here",
    "insert your answer here",
    "your answer",
    "answer",
    "insert letter here",
    "",
}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def rule_reward(task: str, response: str, question: Question) -> float:
    """1.0 if the response's answer is the reference by the task's rule, else 0.0."""
    answer = extract_answer(task, response)
    return float(answer is not None and is_correct(task, answer, question.answer))


def extract_answer(task: str, response: str) -> str | None:
    """The answer that a response gives, of the task's kind; None where it gives none."""
    text = strip_thinking(response)
    if text is None:
        return None
    text = text[-_TAIL:]
    for candidate in (_last_sentence(text), last_box(text)):
        if candidate is not None and (answer := _of_kind(task, candidate)) is not None:
            return answer
    return None


def is_correct(task: str, answer: str, reference: str) -> bool:
    """Compare an extracted answer with the reference, as the task asks."""
    if task == "docmath_qa":
        return math_equal(answer, reference)
    if task == "doc_mc":
        return answer.strip() == reference.strip()
    return cover_exact_match(answer, reference)


def math_equal(prediction: str, reference: str) -> bool:
    """Numeric equality within 0.15 %, after rounding up to 3 decimals, or up to a factor of `SCALES`.

    The sign counts only in the first of the three: financial statements write losses both ways, and
    a difference of scale is most often one of notation.
    """
    p, r = parse_number(str(prediction)), parse_number(str(reference))
    if p is None or r is None:
        return False
    small, large = sorted((abs(p), abs(r)))
    if any(small > 0 and abs(small * scale - large) <= TOLERANCE * large for scale in SCALES):
        return True
    return _ceil(small) == _ceil(large) or abs(p - r) <= TOLERANCE * abs(r)


def cover_exact_match(prediction: str, reference: str) -> bool:
    """The normalised reference is a substring of the normalised prediction."""
    wanted = normalise(reference)
    return bool(wanted) and wanted in normalise(prediction)


def exact_match(prediction: str, reference: str) -> bool:
    return normalise(prediction) == normalise(reference)


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of word precision and recall; yes and no match only themselves."""
    words, wanted = normalise(prediction), normalise(reference)
    if words != wanted and ({words, wanted} & {"yes", "no", "noanswer"}):
        return 0.0
    common = (Counter(words.split()) & Counter(wanted.split())).total()
    return 2 * common / (len(words.split()) + len(wanted.split())) if common else 0.0


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and surplus white space (SQuAD's convention)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _ceil(number: float) -> float:
    """Rounded up to 3 decimals; numbers too large to have decimals stay as they are."""
    return math.ceil(number * 1000) / 1000 if number < 1e12 else number


def _last_sentence(text: str) -> str | None:
    """What follows the last "answer is", up to the end of the line."""
    end = None
    for match in _SENTENCE.finditer(text):
        end = match.end()
    if end is None:
        return None
    rest = text[end : end + 2 * _LONGEST_ANSWER].lstrip(" \t:*\n")
    return rest.partition("\n")[0][:_LONGEST_ANSWER]


def last_box(text: str) -> str | None:
    """The contents of the last `\\boxed{…}`, braces balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for at in range(start, min(len(text), start + _LONGEST_ANSWER)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return None


def _of_kind(task: str, candidate: str) -> str | None:
    """The candidate as an answer of the task: a number, a letter, or any text but a placeholder."""
    if task == "doc_mc":
        return _letter(candidate)
    answer = _unwrapped(candidate)
    if normalise(answer) in _PLACEHOLDERS:
        return None
    if task != "docmath_qa":
        return answer
    return answer if parse_number(answer) is not None else first_number(answer)


def _letter(candidate: str) -> str | None:
    """A letter A-D that stands alone. A small one counts in brackets only, for "a" is a word."""
    if _ARTICLE.match(candidate):
        return None
    match = _LETTER.match(candidate) or _LOWER_LETTER.match(candidate)
    return match.group(1).upper() if match else None


def _unwrapped(candidate: str) -> str:
    """Without the brackets, emphasis and full stop that the answer sentence puts around it."""
    text = candidate.strip(" \t\r*").rstrip(". *")
    if text.startswith("(") and (end := _closing(text)) is not None and not text[end + 1 :].strip(" .,;:!*"):
        text = text[1:end]
    return text.strip(" \t\r*")


def _closing(text: str) -> int | None:
    """Where the bracket that opens the text is closed."""
    depth = 0
    for at, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return at
    return None
