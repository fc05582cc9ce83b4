"""Layers that keep what they compute in host memory, or compute it again: the same gradients, bit by bit."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from reference import random_batch
from torch import Tensor, nn

from spell_megatron.config import LayoutConfig, PolicyConfig
from spell_megatron.policy import offload
from spell_megatron.policy.layout import Depth, LayoutError, depth
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.optimizer import main_gradient
from spell_megatron.policy.world import World
from spell_megatron.weights.shape import model_shape

pytestmark = [pytest.mark.unit, pytest.mark.long]

LAYERS = 5


class Layer(nn.Module):
    """Two products and what lies between them, which it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)
        self.between: Any = lambda: None

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        wide = self.up(x).sin()
        self.between = weakref.ref(wide.untyped_storage())
        return x + self.down(wide.cos()), None


def gradients(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    for layer in layers:
        x, _ = layer(x)
    return list(torch.autograd.grad(x.square().sum(), layers.parameters()))


@pytest.mark.parametrize("count", range(1, LAYERS))
def test_what_left_is_gone_and_comes_back_as_it_was(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_LEAST", 32 * 4 * 4)  # one that is between, and no other
    torch.manual_seed(0)
    layers, x = nn.ModuleList(Layer() for _ in range(LAYERS)), torch.randn(4, 8)
    expected = gradients(layers, x)
    offload.keep_on_host(list(layers), count, x.device)
    here = []
    layers[-1].register_forward_hook(lambda *_: here.extend(layer.between() is not None for layer in layers))
    assert all(torch.equal(*pair) for pair in zip(gradients(layers, x), expected, strict=True))
    assert sum(here) == LAYERS - count
    with torch.no_grad():
        layers[0](x)


def test_a_tensor_that_is_kept_twice_is_copied_once_and_weights_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "_LEAST", 0)
    copied: list[Tensor] = []
    original = offload._Kept._copy_out
    monkeypatch.setattr(
        offload._Kept, "_copy_out", lambda self, x: copied.append(x.detach()) or original(self, x)
    )
    layers = nn.ModuleList(Layer() for _ in range(2))
    offload.keep_on_host(list(layers), 1, torch.device("cpu"))
    gradients(layers, torch.randn(4, 8))
    assert sorted(tuple(x.shape) for x in copied) == [(4, 8), (4, 32), (4, 32), (4, 32)]  # x, up, sin, cos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("moe", tmp_path_factory.mktemp("model"), seed=1, num_hidden_layers=4)


def test_gradients_are_the_same_bit_by_bit(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_LEAST", 0)
    batch, expected = random_batch(256), None
    for policy in (
        {},
        {"offload_layers": 3},
        {"recompute": "all_but_attention", "recompute_layers": 1, "offload_layers": 2},
    ):
        learner = Learner(PolicyConfig(dtype="float32", stream_tokens=192, **policy), folder, world)
        learner.gradients(batch)
        found = [main_gradient(parameter).clone() for _, parameter in learner.named_parameters()]
        expected = expected or found
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), policy


def test_every_chunk_has_one_layer_at_least_that_keeps_its_own(folder: Path) -> None:
    shape = model_shape(folder)
    some: dict[str, Any] = {"recompute": "full", "recompute_layers": 2}
    assert depth(PolicyConfig(**some, offload_layers=1), shape) == Depth(2, 1, 1)
    assert depth(PolicyConfig(recompute="full"), shape) == Depth(4, 0, 0)
    assert depth(PolicyConfig(layout=LayoutConfig(pipeline=2)), shape) == Depth(0, 0, 2)
    for layout, more in ((LayoutConfig(), {"offload_layers": 2}), (LayoutConfig(pipeline=4), {})):
        with pytest.raises(LayoutError, match="recompute_layers=2"):
            depth(PolicyConfig(layout=layout, **some, **more), shape)
