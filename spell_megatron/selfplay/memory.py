"""History memory: what was asked about a cluster before.

For every (task, cluster) the most recent L questions of positive mean reward are remembered, with the
documents that their questioner read. They lead the curriculum: see `curriculum`.

It is bounded by count and by age, so that weeks of steps over a large corpus fill neither memory nor checkpoints: what
was remembered longest ago is forgotten first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spell_megatron.types import Question, SpellError


@dataclass(frozen=True, slots=True)
class Remembered:
    """A question, and the indices in the cluster of the documents that its questioner read."""

    documents: tuple[int, ...]
    question: Question


@dataclass(slots=True)
class _Ring:
    questions: deque[Remembered]
    step: int
    """The step of the last question."""


class Memory:
    """A ring of at most `size` questions per (task, cluster); of size 0 it forgets everything.

    Over all rings there are at most `limit` questions, and in none the last one is more than `age` steps old.
    """

    def __init__(self, size: int, limit: int = 20_000, age: int = 2_000) -> None:
        self.size, self._limit, self._age = size, limit, age
        self._rings: dict[tuple[str, str], _Ring] = {}  # the one that was stored to last at the end
        self._count = 0

    def recall(self, task: str, cluster: str) -> tuple[Remembered, ...]:
        """What is remembered, oldest first."""
        ring = self._rings.get((task, cluster))
        return tuple(ring.questions) if ring else ()

    def store(
        self, task: str, cluster: str, documents: Sequence[int], question: Question, step: int = 0
    ) -> bool:
        """Remember a question; the oldest one gives way. False for an exact repeat, which is not stored."""
        if self.size == 0 or any(_same(old.question, question) for old in self.recall(task, cluster)):
            return False
        ring = self._rings.pop((task, cluster), None) or _Ring(deque(maxlen=self.size), step)
        self._count += len(ring.questions) < self.size
        ring.questions.append(Remembered(tuple(sorted(set(documents))), question))
        ring.step = step
        self._rings[task, cluster] = ring
        self._forget(step)
        return True

    def _forget(self, step: int) -> None:
        """Drop the rings that were stored to longest ago, until the bounds hold. One ring always stays."""
        while len(self._rings) > 1:
            first = next(iter(self._rings))
            ring = self._rings[first]
            if self._count <= self._limit and step - ring.step <= self._age:
                return
            self._count -= len(ring.questions)
            del self._rings[first]

    def __len__(self) -> int:
        """Questions remembered, over all tasks and clusters."""
        return self._count

    @property
    def rings(self) -> int:
        """Pairs of task and cluster with something to remember."""
        return len(self._rings)

    def state(self) -> list[dict[str, Any]]:
        """Everything, as JSON."""
        return [
            {
                "task": task,
                "cluster": cluster,
                "step": ring.step,
                "questions": [asdict(entry) for entry in ring.questions],
            }
            for (task, cluster), ring in self._rings.items()
        ]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Replace everything by what `state()` gave; a smaller ring keeps the most recent questions."""
        self._rings, self._count = {}, 0
        newest = max((ring.get("step", 0) for ring in state), default=0)
        try:
            for ring in state:
                for entry in ring["questions"]:
                    self.store(
                        ring["task"],
                        ring["cluster"],
                        entry["documents"],
                        Question(**entry["question"]),
                        ring.get("step", newest),  # optional in a saved state
                    )
        except (KeyError, TypeError) as error:
            raise SpellError(
                f"the saved history memory cannot be read: {error!r}; resume from another checkpoint"
            ) from None


def _same(one: Question, other: Question) -> bool:
    """The same words ask for the same thing; what the documents or the options are does not matter."""
    return one.text.strip() == other.text.strip()
