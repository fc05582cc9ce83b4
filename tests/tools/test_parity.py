"""`parity`, with transformers in the place of vLLM: three sets of log-probs, of one model in memory after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from transformers import AutoModelForCausalLM

from spell_megatron.policy import learner
from spell_megatron.tools import parity
from spell_megatron.types import Rollout

pytestmark = pytest.mark.unit


class Engine:
    """Greedy completions by transformers; their log-probs are `off` nats too high."""

    off = 0.0

    def __init__(self, folder: Path, *_: Any, **__: Any) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    async def generate(
        self, prompt: Sequence[int], *, seeds: Sequence[int], max_tokens: int, **_: Any
    ) -> list[Rollout]:
        ids, logprobs = list(prompt), list[float]()
        for _ in range(max_tokens):
            best = self._model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
            ids.append(int(best.indices))
            logprobs.append(float(best.values) + self.off)
        return [Rollout(list(prompt), ids[len(prompt) :], logprobs, "length", 0) for _ in seeds]

    def close(self) -> None:
        pass


def test_three_agree_without_anything_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("what trains a policy was made")

    for name in ("wrap_data_parallel", "build_optimizer"):
        monkeypatch.setattr(learner, name, fail)
    monkeypatch.setattr(parity, "InProcessEngine", Engine)
    found = parity.compare(make_model("qwen3", tmp_path), 8)
    found.check()
    assert found.tokens == 4 * 8
    assert set(found.max) == {"HF–Megatron", "HF–vLLM", "Megatron–vLLM"}
    assert 0 < found.max["HF–Megatron"] < 1e-4
    monkeypatch.setattr(Engine, "off", 0.1)
    assert parity.compare(tmp_path, 2).max["HF–vLLM"] == pytest.approx(0.1, rel=1e-3)
