"""What self-play needs from the outside: something that generates, something that knows the tokens.

The rollout engine and the tokenizer satisfy these protocols without importing this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from spell_megatron.types import Rollout, Tokens


class Generator(Protocol):
    """A rollout engine, as seen from self-play."""

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        """One rollout per seed, in the order of `seeds`. The same seed and weights give the same tokens."""
        ...


class Codec(Protocol):
    """Text to token ids and back, in the model's own chat format."""

    def prompt(self, message: str) -> list[int]:
        """Token ids of one user message, chat template applied, up to where the model starts to write."""
        ...

    def decode(self, tokens: Tokens) -> str:
        """Text of generated ids, special tokens dropped."""
        ...

    def count(self, text: str) -> int:
        """Number of tokens of plain text."""
        ...
