"""Do Hugging Face, Megatron and vLLM compute the same log-probs from one model folder?

vLLM samples; the other two score the same tokens. It is the first thing to ask of a new model, and the
first when a run's mismatch grows.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from spell_megatron.config import Dtype, LayoutConfig, PolicyConfig, RolloutConfig
from spell_megatron.policy.learner import HeldPolicy
from spell_megatron.policy.world import World, start_world, stop_world
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.types import Group, Sample, SpellError, TrainBatch
from spell_megatron.weights.contents import read_contents
from spell_megatron.weights.known import known_folder

_SEQUENCES = 4
_BOUNDS: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest difference that numerics explain, in nats."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Differences of token log-probs, by pair of implementations."""

    model: str
    dtype: str
    tokens: int
    mean: dict[str, float]
    max: dict[str, float]
    bound: float

    def table(self) -> Table:
        table = Table(
            "pair",
            "mean |Δ logprob|",
            "max |Δ logprob|",
            title=f"{self.model}, {self.dtype}, {self.tokens} tokens",
        )
        for pair in self.mean:
            table.add_row(pair, f"{self.mean[pair]:.2e}", f"{self.max[pair]:.2e}")
        return table

    def check(self) -> None:
        """Raise SpellError where a pair differs by more than numerics explain."""
        bad = [pair for pair, gap in self.max.items() if not gap <= self.bound]
        if bad:
            raise SpellError(
                f"{self.model}: {', '.join(bad)} differ beyond {self.bound} nats: do not train this model"
                " before the cause is known (rope scaling, tied weights, a stale conversion are the usual ones)"
            )


def compare(folder: Path, tokens: int, families: Sequence[str] = ()) -> Parity:
    """Sample `tokens` tokens after each of a few random prompts, and score them three times."""
    dtype: Dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    shape = read_contents(folder, families).shape
    draw = random.Random(0)
    prompts = [[draw.randrange(shape.vocab) for _ in range(32)] for _ in range(_SEQUENCES)]
    world = start_world(LayoutConfig(), seed=0, timeout_seconds=600)
    try:
        with tempfile.TemporaryDirectory(prefix="spell-parity-") as scratch:
            settings = RolloutConfig(
                dtype=dtype,
                max_model_len=min(shape.max_positions, 32 + tokens),
                kv_cache_mib=256,
                eager=not torch.cuda.is_available(),  # on a CPU compiling takes longer than these few tokens
            )
            known = known_folder(folder, Path(scratch) / "model", families)
            engine = InProcessEngine(known, settings, scratch=Path(scratch), stop=())

            async def sample() -> TrainBatch:
                rollouts = await asyncio.gather(
                    *(
                        engine.generate(prompt, seeds=[i], max_tokens=tokens, temperature=1.0, top_p=1.0)
                        for i, prompt in enumerate(prompts)
                    )
                )
                return TrainBatch(
                    tuple(
                        Group(r.prompt, (Sample(r.tokens, [0.0] * len(r.tokens), r.logprobs),))
                        for [r] in rollouts
                    )
                )

            batch = asyncio.run(sample())
            engine.close()
            scores = {  # one after another: neither model has to fit beside the other
                "HF": _hf_logprobs(known, batch, dtype),
                "Megatron": _megatron_logprobs(folder, batch, dtype, world, families),
                "vLLM": np.concatenate([np.asarray(s.logprobs) for g in batch.groups for s in g.samples]),
            }
    finally:
        stop_world()
    gaps = {f"{a}–{b}": np.abs(scores[a].astype(np.float64) - scores[b]) for a, b in combinations(scores, 2)}
    return Parity(
        model=str(folder),
        dtype=dtype,
        tokens=batch.response_tokens,
        mean={pair: float(gap.mean()) for pair, gap in gaps.items()},
        max={pair: float(gap.max()) for pair, gap in gaps.items()},
        bound=_BOUNDS[dtype],
    )


def _megatron_logprobs(
    folder: Path, batch: TrainBatch, dtype: Dtype, world: World, families: Sequence[str]
) -> np.ndarray:
    policy = HeldPolicy(PolicyConfig(dtype=dtype), folder, world, families=families)
    return np.concatenate([sample for group in policy.score(batch).logprobs for sample in group])


@torch.no_grad()
def _hf_logprobs(folder: Path, batch: TrainBatch, dtype: str) -> np.ndarray:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=False
    ).to(device)
    parts = []
    for group in batch.groups:
        reply = torch.tensor(list(group.samples[0].tokens), device=device)
        ids = torch.cat((torch.tensor(list(group.prompt), device=device), reply))[None]
        logits = model(ids).logits[0, len(group.prompt) - 1 : -1].float()
        parts.append(torch.log_softmax(logits, -1).gather(-1, reply[:, None])[:, 0].cpu().numpy())
    return np.concatenate(parts)
