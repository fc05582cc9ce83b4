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
from spell_megatron.selfplay.reading.texts import normalise


def outvoted(responses: Sequence[Response]) -> bool:
    """Whether more than half of the responses give the same answer, and none of them was rewarded for it."""
    given = [normalise(response.answer) if response.answer else None for response in responses]
    said = Counter(answer for answer in given if answer)
    if not said:
        return False
    answer, count = said.most_common(1)[0]
    earned = [response.reward for response, own in zip(responses, given, strict=True) if own == answer]
    return 2 * count > len(responses) and max(earned) <= 0
