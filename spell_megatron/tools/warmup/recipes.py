"""What each world's seed model is taught, and how.

The lessons go from looking up in few short documents to the whole world, and end with the habits
(hasty answers, slips, wrong keys) that leave self-play something to improve.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from spell_megatron.corpus.demonstrations import CLEAN, Demonstrations, Mix
from spell_megatron.corpus.hard import SMALL, Extent
from spell_megatron.corpus.hard.transcripts import SMALL_DEMONSTRATIONS, SMALL_HABITS
from spell_megatron.corpus.toy import DEMONSTRATIONS, HABITS, WHOLE, Scale
from spell_megatron.tools.warmup.lessons import Lesson
from spell_megatron.tools.warmup.untaught import Shape


@dataclass(frozen=True)
class Term:
    """Lessons under one learning rate: linear warm-up, then cosine decay over `decay_steps`."""

    lessons: tuple[Lesson, ...]
    lr: float
    decay_steps: int
    """May be more than the term has: it then ends at a rate still high."""

    @property
    def steps(self) -> int:
        return sum(lesson.steps for lesson in self.lessons)


@dataclass(frozen=True)
class Recipe:
    """With a seed it settles every weight."""

    terms: tuple[Term, ...]
    shape: Shape = field(default_factory=Shape)
    positions: int = 1024
    tokens: int = 4096
    """Tokens of one update."""
    vocabulary: int = 1024
    """Upper bound of the tokenizer's size."""


_TINY = Scale(people=(2, 2), shops=(1, 1), traits=(2, 2), items=(2, 2), paraphrases=False)
_MIDDLE = Scale(people=(3, 4), shops=(1, 2), traits=(2, 3), items=(2, 3))
_DIRECT = replace(CLEAN, hops=0.0, hops_after_history=0.0)

SCHOOL = (
    Lesson("look up", 300, _DIRECT, _TINY, Mix(5, 1, 1, 0), patterns=3),
    Lesson("other words", 200, replace(CLEAN, hops=0.2), _MIDDLE, Mix(8, 2, 2, 1), choices=1),
    Lesson("the whole world", 200, CLEAN, WHOLE, Mix(10, 4, 3, 1), choices=1),
)
PRACTICE = (
    Lesson("all roles", 350, CLEAN, WHOLE, Mix(6, 6, 3, 1, 3), choices=1),
    Lesson("habits", 250, HABITS, WHOLE, Mix(6, 6, 3, 1, 3), restate=False),
)
LAST = (
    Lesson("copying", 150, CLEAN, WHOLE, Mix(4, 8, 2, 1, 4), verbatim=True),
    Lesson("habits again", 150, HABITS, WHOLE, Mix(6, 8, 3, 1, 4), verbatim=True),
)
_TRUE_KEYS = replace(HABITS, wrong_key=0.0, long_reference=1.0)
POLISH = (Lesson("true keys", 500, _TRUE_KEYS, WHOLE, Mix(4, 12, 2, 1, 4), verbatim=True),)

TOY = Recipe(
    (Term(SCHOOL, 3e-3, 1200), Term(PRACTICE, 2e-3, 600), Term(LAST, 2e-3, 300), Term(POLISH, 2e-3, 500))
)

_TWO = Extent(
    people=(2, 2),
    shops=(2, 2),
    outdated=(0, 0),
    traits=(1, 2),
    items=(1, 2),
    goods=2,
    chains=(0, 0),
    tokens=(1, 33),
    largest=12,
    similar=0.0,
    decoys=0.0,
    wordings=1,
)
_FEW = replace(_TWO, people=(3, 4), shops=(2, 3), chains=(0, 1), keys=(2, 2), tokens=(30, 120), wordings=2)
_LINKED = replace(CLEAN, spelled=0.0, long_reference=0.2, hops=0.5)
_ALONE = replace(_LINKED, hops=0.0, hops_after_history=0.0)
_CHAINED = replace(_LINKED, hops=0.6)
_CHAINS = Term(
    (Lesson("chains", 1000, _CHAINED, SMALL, Mix(8, 12, 4, 1, 4), choices=1, verbatim=True),), 2e-3, 1000
)
_SHORTCUTS = replace(SMALL_HABITS, hasty_further=0.6, wrong_key=0.03, hops=0.6)

HARD = Recipe(
    (
        Term(
            (
                Lesson("look up", 250, _ALONE, _TWO, Mix(6, 1, 1, 0), patterns=3),
                Lesson("other words", 200, replace(_LINKED, hops=0.2), _FEW, Mix(8, 2, 2, 1), choices=1),
                Lesson("look-alikes", 350, _LINKED, SMALL, Mix(12, 4, 3, 1), choices=1),
            ),
            3e-3,
            1200,
        ),
        Term(
            (
                Lesson("all roles", 300, _LINKED, SMALL, Mix(10, 8, 4, 1, 3), choices=1, verbatim=True),
                Lesson("habits", 200, SMALL_HABITS, SMALL, Mix(10, 8, 4, 1, 3), verbatim=True),
            ),
            1.5e-3,
            500,
        ),
        _CHAINS,
        _CHAINS,
        Term((Lesson("shortcuts", 300, _SHORTCUTS, SMALL, Mix(12, 10, 4, 1, 3), verbatim=True),), 1e-3, 300),
    ),
    Shape(hidden=192, layers=5, heads=6, ffn=576, back=(1, 2, 3, 4), repeat=2, rope_theta=1e6),
    positions=4096,
    vocabulary=1536,
)

RECIPES: dict[str, tuple[Demonstrations, Recipe]] = {
    "toy": (DEMONSTRATIONS, TOY),
    "hard-small": (SMALL_DEMONSTRATIONS, HARD),
}
"""By world."""
