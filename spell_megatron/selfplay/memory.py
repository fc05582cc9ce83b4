"""History memory: what was asked about a cluster before.

For every (task, cluster) the most recent L questions of positive mean reward are remembered, with the
documents that their questioner read. They lead the curriculum: see `curriculum`.
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


class Memory:
    """A ring of at most `size` questions per (task, cluster); of size 0 it forgets everything."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._rings: dict[tuple[str, str], deque[Remembered]] = {}

    def recall(self, task: str, cluster: str) -> tuple[Remembered, ...]:
        """What is remembered, oldest first."""
        return tuple(self._rings.get((task, cluster), ()))

    def store(self, task: str, cluster: str, documents: Sequence[int], question: Question) -> bool:
        """Remember a question; the oldest one gives way. False for an exact repeat, which is not stored."""
        if self.size == 0 or any(_same(old.question, question) for old in self.recall(task, cluster)):
            return False
        ring = self._rings.setdefault((task, cluster), deque(maxlen=self.size))
        ring.append(Remembered(tuple(sorted(set(documents))), question))
        return True

    def __len__(self) -> int:
        """Questions remembered, over all tasks and clusters."""
        return sum(map(len, self._rings.values()))

    @property
    def rings(self) -> int:
        """Pairs of task and cluster with something to remember."""
        return len(self._rings)

    def state(self) -> list[dict[str, Any]]:
        """Everything, as JSON."""
        return [
            {"task": task, "cluster": cluster, "questions": [asdict(entry) for entry in ring]}
            for (task, cluster), ring in self._rings.items()
        ]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Replace everything by what `state()` gave; a smaller ring keeps the most recent questions."""
        self._rings = {}
        try:
            for ring in state:
                for entry in ring["questions"]:
                    self.store(
                        ring["task"], ring["cluster"], entry["documents"], Question(**entry["question"])
                    )
        except (KeyError, TypeError) as error:
            raise SpellError(
                f"the saved history memory cannot be read: {error!r}; resume from another checkpoint"
            ) from None


def _same(one: Question, other: Question) -> bool:
    """The same words ask for the same thing; what the documents or the options are does not matter."""
    return one.text.strip() == other.text.strip()
