"""Waiting for rank 0, for as long as it lives.

Rank 0 plays, measures, starts engines and reads disks while the other ranks have nothing to do: for seconds or for
days. A collective cannot tell a rank that works from one that is dead, so none is entered before rank 0 is there: it
says in the store what it is doing and how far it is, again and again from a thread, and the others watch that. A beat
proves that its process runs, not that its work goes on; how long that has taken already is in the log.

A process that was killed or stopped, or whose machine is out of reach, beats no more. Whoever waits for it gives up.

How a run ends is rank 0's to say, too. What starts ranks (srun, `launchers/ranks.py`) ends all of them when one ends
with a code that is not 0, and rank 0 has most to close: engines, the lock, what is on its way to the disk. So a rank
that leaves by an error, as rank 0 does, waits until that has closed all it had, and leaves with 0.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch.distributed as dist

from spell_megatron.policy.agreement import Value, agreed
from spell_megatron.types import SpellError

if TYPE_CHECKING:
    from spell_megatron.policy.world import World

_log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
GONE_SECONDS = 30.0
"""Without a beat for so long, rank 0 counts as gone."""
_MENTIONED = 600.0
"""Seconds between two lines of the log on somebody who waits."""
_POLL_SECONDS, _LONG_POLL_SECONDS, _LONG = 0.02, 0.5, 2.0
"""Between two looks, and between two after a wait that has become long."""
_LAST_LOOK_SECONDS = 5.0
"""How long a rank waits for the end of its last look or beat. An interpreter that ends tears its threads out of what
they are in; out of the store, or of the last hold of it, that aborts the process."""
LEAVING_SECONDS, CLOSING_SECONDS = 5.0, 300.0
"""How long a rank that leaves by an error waits for rank 0 to say that it leaves, too, and then for it to be done."""
_KEY = "spell/rank 0"


class MainRankGone(SpellError):
    """Rank 0 is not there any more, or has given up."""


class Dismissed(SpellError):
    """Another rank than rank 0 leaves a run by an error. Rank 0 did before, and its exit code is the run's."""

    exit_code = 0


@dataclass(frozen=True, slots=True)
class Heart:
    """What rank 0 says of itself."""

    beat: int = 0
    reached: int = 0
    """Meetings that it has come to."""
    doing: str = "starts"
    since: float = 0.0
    """Seconds since the epoch, by rank 0's clock."""
    fault: str = ""
    """Why it comes to no further meeting."""
    ended: bool = False
    """Whether all that it had is closed. What is left is that its process ends."""


@dataclass(slots=True)
class Watch:
    """Judges a heart by what was seen of it, and when."""

    heart: Heart
    changed: float

    def see(self, heart: Heart, now: float) -> None:
        if heart != self.heart:
            self.heart, self.changed = heart, now

    def verdict(self, meeting: int, now: float) -> bool:
        """Whether rank 0 has come to a meeting; raises MainRankGone where it never will."""
        if self.heart.reached >= meeting:
            return True
        doing = f"while this rank waited for it: it {self.heart.doing}"
        if self.heart.fault:
            raise MainRankGone(f"rank 0 has given up ({self.heart.fault}) {doing}; its own message says why")
        if (silent := now - self.changed) > GONE_SECONDS:
            raise MainRankGone(
                f"rank 0 has not been heard of for {silent:.0f} s {doing}. It was killed or stopped, or its node"
                " is out of reach; `spell-megatron resume` goes on from the last checkpoint"
            )
        return False


