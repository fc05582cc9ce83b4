"""Generators between self-play and an engine: one that imposes lengths, and one that puts barriers between roles."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import replace

from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.selfplay.ports import Generator
from spell_megatron.types import Rollout, Tokens

MEDIAN, SIGMA, SHORTEST, LONGEST = 0.4, 1.3, 0.5, 10.0
"""A completion costs its role's token limit times a log-normal factor of this median and spread, within bounds."""
_QUIET_TURNS = 20
"""Turns of the event loop after which nobody is about to ask for something."""
_depth: ContextVar[int] = ContextVar("depth", default=0)
"""Completions that this task, and those that it came from, have waited for: the role's place in the step."""


class LongTailed:
    """A generator whose completions cost what their seeds say. `engine` must have no stop tokens."""

    def __init__(self, engine: InProcessEngine, ends: Sequence[int]) -> None:
        self._engine, self._ends = engine, frozenset(ends)
        self.requests: Counter[tuple[tuple[int, ...], int]] = Counter()
        """By prompt and seed."""

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        (seed,) = seeds
        factor = MEDIAN * random.Random(seed).lognormvariate(0.0, SIGMA)
        length = int(max_tokens * min(max(factor, SHORTEST), LONGEST))
        self.requests[tuple(prompt), seed] += 1
        [rollout] = await self._engine.generate(
            prompt, seeds=seeds, max_tokens=length, temperature=temperature, top_p=top_p
        )
        own = rollout.tokens[:max_tokens]
        end = next((place for place, token in enumerate(own, 1) if token in self._ends), None)
        own, logprobs = own[:end], rollout.logprobs[: end or max_tokens]
        return [replace(rollout, tokens=own, logprobs=logprobs, finish="stop" if end else "length")]


class Barriers:
    """A generator that opens one role after the other, each when the one before is done."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._running = 0
        self._held: list[tuple[int, asyncio.Event]] = []
        self._opening: asyncio.Task[None] | None = None
        self.opened: list[int] = []
        """Requests of each phase."""

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        depth, opened = _depth.get(), asyncio.Event()
        self._held.append((depth, opened))
        self._look()
        await opened.wait()
        try:
            return await self._generator.generate(
                prompt, seeds=seeds, max_tokens=max_tokens, temperature=temperature, top_p=top_p
            )
        finally:
            _depth.set(depth + 1)
            self._running -= 1
            self._look()

    def _look(self) -> None:
        if not self._running and (self._opening is None or self._opening.done()):
            self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        for _ in range(_QUIET_TURNS):  # those whose completion has just ended may ask for the next one
            await asyncio.sleep(0)
        first = min((depth for depth, _ in self._held), default=0)
        released = [event for depth, event in self._held if depth == first]
        self._held = [entry for entry in self._held if entry[0] != first]
        self._running += len(released)
        self.opened.append(len(released))
        for event in released:
            event.set()
