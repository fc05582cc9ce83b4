"""Engines of a user's own: named in a recipe as `rollout.kind=scripted_engine:SCRIPTED` or `:REAL`.

`SCRIPTED` has no model. It says what a script makes of the request's seed, so that what is sampled does not depend on
the weights and two runs can be compared bit by bit. `REAL` is vLLM's. Both note the seeds that they are asked for in
`requests.log`, in the folder of runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from spell_megatron.rollout.engine import EngineStats, Memory, check_version
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.rollout.kinds import EngineKind, EngineOrder
from spell_megatron.types import Rollout, Tokens
from tokenizer.chat import ChatTokenizer


class Log:
    """The seeds that were asked for, in a file of the folder of runs."""

    def __init__(self, order: EngineOrder) -> None:
        self._file = os.open(order.logs.parents[1] / "requests.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, seeds: Sequence[int]) -> None:
        os.write(self._file, "".join(f"{seed}\n" for seed in seeds).encode())


class Real(InProcessEngine):
    def __init__(self, order: EngineOrder) -> None:
        chosen = {"seed": order.seed, "stop": order.stop, "scratch": order.scratch}
        super().__init__(order.model, order.settings, **chosen)  # type: ignore[arg-type]
        self._log = Log(order)

    async def generate(self, prompt: Tokens, *, seeds: Sequence[int], **sampling: Any) -> list[Rollout]:
        self._log.note(seeds)
        return await super().generate(prompt, seeds=seeds, **sampling)


class Scripted:
    def __init__(self, order: EngineOrder) -> None:
        self.version = 0
        self._codec, self._log = ChatTokenizer.load(order.model), Log(order)

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        self._log.note(seeds)
        await asyncio.sleep(0.002 * random.random())
        text = self._codec.decode(prompt)
        return [self._rollout(prompt, said(text, random.Random(seed))) for seed in seeds]

    def _rollout(self, prompt: Tokens, text: str) -> Rollout:
        tokens = [*self._codec.encode(text), self._codec.eos_ids[0]]
        return Rollout(list(prompt), tokens, [-1.0] * len(tokens), "stop", self.version)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        check_version(self.version, version)
        for _ in weights:
            pass
        self.version = version

    def stats(self) -> EngineStats:
        return EngineStats()

    def sleep(self, keep: bool = True) -> None: ...

    def wake(self, memory: Memory) -> None: ...

    def healthy(self) -> bool:
        return True

    def close(self) -> None: ...


SCRIPTED, REAL = EngineKind("scripted", Scripted), EngineKind("real", Real)


def said(prompt: str, draw: random.Random) -> str:
    """A question, an answer that is right half of the time, or a verdict that mostly is."""
    if "<make>" in prompt:
        question: dict[str, Any] = {"question": f" What about {draw.randrange(10**6)}?", "answer": " 12"}
        if "<key>" in prompt:
            key = prompt.partition("<key>")[2].split()[0]
            question |= {"answer": f" {key}", "options": {c: f" choice {c}" for c in "ABCD"}}
        return json.dumps(question)
    if "<judge>" in prompt:
        answer, reference = (prompt.partition(tag)[2].split()[0] for tag in ("<said>", "<ref>"))
        return "[[YES]]" if (answer == reference) == (draw.random() < 0.8) else "[[NO]]"
    if "Empty" in prompt:
        return "The text does not say."
    value = draw.choice("ABCD") if "choice A" in prompt else draw.choice(["12", "13"])
    return f"The correct answer is ({value})."
