"""Whether a questioner has looked its answer up: it wrote it down first (`noted`), in what documents say (`quoted`).

A questioner reasons before it asks: it quotes, calculates, or thinks. The answer that it comes to stands there; one
that stands nowhere before the question was made up with it, and is false as a rule. So is one that follows from what no
document says, and an answer about somebody whom none names (docs/evidence.md has the figures). To see that costs
nothing.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from spell_megatron.selfplay import rewards
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.numbers import is_calculation, parse_number
from spell_megatron.selfplay.reading.notation import SCALE, ZEROS
from spell_megatron.selfplay.reading.objects import last_object
from spell_megatron.selfplay.reading.texts import normalise
from spell_megatron.selfplay.reading.thoughts import strip_thinking
from spell_megatron.selfplay.writer import Job, Writer
from spell_megatron.types import Document, Question

_SENTENCE = re.compile(r"(?<=[.!?\u3002])\s+|\n")
_CHOICE = re.compile(r"\s*[A-D]\W")
_LETTER = re.compile(r"[^\W\d_]")
_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_EDGE = r"(?<!(?a:[\w.]))(?<![^\W\d_]-)"
"""Where no word goes on: 3 is not in Q3, nor 19 in COVID-19."""
_NUMBER = re.compile(rf"{_EDGE}(?P<digits>\d[\d.,'\u2019]{{0,40}}+)(?:[\s-]?{SCALE})?(?!(?a:\w))")
_MOST = 1_000
"""Numbers of a text that are looked at, from its end."""
_LONGEST = 200
"""Characters of an answer that is looked for as it is written."""


async def looked_up(writer: Writer, job: Job, episode: Episode) -> Episode:
    """Whether what the questioner wrote before its question states the answer, and stands in its documents."""
    wanted, text = writer.settings.beyond, episode.asked_text
    if wanted.noted and not states(text, episode.posed):
        return replace(episode, outcome=rewards.UNNOTED)
    if wanted.quoted:
        read = [job.cluster.documents[index] for index in episode.documents]
        if not quotes(text, episode.posed, read):
            return replace(episode, outcome=rewards.UNQUOTED)
    return episode


def states(text: str, question: Question) -> bool:
    """Whether the part of a questioner's text before its question says the answer, or the choice that is right."""
    return _says(_before(text), _answer(question))


def quotes(text: str, question: Question, documents: Sequence[Document]) -> bool:
    """Whether the sentences before a question stand in documents and state the answer, and its names stand there, too.

    Calculations (without letters) may state the answer and stand nowhere. Thoughts (up to `</think>`) and the choice
    that is right (`C: …`) count for nothing. There must be a sentence, and no name twice.
    """
    source = _words("\n".join(part for document in documents for part in (document.title, document.text)))
    said = strip_thinking(_before(text)) or ""
    lines = [line for line in _SENTENCE.split(said) if not _CHOICE.match(line)]
    sentences = [line for line in lines if _LETTER.search(line)]
    names = list(map(_words, _names(question.text)))
    if not sentences or len(set(names)) < len(names):
        return False
    in_documents = all(_stands(part, source) for part in (*map(_words, sentences), *names))
    return in_documents and _says(" ".join(lines), _answer(question))


def _answer(question: Question) -> str:
    return question.options[question.answer] if question.options else question.answer


def _says(text: str, answer: str) -> bool:
    """Whether a text has an answer: as a number, in other words for the same, or, where it has no words, as it is."""
    if is_calculation(answer):
        return _literally(answer, text) or _counts(answer, text)
    wanted = _words(answer)
    return _stands(wanted, _words(text)) if wanted else _literally(answer, text)


def _counts(answer: str, text: str) -> bool:
    """Whether a text has an answer's number, whatever its sign: a loss of 5 is -5, and 5 million is not 5."""
    own = list(_NUMBER.finditer(answer))
    value = _written(own[0]) if len(own) == 1 else parse_number(answer)
    found = map(_written, deque(_NUMBER.finditer(text), maxlen=_MOST))
    return value is not None and any(one is not None and math.isclose(abs(value), one) for one in found)


def _written(number: re.Match[str]) -> float | None:
    value = parse_number(number["digits"].rstrip(".,'\u2019"))
    return value if value is None else value * 10.0 ** ZEROS.get((number["scale"] or "").lower(), 0)


def _literally(part: str, text: str) -> bool:
    edges = r"(?<![\w.,])(?<![^\W\d_]-)", r"(?!\w|[.,]\d)"
    return len(part) <= _LONGEST and re.search(re.escape(part).join(edges), text) is not None


def _words(text: str) -> str:
    """Normalised, and 1.5 is not 15."""
    return normalise(_POINT.sub("point", text))


def _names(text: str) -> Iterator[str]:
    """Two or more words with capitals, behind the first word of all."""
    for part in re.split(r"[^\w\s]", text.partition(" ")[2]):
        for capitals, run in groupby(part.split(), lambda word: word[0].isupper()):
            words = list(run)
            if capitals and len(words) > 1:
                yield " ".join(words)


def _before(text: str) -> str:
    found = last_object(text, "question")
    return text[: found.start].replace("<", " <") if found else ""


def _stands(part: str, text: str) -> bool:
    """Whether whole words of a normalised text are those."""
    edge = " " if part.isascii() else ""  # scripts without blanks between words
    return f"{edge}{part}{edge}" in f" {text} "
