"""The contract of a rollout engine: tokens in, tokens out, weights by version.

A version is a number that only grows. Whatever an engine returns carries the version that sampled it,
so that nobody has to trust the order of events.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from spell_megatron.types import Rollout, SpellError, Tokens, Updates

if TYPE_CHECKING:
    import torch


Memory = Literal["weights", "cache"]


class EngineError(SpellError):
    """The engine cannot do what it was asked, or has died."""


class WeightsWanted(EngineError):
    """Engines are ready, and none serves before it is given the present weights once more: nobody kept them."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started, and what it is doing now. All in tokens or requests."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache held already: they cost no prefill."""
    generated_tokens: int = 0
    running: int = 0
    waiting: int = 0


class Engine(Protocol):
    """Something that samples from the policy. `generate` satisfies `selfplay.ports.Generator`."""

    @property
    def version(self) -> int:
        """Number of the weights that the next request will be answered with."""
        ...

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        """One rollout per seed, in the order of `seeds`.

        Log-probs are of the distribution sampled from, temperature and top-p applied. `max_tokens` shrinks
        to what the context window leaves. Cancelling the call aborts its requests. Raises EngineError where
        the prompt fills the window or the engine cannot serve, WeightsWanted where it can after another update.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights by full tensors under Hugging Face names, streamed in any order.

        A tensor must stay valid until the call returns. Raises EngineError if `version` does not grow, if
        a tensor is missing, unknown or misshapen, or if the transfer fails; the engine then serves nothing
        until an update succeeds. After `WeightsWanted` the version may be the present one.
        """
        ...

    def stats(self) -> EngineStats: ...

    def sleep(self, keep: bool = True) -> None:
        """Free the device memory of weights and KV cache. Without effect where there is no device.

        Unless it is to `keep` them, the weights may be lost: it then serves nothing before the next update.
        """
        ...

    def wake(self, memory: Memory) -> None:
        """Take a part of the memory back; it can be given weights with the first, and prompts with both."""
        ...

    def healthy(self) -> bool:
        """Whether `generate` would be served."""
        ...

    def close(self) -> None:
        """Stop, and free everything. Idempotent."""
        ...


def check_version(current: int, new: int) -> None:
    """Refuse a version that does not grow."""
    if new <= current:
        raise EngineError(
            f"weights of version {new} were sent to an engine that holds version {current}:"
            " versions only grow; number each update with the optimizer step that made it"
        )


def versions_of(spans: Iterable[tuple[str, int, int]], tokens: int) -> tuple[int, Updates]:
    """The version that began a completion and the updates in its middle, from vLLM's `(version, start, end)` spans.

    Raises ValueError where these do not cover its `tokens` in order, by versions that grow.
    """
    found = [(int(version), start, end) for version, start, end in spans]
    bounds = [0, *(end for _, _, end in found)]
    starts, versions = [start for _, start, _ in found], [version for version, _, _ in found]
    if not found or starts != bounds[:-1] or bounds[-1] != tokens or versions != sorted(set(versions)):
        raise ValueError(f"the versions {found} are not those of {tokens} tokens")
    return versions[0], tuple(zip(starts[1:], versions[1:], strict=True))


def room_for(prompt: Tokens, max_tokens: int, window: int) -> int:
    """Tokens that may be generated after `prompt` in a context window of `window` tokens.

    Raises EngineError where nothing fits.
    """
    if not prompt:
        raise EngineError("a prompt has no tokens: render the chat template before generating")
    if len(prompt) >= window:
        raise EngineError(
            f"a prompt of {len(prompt)} tokens does not fit the engine's window of {window} tokens"
            " with room for an answer: shorten it (corpus.cluster_tokens) or raise rollout.max_model_len"
        )
    return min(max_tokens, window - len(prompt))
