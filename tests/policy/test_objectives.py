"""Every objective, over two minibatches and in several layouts, against a plain float64 loop over sequences."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from models import make_model
from objectives import LAYOUTS, OBJECTIVES, OPTIMIZER, batch_with_engine, updated
from places import SUPPORT
from reference import relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM

from spell_megatron.base.interpreter import python
from spell_megatron.config import LayoutConfig, LossConfig
from spell_megatron.policy.world import World
from spell_megatron.types import Group

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4
"""Of float32, after two steps of Adam: weights that are off by 1e-7 at first are off by 2e-5 of the change then."""
PROGRAM = SUPPORT / "objectives.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        "qwen3_tied", tmp_path_factory.mktemp("models") / "model", seed=1, initializer_range=0.1
    )


def log_p_of(model: torch.nn.Module, group: Group, tokens: list[int]) -> Tensor:
    """Of every token of the vocabulary, at every place of a response."""
    ids = torch.tensor([[*group.prompt, *tokens]])
    return model(ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)


@cache
def truth(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after, by the formulae of the papers, one sequence at a time."""
    loss = OBJECTIVES[name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=0.0
    )
    groups = batch_with_engine().groups
    with torch.no_grad():
        start = {
            id(s): log_p_of(model, g, list(s.tokens)).gather(-1, torch.tensor(s.tokens)[:, None])[:, 0]
            for g in groups
            for s in g.samples
        }
    for half in (groups[::2], groups[1::2]):
        total, denominator = torch.zeros((), dtype=torch.float64), 0
        for group in half:
            of_group, tokens = torch.zeros((), dtype=torch.float64), 0
            for sample in group.samples:
                log_p = log_p_of(model, group, list(sample.tokens))
                own = log_p.gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0]
                old, engine = start[id(sample)], torch.tensor(sample.logprobs, dtype=torch.float64)
                weights = torch.tensor(sample.weights, dtype=torch.float64)
                of_group = of_group + objective(loss, own, log_p, old, engine, weights)
                tokens += (
                    loss.max_response_tokens
                    if loss.normalisation == "sequence_length"
                    else len(sample.tokens)
                )
            whole = loss.normalisation == "group_mean"
            total = total + (of_group / tokens if whole else of_group)
            denominator += 1 if whole else tokens
        optimizer.zero_grad()
        (total / denominator).backward()
        optimizer.step()
    return before, {n: p.detach() for n, p in model.named_parameters()}


def objective(
    loss: LossConfig, own: Tensor, log_p: Tensor, old: Tensor, engine: Tensor, weights: Tensor
) -> Tensor:
    """Of one response, summed over its tokens; `old` is the reference model's too, since no step was made."""
    ratio = (own - old).exp()
    if loss.ratio == "sequence":
        ratio = (own - old).mean().exp().detach() * (own - own.detach()).exp()
    surrogate = torch.minimum(ratio * weights, ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high) * weights)
    if loss.importance_cap is not None:
        surrogate = surrogate * (old - engine).exp().clamp(max=loss.importance_cap)
    k3 = (old - own).exp() - (old - own) - 1
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (-surrogate + loss.kl * k3 - loss.entropy * entropy).sum()


def check(folder: Path, layout: str, name: str, clipped: float, after: dict[str, Tensor]) -> None:
    before, expected = truth(folder, name)
    worst = max(relative_error(after[n] - before[n], expected[n] - before[n]) for n in expected)
    assert worst < TOLERANCE, f"{name} in {layout}"
    assert clipped > 0.01, f"{name} in {layout}: nothing was clipped, the test cannot fail"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_process(name: str, folder: Path, world: World) -> None:
    check(folder, "one process", name, *updated(folder, world, LayoutConfig(), OBJECTIVES[name]))


def test_two_ranks_in_every_way(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.pt"
    done = subprocess.run(
        [*python("launchers.ranks", "2"), "-W", "ignore", str(PROGRAM), str(folder), str(out)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    results = torch.load(out, weights_only=True)
    assert len(results) == len(LAYOUTS) * len(OBJECTIVES)
    for (layout, name), (clipped, after) in results.items():
        check(folder, layout, name, clipped, after)
