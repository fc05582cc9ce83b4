"""SQuAD's comparison of texts, which the question-answering benchmarks are scored by.

Only ASCII punctuation counts as punctuation, as in the official scorers: self-play's own comparison
(`spell_megatron.selfplay.grading`) knows every script's.
"""

from __future__ import annotations

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case without ASCII punctuation, articles and surplus white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


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