class MainRank:
    """Rank 0, as all ranks see it. Every rank makes one, and calls its methods in the same order.

    In a world of one process nothing is said and nobody waits. Around all that a run opens it is a context: raises
    Dismissed from a SpellError by which a rank leaves, once rank 0 has left.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._group = dist.group.WORLD if world.size > 1 else None
        self._met = 0
        self._end = threading.Event()
        if self._group is None:
            return
        # A connection of its own: the default one is busy for as long as somebody waits by it.
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=GONE_SECONDS))
        self._heart = Heart(since=time.time())
        self._speaking = threading.Lock()
        self._watch = Watch(self._heart, time.monotonic())
        self._waiting = threading.Event()
        self._looking = threading.Lock()
        work = self._beat if world.is_main else self._look
        self._thread = threading.Thread(target=work, name="rank 0", daemon=True)
        self._thread.start()

    def work(self, doing: str, work: Callable[[], Value]) -> Value:
        """`work` on rank 0 alone; its result, on every rank. `doing` completes the sentence "it …"."""
        if self._group is None:
            return work()
        result = None
        if self._world.is_main:
            with self.doing(doing):
                result = work()
        return self.tell(result)  # type: ignore[return-value]

    @contextmanager
    def doing(self, doing: str) -> Iterator[None]:
        """For rank 0: say what it does, and where it fails, that nobody need wait for it."""
        if self._group is None:
            yield
            return
        self._say(doing=doing, since=time.time())
        with self.announced():
            yield

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Where the block fails on rank 0, the others know at once, whatever rank 0 has to close before it ends."""
        try:
            yield
        except BaseException as error:
            if self._group is not None and self._world.is_main:
                self._say(fault=type(error).__name__)
            raise

    def tell(self, value: Value) -> Value:
        """Rank 0's value, on every rank, when rank 0 is here."""
        self.meet()
        return agreed(value, self._group)

    def meet(self) -> None:
        """Return when rank 0 is here, too."""
        self._met += 1
        if self._group is None:
            return
        if self._world.is_main:
            self._say(reached=self._met)
        else:
            self._wait(self._met)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._group is None:
            return
        try:
            if self._world.is_main:
                self._say(fault=self._heart.fault or "its run has ended", ended=True)
            elif isinstance(error, SpellError) and self._left():
                raise Dismissed(f"{error}; rank 0 says how the run ends") from error
        finally:
            self._end.set()
            self._waiting.set()
            self._thread.join(_LAST_LOOK_SECONDS)

    def _say(self, **news: object) -> None:
        with self._speaking:
            self._heart = replace(self._heart, beat=self._heart.beat + 1, **news)  # type: ignore[arg-type]
            self._store.set(_KEY, json.dumps(asdict(self._heart)))

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            self._say()

    def _look(self) -> None:
        """Keep the watch up to date while somebody waits. Runs on a thread: a store may never answer."""
        while not self._end.is_set():
            self._waiting.wait()
            began = time.monotonic()
            while self._waiting.is_set() and not self._end.is_set():
                with self._looking:
                    heart = self._heart_seen() if self._waiting.is_set() else self._watch.heart
                self._watch.see(heart, now := time.monotonic())
                time.sleep(_POLL_SECONDS if now - began < _LONG else _LONG_POLL_SECONDS)

    def _heart_seen(self) -> Heart:
        try:
            return Heart(**json.loads(self._store.get(_KEY)))
        except RuntimeError:  # nobody keeps the store any more, or not in time
            heart = self._watch.heart
            return replace(heart, ended=bool(heart.fault))

    def _wait(self, meeting: int) -> None:
        mentioned = time.monotonic()
        with self._watched() as pause:
            while not self._watch.verdict(meeting, now := time.monotonic()):
                if now - mentioned > _MENTIONED:
                    mentioned, heart = now, self._watch.heart
                    _log.info("waiting for rank 0: for %.0f s it %s", time.time() - heart.since, heart.doing)
                pause()

    def _left(self) -> bool:
        """Whether rank 0 has left, for a rank that does. Waits for it, if it is about to."""
        began = time.monotonic()
        with self._watched() as pause:
            while not self._watch.heart.ended:
                patience = CLOSING_SECONDS if self._watch.heart.fault else LEAVING_SECONDS
                if time.monotonic() - began > patience:
                    return False
                pause()
        return True

    @contextmanager
    def _watched(self) -> Iterator[Callable[[], None]]:
        """Have the watch kept up to date. Yields what to do between two looks at it."""
        began = time.monotonic()
        self._watch.changed = began  # nobody has looked since the last meeting
        self._waiting.set()
        try:
            yield lambda: time.sleep(
                _POLL_SECONDS if time.monotonic() - began < _LONG else _LONG_POLL_SECONDS
            )
        finally:
            self._waiting.clear()
            # A store whose owner was stopped never answers: whoever looks there comes back no more.
            if self._looking.acquire(timeout=_LAST_LOOK_SECONDS):
                self._looking.release()
