"""The live engines of a training run as a source of completions: the same runner, no second server."""

from __future__ import annotations

from collections.abc import Sequence

from eval.benchmark import Completion
from eval.endpoint import Unanswered
from eval.prompting import Codec
from spell_megatron.rollout.engine import Engine, EngineError


class LiveSource:
    """Completions by a rollout engine at its present version of the weights."""

    def __init__(self, engine: Engine, codec: Codec, run: str, max_model_len: int | None = None) -> None:
        self._engine = engine
        self._codec = codec
        self.identity = (run, f"version {engine.version}")
        self.max_model_len = max_model_len

    async def complete(
        self, prompt: Sequence[int], *, seed: int, max_tokens: int, temperature: float, top_p: float
    ) -> Completion:
        try:
            [rollout] = await self._engine.generate(
                prompt, seeds=[seed], max_tokens=max_tokens, temperature=temperature, top_p=top_p
            )
        except EngineError as error:
            raise Unanswered(str(error)) from None
        return Completion(self._codec.decode(rollout.tokens), rollout.finish, len(rollout.tokens))

    async def alive(self) -> bool:
        return self._engine.healthy()
