"""Free-form questions: the answer is a name, a date, a phrase. The rule is cover exact match."""

from __future__ import annotations

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


class General(Task):
    name, label = "doc_general_qa", "general"
    readers = (texts.stated, texts.mentioned, texts.remarked)

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
    """The normalised reference is a substring of the normalised prediction."""
    wanted = normalise(reference)
    return bool(wanted) and wanted in normalise(prediction)
