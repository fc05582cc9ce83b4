"""Every correction of megatron-core is needed by the installed version, explained, and applied once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest
import torch

import megatron_patches
from megatron_patches import cpu_products, deepep_multihot, eager_rotation, eager_swiglu
from megatron_patches.versions import TESTED, installed

pytestmark = pytest.mark.unit

CORE = Path(megatron.core.__path__[0])


@pytest.mark.parametrize("patch", megatron_patches.PATCHES, ids=lambda patch: patch.name)
def test_a_patch_says_what_breaks_and_where(patch: megatron_patches.Patch) -> None:
    assert patch.breaks
    named = [
        part.split(":")[0].strip() for part in patch.upstream.replace(";", " ").replace(",", " ").split()
    ]
    if patch.versions[0] != installed():
        return  # the place is named in another version
    files = [CORE / name.removeprefix("megatron/core/") for name in named if name.endswith(".py")]
    assert all(path.is_file() for path in files), patch.upstream
    assert patch.scope in ("cpu", "any")


def test_every_patch_is_still_needed() -> None:
    """What upstream has mended can go: this names the file to delete."""
    applied = set(megatron_patches.apply())
    expected = {
        patch.name
        for patch in megatron_patches.PATCHES
        if installed() in patch.versions
        and (patch.scope == "any" or not torch.cuda.is_available())
        and patch.layers in ("any", "te" if megatron_patches.has_transformer_engine() else "torch")
    }
    assert applied == expected


def test_the_installed_version_is_a_tested_one() -> None:
    assert installed() in TESTED


def test_each_patch_has_a_file_of_its_own() -> None:
    files = {path.stem for path in Path(megatron_patches.__file__).parent.glob("*.py")}
    assert files - {"__init__", "patch", "versions"} == {patch.name for patch in megatron_patches.PATCHES}


def unpatched(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy of one of megatron-core's modules, as it comes."""
    spec = importlib.util.spec_from_file_location("unpatched", CORE / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_swiglu_in_blocks_is_no_further_from_the_truth_than_upstreams(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = unpatched("fusions/fused_bias_swiglu.py", monkeypatch)
    monkeypatch.setattr(eager_swiglu, "_BLOCK", 1 << 14)
    draw = torch.Generator().manual_seed(0)
    y, g = (torch.randn(tokens, width, generator=draw).to(dtype) for width in (2 * 320, 320))
    weights = torch.rand(tokens, 1, generator=draw)
    assert torch.equal(eager_swiglu.swiglu(y), upstream.swiglu(y))

    exact, factors = y.double().requires_grad_(), weights.double().requires_grad_()
    whole = torch.nn.functional.silu(exact[:, :320]) * exact[:, 320:]
    [plain] = torch.autograd.grad(whole, exact, g.double(), retain_graph=True)
    weighted = torch.autograd.grad(whole * factors, (exact, factors), g.double())
    for true, results in (
        ((plain,), [(m.swiglu_back(g, y),) for m in (eager_swiglu, upstream)]),
        (weighted, [m.weighted_swiglu_back(g, y, weights) for m in (eager_swiglu, upstream)]),
    ):
        for truth, ours, theirs in zip(true, *results, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - truth).norm() <= 1.1 * (theirs - truth).norm() + 1e-7 * truth.norm()


@pytest.mark.parametrize("heads", [1, 3])
def test_a_rotation_is_no_further_from_the_truth_than_upstreams(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = unpatched("models/common/embeddings/rope_utils.py", monkeypatch)
    draw = torch.Generator().manual_seed(0)
    t, g = (torch.randn(50, 1, heads, 32, generator=draw) for _ in range(2))
    angles = 30 * torch.randn(50, 1, 1, 32, generator=draw)
    results = []
    for rotate, dtype in (
        (upstream._apply_rotary_pos_emb_bshd, torch.float64),
        (eager_rotation.rotated, torch.float32),
        (upstream._apply_rotary_pos_emb_bshd, torch.float32),
    ):
        leaf = t.to(dtype, copy=True).requires_grad_()
        out = rotate(leaf, angles.to(dtype), mscale=1.25)
        results.append((out, *torch.autograd.grad(out, leaf, g.to(dtype))))
    for truth, ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - truth).norm() <= 1.1 * (theirs - truth).norm() + 1e-7 * truth.norm()


@pytest.mark.parametrize(
    ("width", "dtype", "kind"),
    [
        (16, torch.float32, {}),
        (32, torch.float32, {"rotary_interleaved": True}),
        (32, torch.bfloat16, {"rotary_interleaved": False}),
    ],
)
def test_rotations_of_another_kind_are_upstreams(
    width: int, dtype: torch.dtype, kind: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.models.common.embeddings import rope_utils

    megatron_patches.apply()
    upstream = unpatched("models/common/embeddings/rope_utils.py", monkeypatch)
    draw = torch.Generator().manual_seed(0)
    t, angles = (torch.randn(9, 1, n, d, generator=draw) for n, d in ((2, 32), (1, width)))
    ours, theirs = (m._apply_rotary_pos_emb_bshd(t.to(dtype), angles, **kind) for m in (rope_utils, upstream))
    assert torch.equal(ours, theirs)


def test_a_table_of_experts_has_what_their_numbers_say() -> None:
    draw, manager = torch.Generator().manual_seed(0), SimpleNamespace(num_local_experts=5)
    indices = torch.stack([torch.randperm(5, generator=draw)[:3] for _ in range(40)])
    indices[torch.rand(40, 3, generator=draw) < 0.4] = -1
    probs = torch.rand(40, 3, generator=draw).masked_fill(indices < 0, 0.0).requires_grad_()
    routed, weights = deepep_multihot.indices_to_multihot(manager, indices, probs)
    for token in range(40):
        theirs = {int(e): float(p) for e, p in zip(indices[token], probs[token], strict=True) if e >= 0}
        assert routed[token].nonzero().flatten().tolist() == sorted(theirs)
        assert weights[token].tolist() == [theirs.get(expert, 0.0) for expert in range(5)]
    weights.mul(torch.arange(5.0)).sum().backward()
    assert torch.equal(probs.grad, indices.clamp(min=0).float())


@pytest.fixture(params=["", "AVX2", "AVX512"], ids=["as torch does", "oneDNN for rows", "oneDNN"])
def either_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_vectors", lambda: request.param)
    monkeypatch.setattr(cpu_products, "_WORTH_IT", 1)
    monkeypatch.setattr(cpu_products, "_GRAIN", 16)


def apart(ours: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference from the product in float64, in units of the largest entry's scale."""
    exact = a.double() @ b.double()
    scale = (a.abs().double() @ b.abs().double()).max().item() if exact.numel() else 1.0
    assert ours.shape == exact.shape and ours.dtype == a.dtype
    return (ours.double() - exact).abs().max().item() / scale if exact.numel() and scale else 0.0


@pytest.mark.usefixtures("either_library")
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 70])
def test_products_are_products(tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, g = torch.randn(tokens, 24, generator=draw), torch.randn(tokens, 40, generator=draw)
    weight = torch.randn(40, 24, generator=draw)
    assert apart(cpu_products.product(x, weight.t()), x, weight.t()) < 1e-6
    assert apart(cpu_products.product(g, weight), g, weight) < 1e-6
    assert apart(cpu_products.product(x[:, None], weight.t()), x[:, None], weight.t()) < 1e-6
    for a, b in ((g, x), (x, g)):  # the longer side first, and the shorter one
        assert apart(cpu_products.product(a.t(), b), a.t(), b) < 1e-6
        assert apart(cpu_products.product_over(a.t(), b), a.t(), b) < 1e-6
    out = torch.full((tokens + 2, 40), torch.nan)
    cpu_products.product_into(out[1:-1], x, weight.t())
    assert apart(out[1:-1], x, weight.t()) < 1e-6
    assert out[0].isnan().all() and out[-1].isnan().all()
    assert cpu_products.product(x.bfloat16(), weight.t().bfloat16()).dtype == torch.bfloat16


@pytest.mark.usefixtures("either_library")
def test_megatrons_linear_layer_multiplies_by_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    megatron_patches.apply()
    made: list[tuple[int, ...]] = []

    def seen(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made.append((*a.shape, *b.shape))
        return a @ b

    monkeypatch.setattr(cpu_products, "product", seen)
    x, weight = torch.randn(5, 1, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    out = linear_with_grad_accumulation_and_async_allreduce(x, weight, None, False, False, False)
    out.square().sum().backward()
    every = [(5, 1, 3, 3, 2), (5, 1, 2, 2, 3), (2, 5, 5, 3)]
    assert made == (every if cpu_products._vectors() else [])
    expected = torch.autograd.grad((x @ weight.t()).square().sum(), (x, weight))
    torch.testing.assert_close((x.grad, weight.grad), expected)
