"""Which checkpoint is taken: rank 0 finds out, and all ranks digest the files for it.

Rank 0 alone goes through the folder and judges, so that the ranks cannot come to different verdicts. What takes long is
to read every byte; of that each rank has its share. No tensor is read before all ranks know the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from spell_megatron.policy.agreement import Group, Value, gathered
from spell_megatron.policy.checkpoint.files import TENSORS, Digester, digests
from spell_megatron.policy.waiting import MainRank
from spell_megatron.policy.world import World

_DOING = "reads the checkpoints"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The files whose digests rank 0 wants, by the rank that finds them."""

    folder: Path
    names: list[list[str]]


def dealt(names: Iterable[str], ranks: int) -> list[list[str]]:
    """What each rank digests of a checkpoint's files. The small ones are rank 0's.

    Files of tensors go round in the order of who wrote them. So in an unchanged world each rank has its own, which it
    is about to read, and fewer files than ranks are spread over the nodes.
    """
    shares: list[list[str]] = [[] for _ in range(ranks)]
    by_number = sorted(names, key=lambda name: (len(name), name))
    tensors = [name for name in by_number if name.endswith(TENSORS)]
    for place, name in enumerate(tensors):
        shares[place * ranks // len(tensors)].append(name)
    shares[0] += [name for name in by_number if not name.endswith(TENSORS)]
    return shares


class SharedSearch:
    """Every rank makes one; `group` is of all ranks. A share must be digested within the group's time-out, as it must
    be read within that afterwards."""

    def __init__(self, world: World, group: Group, rank_0: MainRank) -> None:
        self._world, self._group, self._rank_0 = world, group, rank_0

    def outcome(self, work: Callable[[Digester], Value]) -> Value:
        """What `work` comes to on rank 0, on every rank; all digest the files that it asks for. A collective."""
        if self._world.is_main:
            with self._rank_0.doing(_DOING):
                found = work(self._digests)
            return self._rank_0.tell(found)
        while isinstance(told := self._rank_0.tell(None), _Wanted):
            self._answers(told)
        return told  # type: ignore[return-value]

    def _digests(self, folder: Path, names: Iterable[str]) -> dict[str, str]:
        """As `files.digests`. For rank 0."""
        found: dict[str, str] = {}
        for answer in self._answers(self._rank_0.tell(_Wanted(folder, dealt(names, self._world.size)))):
            if isinstance(answer, OSError):
                raise answer
            found |= answer
        return found

    def _answers(self, wanted: _Wanted) -> list[dict[str, str] | OSError]:
        """Of all ranks on rank 0, nothing elsewhere. What could not be read is for rank 0 to ask for again."""
        answer: dict[str, str] | OSError
        try:
            answer = digests(wanted.folder, wanted.names[self._world.rank])
        except OSError as fault:
            answer = fault
        return gathered(answer, self._group)
