"""The live engines of a training run as a source of completions: the same runner, no second server."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from eval.benchmark import Completion
from eval.benchmarks import find
from eval.endpoint import Unanswered
from eval.measure import load, measure, plan
from eval.prompting import ChatCodec
from eval.runner import Settings
from spell_megatron.base.terminal import Terminal
from spell_megatron.config import Config
from spell_megatron.rollout.engine import Engine, EngineError, WeightsWanted

_log = logging.getLogger(__name__)


class LiveSource:
    """Completions by a rollout engine at its present version of the weights."""

    def __init__(self, engine: Engine, codec: ChatCodec, run: str, max_model_len: int | None = None) -> None:
        self._engine = engine
        self._codec = codec
        self.identity: Sequence[str] = (run, f"version {engine.version}")
        self.max_model_len = max_model_len

    async def complete(
        self, prompt: Sequence[int], *, seed: int, max_tokens: int, temperature: float, top_p: float
    ) -> Completion:
        try:
            [rollout] = await self._engine.generate(
                prompt, seeds=[seed], max_tokens=max_tokens, temperature=temperature, top_p=top_p
            )
        except WeightsWanted:  # the run sends them again, and measures again
            raise
        except EngineError as error:
            raise Unanswered(str(error)) from None
        return Completion(self._codec.decode(rollout.tokens), rollout.finish, len(rollout.tokens))

    async def alive(self) -> bool:
        return self._engine.healthy()


class LiveBenchmarks:
    """The benchmarks of `heldout.benchmarks` during a run: what `spell-megatron eval` says of the same weights.

    Their data are read when the run starts, so that a missing file is found then.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        settings, sampling = config.heldout, config.selfplay.sampling
        self._settings = Settings(
            samples=settings.samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            thinking=config.model.thinking,
            concurrency=config.selfplay.concurrency,
            limit=settings.limit,
        )
        self._console = Terminal(quiet=True)  # the run's own live view is on
        data = Path(settings.data).expanduser() if settings.data else None
        self._loaded = load(find(settings.benchmarks), data, self._console)

    async def __call__(self, engine: Engine, codec: ChatCodec, home: Path) -> dict[str, float]:
        """Scores under `eval/<benchmark>`; answers and tables go to `home`.

        What is incomplete has none: the mean of the questions that happened to be answered is no point of the curve.
        """
        source = LiveSource(engine, codec, home.name, self._config.rollout.max_model_len)
        plans = plan(self._loaded, [self._config.heldout.max_input], codec, self._settings)
        report = await measure(source, codec, plans, self._settings, home, home.name, console=self._console)
        scores = {}
        for part, result in zip(plans, report.results, strict=True):
            if result.complete:
                scores[f"eval/{part.label}"] = result.mean.value
            else:
                scored, asked = result.counts["scored"], result.counts["asked"]
                _log.warning(
                    "%s: %d of %d samples scored, see %s", part.label, scored, asked, home / "report.md"
                )
        return scores


def live_benchmarks(config: Config) -> LiveBenchmarks | None:
    """For `train` and `resume`: None where the recipe names no benchmark."""
    return LiveBenchmarks(config) if config.heldout.benchmarks else None
