"""Whether the responses to a question know better than its reference.

A question is worth most where half of its responses meet the reference (equation 7), and a reference that is wrong is
met by some as well: by chance, or by those who err as the questioner did. So false references are paid like hard
questions. What tells them apart is what the others say. Where a reference is right, those who miss it err in many ways;
where most responses agree on one answer that the reference is not, it is the reference that is wrong as a rule. Such
a question earns nothing, and its responses, which would learn the error, are not trained on (docs/evidence.md shows
what that changes).

Majorities of one's own answers stand for labels in R-Zero (arXiv 2508.05004) and TTRL (arXiv 2504.16084); here they
only take references away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from spell_megatron.selfplay.episode import Response
from spell_megatron.selfplay.grading import is_correct


def outvoted(responses: Sequence[Response], task: str) -> bool:
    """Whether more than half of the responses give one answer, as their task compares them, and none was rewarded."""
    said = Counter(response.answer for response in responses if response.answer)
    earned = {
        answer: max(response.reward for response in responses if response.answer == answer) for answer in said
    }
    alike = ([other for other in said if _are_same(task, answer, other)] for answer in said)
    return any(
        2 * sum(said[answer] for answer in same) > len(responses)
        and max(earned[answer] for answer in same) <= 0
        for same in alike
    )


def _are_same(task: str, one: str, other: str) -> bool:
    return one == other or (is_correct(task, one, other) and is_correct(task, other, one))
