"""What self-play needs from the outside: something that generates, something that knows the tokens.

The rollout engine and the tokenizer satisfy these protocols without importing this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spell_megatron.types import Question, Rollout, Tokens


@dataclass(frozen=True, slots=True)
class Opinion:
    """What an external judge says of an answer: 1 or 0, or None and the fault that kept it from saying."""

    score: float | None
    fault: str = ""


class Judge(Protocol):
    """A judge that is no part of the policy."""

    async def __call__(self, question: Question, answer: str) -> Opinion:
        """Whether an answer means the question's reference."""
        ...


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
