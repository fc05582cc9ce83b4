"""Self-play on a thread of its own, so that it can go on while the main thread trains.

The learner stays on the main thread: CUDA devices, collectives and signals belong to threads. What is
asynchronous runs in one event loop behind it. How far plays may run ahead is a number, no second kind of
loop: at 0 a play begins when it is asked for, and nothing overlaps.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Played = TypeVar("Played")
Result = TypeVar("Result")


class Prefetcher(Generic[Played]):
    """Plays steps up to `last`, one after another in their order, at most `ahead` before they are asked for.

    Who asks for step s has weights s-1 in place. Step s+k may begin then, as soon as the one before it has
    ended: by weights that are k updates behind the s+k-1 that it trains.
    """

    def __init__(self, play: Callable[[int], Coroutine[Any, Any, Played]], *, ahead: int, last: int) -> None:
        self._play, self._ahead, self._last = play, ahead, last
        self._plays: dict[int, Future[Played]] = {}
        began: Future[AbstractEventLoop] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._live(began)), name="self-play", daemon=True
        )
        self._thread.start()
        self._loop = began.result()

    def play(self, step: int) -> Played:
        """The play of `step`; waits for it. An error of a play is that of every later one, too."""
        for number in range(step, max(step, min(step + self._ahead, self._last)) + 1):
            if number not in self._plays:
                self._plays[number] = self._submit(self._after(self._plays.get(number - 1), number))
        try:
            return self._plays[step].result()
        finally:
            self._plays.pop(step - 1, None)

    def forget(self) -> None:
        """Every play begins anew when it is asked for. None may be under way."""
        self._plays.clear()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of something else that is asynchronous; waits for it."""
        return self._submit(work).result()

    def close(self) -> None:
        """Cancel whatever runs, and end the thread. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()

    def _submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _after(self, before: Future[Played] | None, step: int) -> Played:
        if before is not None:
            await asyncio.wrap_future(before)
        return await self._play(step)

    async def _live(self, began: Future[AbstractEventLoop]) -> None:
        self._end = asyncio.Event()
        began.set_result(asyncio.get_running_loop())
        await self._end.wait()
