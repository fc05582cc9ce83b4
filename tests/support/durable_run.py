"""Program of test_durability.py: starts a run, or goes on with it, as often as its parent asks.

Everything is the product's own (learner, updates, checkpoints, journals, metrics, self-play, corpus, tokenizer).
The rollout engine is `real`, or `scripted`: it says what a script makes of the request's seed, so that what is
sampled does not depend on the weights and two runs can be compared bit by bit. Every request leaves its seed in
a log. A run is a forked child: everything is imported once, so that a start takes seconds and not twenty.

    python durable_run.py ENGINE RUNS key=value …       one line on standard input starts a run
    python -m launchers.ranks N durable_run.py ENGINE RUNS key=value …     goes on with the run, on several ranks
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spell_megatron.config import load_config
from spell_megatron.rollout.engine import EngineStats
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.run import driver
from spell_megatron.run.train import resume, train
from spell_megatron.types import Rollout, Tokens
from tokenizer.chat import ChatTokenizer


class Log:
    """The seeds that were asked for, in a file."""

    file: int

    @classmethod
    def note(cls, seeds: Sequence[int]) -> None:
        os.write(cls.file, "".join(f"{seed}\n" for seed in seeds).encode())


class Noted(InProcessEngine):
    """The real engine."""

    async def generate(self, prompt: Tokens, *, seeds: Sequence[int], **sampling: Any) -> list[Rollout]:
        Log.note(seeds)
        return await super().generate(prompt, seeds=seeds, **sampling)


class Scripted:
    """An engine without a model."""

    def __init__(self, model: Path, *_: Any, **__: Any) -> None:
        self.version = 0
        self._codec = ChatTokenizer.load(model)

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        Log.note(seeds)
        await asyncio.sleep(0.002 * random.random())
        text = self._codec.decode(prompt)
        return [self._rollout(prompt, said(text, random.Random(seed))) for seed in seeds]

    def _rollout(self, prompt: Tokens, text: str) -> Rollout:
        tokens = [*self._codec.encode(text), self._codec.eos_ids[0]]
        return Rollout(list(prompt), tokens, [-1.0] * len(tokens), "stop", self.version)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert version > self.version
        for _ in weights:
            pass
        self.version = version

    def stats(self) -> EngineStats:
        return EngineStats()

    def close(self) -> None: ...


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


def begun(runs: Path) -> list[Path]:
    """Folders of runs that can be gone on with."""
    return [path.parent for path in runs.glob("*/config.yaml")]


def main() -> None:
    engine, runs, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if engine == "real":
        driver.InProcessEngine = Noted  # type: ignore[misc]
    else:
        driver.InProcessEngine = driver.Fleet = Scripted  # type: ignore[assignment, misc]
    Log.file = os.open(runs / "requests.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    if "RANK" in os.environ:
        resume(begun(runs)[0], overrides)
        return
    config = load_config("toy", [f"runs={runs}", *overrides])
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            summary = resume(begun(runs)[0]) if begun(runs) else train(config)
            os._exit(summary.steps != config.steps)
        tell(child)
        _, status = os.waitpid(child, 0)
        tell(os.waitstatus_to_exitcode(status))


def tell(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
