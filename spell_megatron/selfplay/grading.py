"""The rule: what a response answers, and whether that equals the reference. 0 or 1, never a model.

A response states its answer in "… answer is …" sentences, in boxes and between answer tags; the last
statement that holds an answer of the task's kind counts. Where none states one, the last that mentions one
does. An echo of the template's placeholder is no answer. See `reading` for the grammar, `tasks` for the kinds.
"""

from __future__ import annotations

from spell_megatron.selfplay.reading.statements import statements
from spell_megatron.selfplay.reading.thoughts import strip_thinking
from spell_megatron.selfplay.tasks import TASKS
from spell_megatron.selfplay.tasks.general import cover_exact_match
from spell_megatron.selfplay.tasks.number import math_equal
from spell_megatron.types import Question

__all__ = ["cover_exact_match", "extract_answer", "is_correct", "math_equal", "rule_reward"]


def rule_reward(task: str, response: str, question: Question) -> float:
    """1.0 if the response's answer is the reference by the task's rule, else 0.0."""
    answer = extract_answer(task, response)
    return float(answer is not None and is_correct(task, answer, question.answer))


def extract_answer(task: str, response: str) -> str | None:
    """The answer that a response gives, of the task's kind; None where it gives none."""
    text = strip_thinking(response)
    if text is None:
        return None
    found = list(statements(text))
    for read in TASKS[task].readers:
        for statement in found:
            if (answer := read(statement)) is not None:
                return answer
    return None


def is_correct(task: str, answer: str, reference: str) -> bool:
    """Compare an extracted answer with the reference, as the task asks."""
    return TASKS[task].is_correct(answer, reference)
