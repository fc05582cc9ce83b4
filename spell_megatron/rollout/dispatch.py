"""Which engine gets a request: the one whose prefix cache holds the prompt, unless it is full.

Pure bookkeeping. The G completions of one prompt come one after another and go to the same engine; so do
prompts that share at least half of their tokens from the start, such as two questions about the same
documents. Anything else goes to the engine with the least to do.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

from spell_megatron.types import Tokens

_REMEMBERED = 65_536


class Dispatcher:
    """Knows how many requests each engine has, and which prompts it has seen.

    `capacity` is the most requests that one engine is given at a time.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._running: Counter[str] = Counter()
        self._homes: OrderedDict[int, str] = OrderedDict()

    def choose(self, prompt: Tokens, engines: Iterable[str]) -> str | None:
        """An engine out of `engines` for `prompt`, or None while all of them are full.

        The choice counts as a running request until `finished` is called.
        """
        free = sorted(
            (name for name in engines if self._running[name] < self._capacity),
            key=lambda name: (self._running[name], name),
        )
        if not free:
            return None
        keys = list(_prefixes(prompt))
        homes = (self._homes.get(key) for key in keys)
        engine = next((home for home in homes if home in free), free[0])
        for key in keys:
            self._homes[key] = engine
            self._homes.move_to_end(key)
        while len(self._homes) > _REMEMBERED:
            self._homes.popitem(last=False)
        self._running[engine] += 1
        return engine

    def finished(self, engine: str) -> None:
        self._running[engine] -= 1

    def running(self, engine: str | None = None) -> int:
        return self._running.total() if engine is None else self._running[engine]

    def forget(self) -> None:
        """All prefix caches were emptied."""
        self._homes.clear()


def _prefixes(prompt: Tokens) -> Iterator[int]:
    """Keys of the whole prompt, and of its longest prefix whose length is a power of two."""
    yield hash(tuple(prompt))
    if prompt:
        yield hash(tuple(prompt[: 1 << (len(prompt).bit_length() - 1)]))
