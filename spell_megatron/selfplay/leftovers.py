"""What a step has begun and does not need: episodes behind the one that fills its batch.

They are the first that the next step would ask for, because the corpus is wound back to them. So they
can be dropped without loss (the same clusters and tasks come again, by new weights and other seeds), or
be carried over: the next step finds them in its first places, under way or finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from spell_megatron.selfplay.episode import Episode

Work = Episode | asyncio.Task[Episode]


@dataclass(frozen=True, slots=True)
class Leftover:
    """An episode, finished or under way, none of whose rollouts is of weights before `oldest`."""

    work: Work
    oldest: int


@dataclass(slots=True)
class Tally:
    """Where the episodes of a step came from and where they went. Both sides have the same sum:

        begun + brought + journaled = used + aborted + unused + carried + expired

    What is `aborted`, `unused` or `carried` depends on timing; what is used does not, unless something
    was carried.
    """

    begun: int = 0
    """Asked for by this step."""
    brought: int = 0
    """Carried over by the step before."""
    journaled: int = 0
    """Finished by an interrupted run of this step."""
    used: int = 0
    """Are the step's."""
    aborted: int = 0
    """Were under way at its end, and are asked for again."""
    unused: int = 0
    """Were finished behind its end, and are asked for again."""
    carried: int = 0
    """Go on in the next step."""
    expired: int = 0
    """Were brought, but made by weights that are too old, and asked for again."""


async def cancel(work: Iterable[Work]) -> None:
    """Cancel what is under way and wait for its end, so that no request outlives its step.

    Errors of the work are dropped; a cancellation of the caller itself (Ctrl-C) is not.
    """
    tasks = [task for task in work if not isinstance(task, Episode)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
