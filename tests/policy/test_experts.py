"""The router: rounded as an engine's, without an auxiliary loss, frozen on request; and how its load is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import make_model
from reference import random_batch
from transformers import AutoModelForCausalLM

from spell_megatron.config import OptimizerConfig, PolicyConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import World

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("moe", tmp_path_factory.mktemp("model"), seed=1, initializer_range=0.1)


def learner(folder: Path, world: World, **policy: object) -> Learner:
    settings = {"dtype": "float32", "stream_tokens": 192, "optimizer": OptimizerConfig(lr=1e-2), **policy}
    return Learner(PolicyConfig(**settings), folder, world)  # type: ignore[arg-type]


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_router_stays_bit_equal_and_a_free_one_moves(
    frozen: bool, distributed: bool, folder: Path, world: World
) -> None:
    optimizer = OptimizerConfig(lr=1e-2, weight_decay=0.1, distributed=distributed)
    policy = learner(folder, world, freeze_router=frozen, optimizer=optimizer)
    before = {name: tensor.clone() for name, tensor in policy.weights()}
    policy.update(random_batch(256))
    for name, tensor in policy.weights():
        stays = frozen and name.endswith("mlp.gate.weight")
        assert torch.equal(tensor, before[name]) == stays, name


def test_no_auxiliary_loss_and_a_router_in_float32(folder: Path, world: World) -> None:
    policy = learner(folder, world, dtype="bfloat16")
    config = policy.chunks[0].config
    assert config.moe_router_load_balancing_type == "none"
    assert not config.moe_aux_loss_coeff
    router = policy.chunks[0].decoder.layers[0].mlp.router
    seen: list[torch.dtype] = []
    forward = router.routing
    router.routing = lambda logits, **options: (seen.append(logits.dtype), forward(logits, **options))[1]
    policy.score(random_batch(256))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("rounding", ["model", "float32"])
def test_routers_decide_as_a_gate_in_the_models_precision_does(
    rounding: str, world: World, tmp_path: Path
) -> None:
    """As vLLM's and transformers': a product in bfloat16, and the largest logits of that."""
    many = make_model("moe", tmp_path, num_experts=64, num_experts_per_tok=4, initializer_range=0.02)
    policy = learner(many, world, dtype="bfloat16", router_dtype=rounding)
    differing = tokens = 0

    def compare(router: Any, inputs: tuple[torch.Tensor], routed: tuple[torch.Tensor, torch.Tensor]) -> None:
        nonlocal differing, tokens
        probs, chosen = routed
        logits = F.linear(inputs[0].view(-1, 64), router.weight)
        assert logits.dtype == torch.bfloat16 and probs.dtype == torch.float32
        best = logits.float().topk(4).indices.sort(-1).values
        differing += int((chosen.nonzero()[:, 1].view(-1, 4) != best).any(-1).sum())
        tokens += len(chosen)

    for layer in policy.chunks[0].decoder.layers:
        layer.mlp.router.register_forward_hook(compare)
    policy.score(random_batch(256))
    share = differing / tokens
    assert share <= 0.002 if rounding == "model" else share > 0.01


def test_load_is_the_busiest_experts_share_over_the_mean(folder: Path, world: World) -> None:
    batch = random_batch(256, shapes=((30, (20,)), (11, (9,))))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for group in batch.groups:
        ids = torch.tensor([[*group.prompt, *group.samples[0].tokens]])
        for layer, logits in enumerate(model(ids, output_router_logits=True).router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok).indices
            counts[layer] += chosen.flatten().bincount(minlength=model.config.num_experts)
    expected = counts.amax(1) / counts.mean(1)
    assert expected.max() > 1.05, "perfectly even: the test cannot fail"
    update = learner(folder, world).update(batch)
    np.testing.assert_allclose(update.expert_load, expected)
    assert update.router_metrics()["policy/expert_load_max"] == pytest.approx(float(expected.max()))
    again = learner(folder, world, recompute="full").update(batch)
    np.testing.assert_allclose(again.expert_load, expected)


def test_a_dense_model_has_no_load(world: World, tmp_path: Path) -> None:
    update = learner(make_model("qwen3", tmp_path / "dense"), world).update(random_batch(256))
    assert update.expert_load == ()
    assert update.router_metrics() == {}
