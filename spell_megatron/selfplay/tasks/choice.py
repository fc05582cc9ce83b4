"""Multiple choice among A, B, C and D. The answer is a letter, and the questioner is told which one."""

from __future__ import annotations

from random import Random

from spell_megatron.selfplay.quoting import unmarked
from spell_megatron.selfplay.reading import letters, texts
from spell_megatron.selfplay.tasks.task import (
    BAD_FORMAT,
    Draft,
    Failure,
    Task,
    is_unfilled,
    scalar_of,
    text_of,
)
from spell_megatron.types import Question

LETTERS = ("A", "B", "C", "D")


class Choice(Task):
    name, label = "doc_mc", "choice"
    readers = (letters.stated, letters.mentioned, letters.remarked)

    def key(self, random: Random) -> str:
        """The letter of the correct choice, uniform: left alone, a policy comes to prefer one."""
        return random.choice(LETTERS)

    def question(self, draft: Draft) -> Question | Failure:
        """Four different choices A-D, the correct one where it was asked for."""
        letter, options = text_of(draft.fields.get("answer")), draft.fields.get("options")
        if letter not in LETTERS or draft.key not in (None, letter) or not isinstance(options, dict):
            return BAD_FORMAT
        choices = {str(name).strip(): scalar_of(choice) for name, choice in options.items()}
        if len(options) != len(LETTERS) or set(choices) != set(LETTERS):
            return BAD_FORMAT
        ordered = {name: text for name in LETTERS if (text := choices[name])}
        if len({texts.seen(unmarked(text)) for text in ordered.values()}) != len(LETTERS):
            return BAD_FORMAT
        if any(map(is_unfilled, ordered.values())):
            return BAD_FORMAT
        return Question(self.name, draft.text, letter, ordered)

    def is_correct(self, answer: str, reference: str) -> bool:
        return answer.strip() == reference.strip()

    def trial(self) -> Question:
        return Question(self.name, "what-is-asked", "C", {letter: f"choice-{letter}" for letter in LETTERS})
