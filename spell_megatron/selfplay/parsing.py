"""What a model wrote, read with suspicion.

Model output is hostile: it may be huge, nested a million levels deep or broken anywhere. Every
function here takes any string, returns in bounded time and never raises. Only the tail of a text is
read, because an answer stands at the end of the reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import cache

from spell_megatron.selfplay.grading import rule_reward
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.reading.objects import last_object
from spell_megatron.selfplay.reading.texts import normalise
from spell_megatron.selfplay.reading.thoughts import is_outside, strip_thinking
from spell_megatron.selfplay.tasks import TASKS
from spell_megatron.selfplay.tasks.task import BAD_FORMAT, Draft, Failure, text_of
from spell_megatron.types import Question

OVER_LONG = Failure("dropped:over_long")
UNREACHABLE = Failure("dropped:unreachable_reference")


def parse_question(
    text: str,
    task: str,
    key: str | None = None,
    *,
    count: Callable[[str], int] = lambda text: len(text.split()),
    max_reference_tokens: int = 40,
    examples: Collection[str] | None = None,
) -> Question | Failure:
    """The question that a questioner wrote, or why there is none.

    `key` is what the task told it to make the answer (`Task.key`); `count` measures free references in tokens.
    `examples` are the texts of the prompt's own example (`Prompts.examples`), whose echo is no question; without
    them, those of the shipped prompts.
    """
    found = last_object(text, "question")
    if found is None or not is_outside(text, found.start, found.end):
        return OVER_LONG if strip_thinking(text) is None else BAD_FORMAT
    echoes = _shipped(task) if examples is None else examples
    asked = text_of(found.value["question"])
    draft = Draft(
        asked, found.value, key, count, max_reference_tokens, lambda written: normalise(written) in echoes
    )
    if draft.unanswered(asked):
        return BAD_FORMAT
    question = TASKS[task].question(draft)
    if isinstance(question, Question) and not is_reachable(question):
        return UNREACHABLE
    return question


def is_reachable(question: Question) -> bool:
    """Whether a response that states the reference as it is asked to would be right."""
    return bool(rule_reward(question.task, f"The correct answer is ({question.answer}).", question))


_VERDICT = re.compile(r"""(["'`\u201c\u2018\u00ab]?)\[\[(YES|NO)\]\]""", re.IGNORECASE)


def parse_verdict(text: str) -> int | None:
    """1 for `[[YES]]`, 0 for `[[NO]]`, None for neither, both, or an unfinished thought.

    One in quotation marks was said by somebody else, where there is one without.
    """
    found = _VERDICT.findall(strip_thinking(text) or "")
    own = [mark for quote, mark in found if not quote] or [mark for _, mark in found]
    votes = {mark.upper() for mark in own}
    return int(votes == {"YES"}) if len(votes) == 1 else None


@cache
def _shipped(task: str) -> Collection[str]:
    return Prompts("full").examples(task)
