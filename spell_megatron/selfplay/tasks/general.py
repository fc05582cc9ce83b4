"""Free-form questions: the answer is a name, a date, a phrase. The rule is cover exact match."""

from __future__ import annotations

import re

from spell_megatron.selfplay.reading import texts
from spell_megatron.selfplay.reading.texts import normalise
from spell_megatron.selfplay.tasks.task import (
    BAD_FORMAT,
    LONG_REFERENCE,
    Draft,
    Failure,
    Task,
    text_of,
)
from spell_megatron.types import Question

_LONGEST_TOKEN = 64
"""Characters: what is longer than so many a token is not measured."""
_DENIED = re.compile(
    r"\b(?:not|never|no|nor|neither|(?:is|was|are|were)nt|(?:not|cannot|cant) be|rather than|instead of|as opposed to"
    r"|unlike|except(?: for)?|excluding|(?:all|anything) but|(?<!none )(?<!no )other than)"
    r"(?: also| in| at| from| by)? \Z"
)
"""Words before what an answer says it is not, normalised."""
_LONGEST_DENIAL = 24
_PAUSE = re.compile(r"[.,;:!?]+(?=\s)")
"""Ends a denial: "No. 5", "No, Ann"."""
_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_LAST_A = re.compile(r"(?<=\w) A\W*\Z")
"""The letter at the end of "Hepatitis A", which is no article."""
_ANY_A = re.compile(r"(?<=\w )\(?[Aa]\b")


class General(Task):
    name, label = "doc_general_qa", "general"
    readers = (texts.stated, texts.mentioned, texts.announced, texts.remarked)

    def question(self, draft: Draft) -> Question | Failure:
        reference = text_of(draft.fields.get("answer"))
        if draft.unanswered(reference):
            return BAD_FORMAT
        if len(reference) > _LONGEST_TOKEN * draft.max_tokens or draft.tokens(reference) > draft.max_tokens:
            return LONG_REFERENCE
        return Question(self.name, draft.text, reference)

    def is_correct(self, answer: str, reference: str) -> bool:
        return cover_exact_match(answer, reference)


def cover_exact_match(prediction: str, reference: str) -> bool:
    """Whether the normalised reference is a substring of the normalised prediction, and not only where that denies it.

    "Oslo, not Bergen" covers Oslo alone, "not only Oslo but also Bergen" both, and "not guilty" itself. What SQuAD's
    normalisation takes away as punctuation or an article still tells 3.5 from 35, and "Group A" from "Group B".
    """
    prediction, reference = (_POINT.sub(" point ", text) for text in (prediction, reference))
    if _LAST_A.search(reference):
        prediction, reference = (_ANY_A.sub("letter_a", text) for text in (prediction, reference))
    wanted = normalise(reference)
    paused = _PAUSE.sub(" \u00a6 ", prediction)  # a sign that is kept
    return bool(wanted) and any(_affirms(normalise(text), wanted) for text in (prediction, paused))


def _affirms(said: str, wanted: str) -> bool:
    places = (match.start() for match in re.finditer(re.escape(wanted), said))
    return any(_DENIED.search(said[max(0, at - _LONGEST_DENIAL) : at]) is None for at in places)
