"""The pieces of the policy's arithmetic against float64 formulae, on one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from flash_standin import flash_kernel
from torch import Tensor

from spell_megatron.config import LayoutConfig, LossConfig, PolicyConfig
from spell_megatron.policy import attention
from spell_megatron.policy.head import Sampled, token_logprobs
from spell_megatron.policy.kernels import Kernels, cpu, plain, varlen
from spell_megatron.policy.layout import LayoutError, check_layout, check_policy
from spell_megatron.policy.loss import TokenTerms, token_losses
from spell_megatron.policy.mismatch import mismatch
from spell_megatron.policy.model import uses_transformer_engine
from spell_megatron.policy.norm import rms_norm
from spell_megatron.policy.scores import Scores
from spell_megatron.policy.spans import Pieces, SpanPlan, plan_spans
from spell_megatron.policy.world import World
from spell_megatron.types import Group, Sample, SpellError, TrainBatch
from spell_megatron.weights.families import FAMILIES
from spell_megatron.weights.shape import ModelShape

pytestmark = pytest.mark.unit

Groups = list[tuple[list[int], list[list[int]]]]

# ---- span attention


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`[t, heads, d]` with repeated key-value heads, every score in float64."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


BACKENDS = {
    "cpu": (cpu, False),
    "cpu where products are slow": (cpu, True),
    "plain": (plain, False),
    "varlen": (varlen, False),
}


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Every backend, those of CUDA too: `varlen` with a stand-in for the kernel that it calls."""
    kernels, slow = request.param
    monkeypatch.setattr(attention, "kernels_for", lambda _: kernels)
    monkeypatch.setattr(cpu, "_products_are_slow", lambda: slow)
    monkeypatch.setattr(plain, "_BLOCK", 24)
    with flash_kernel():
        yield kernels


GROUPS = {
    "prompts and responses": [
        ([1] * 40, [[1] * 7, [2] * 1, [3] * 20]),
        ([5] * 9, [[6] * 4]),
        ([7] * 30, [[8] * 3] * 2),
    ],
    "long enough for halves": [([1] * 901, [[1] * 7, [2] * 30])],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_merged_pieces_equal_masked_attention_with_gradients(
    backend: Kernels, groups: Groups, dtype: torch.dtype
) -> None:
    plan = plan_spans(groups)
    tokens = plan.ids.shape[1]
    q, grad, kv = attention_inputs(tokens, tokens, dtype)
    ours_q, ours_kv = q.clone().requires_grad_(), kv.clone().requires_grad_()
    out = attention.attend(ours_q, ours_kv, plan, None, 0.17)
    out.backward(grad)
    true_q, true_kv = q.double().requires_grad_(), kv.double().requires_grad_()
    true = naive_attention(true_q, true_kv[:, 0], true_kv[:, 1], mask_of(plan, tokens), 0.17)
    true.backward(grad.double())

    tolerance = 2e-6 if dtype is torch.float32 else 2e-2
    for ours, theirs in ((out, true), (ours_q.grad, true_q.grad), (ours_kv.grad, true_kv.grad)):
        assert (ours.double() - theirs).norm() / theirs.norm() < tolerance


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_context_parallel_rank_attends_to_the_whole_stream(backend: Kernels, rank: int) -> None:
    """One rank of four by itself, given the keys and values that it would gather."""
    plan = plan_spans(GROUPS["prompts and responses"], cp_size=4, cp_rank=rank)
    keys, queries = plan.ids.shape[1] * 4, plan.ids.shape[1]
    q, grad, kv = attention_inputs(queries, keys, torch.float32)
    true_q, true_kv = q.double().requires_grad_(), kv.double().requires_grad_()
    true = naive_attention(true_q, true_kv[:, 0], true_kv[:, 1], mask_of(plan, keys), 0.17)
    true.backward(grad.double())
    plan.to_stream = plan.from_stream = None  # there is nobody to gather from
    ours_q, ours_kv = q.clone().requires_grad_(), kv.clone().requires_grad_()
    out = attention.attend(ours_q, ours_kv, plan, None, 0.17)
    out.backward(grad)
    for ours, theirs in ((out, true), (ours_q.grad, true_q.grad), (ours_kv.grad, true_kv.grad)):
        assert (ours.double() - theirs).norm() / theirs.norm() < 2e-6


def attention_inputs(queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and the gradient of their output, four heads; two heads of keys and values."""
    draw = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(queries, 4, 32, generator=draw).to(dtype) for _ in range(2))
    return q, grad, torch.randn(keys, 2, 2, 32, generator=draw).to(dtype)


def mask_of(plan: SpanPlan, keys: int) -> Tensor:
    """Which keys of the stream every local query sees."""
    mask = torch.zeros(plan.ids.shape[1], keys, dtype=torch.bool)
    for pieces in plan.pieces:
        for q0, q1, k0, k1 in pieces.ranges:
            block = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            assert not mask[q0:q1, k0:k1].any(), "a key is counted twice"
            mask[q0:q1, k0:k1] = block.tril() if pieces.causal else block
    return mask


def test_backward_of_a_piece_takes_the_merged_softmax(backend: Kernels) -> None:
    """Half of the keys with the log-sum-exp of all of them: gradients of that half, exactly."""
    draw = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(8, 2, 32, generator=draw) for _ in range(4))
    whole_k, whole_v = (x.double().requires_grad_() for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), whole_k) * 0.2
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), whole_v)
    out.backward(grad.double())
    lse, half = scores.logsumexp(-1).float(), Pieces(False, ((0, 8, 0, 4),))
    _, keys, _, dk, dv = next(iter(backend.backward(grad, q, k, v, out.float(), lse, half, 0.2)))
    assert keys == slice(0, 4)
    torch.testing.assert_close(dk.double(), whole_k.grad[:4], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dv.double(), whole_v.grad[:4], rtol=1e-4, atol=1e-6)


# ---- norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 1, 64), (5, 1, 3, 32), (0, 1, 8)], ids=str)
def test_norm_equals_its_formula_with_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], generator=draw).to(dtype)
    results = []
    for double in (False, True):
        inputs = [(t.double() if double else t.clone()).requires_grad_() for t in (x, weight)]
        if double:
            out = inputs[0] * (inputs[0].square().mean(-1, keepdim=True) + 1e-3).rsqrt() * inputs[1]
        else:
            out = rms_norm(*inputs, 1e-3)
            assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))))
    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
    for ours, true in zip(*results, strict=True):
        assert (ours.double() - true).norm() <= tolerance * true.norm()


# ---- head


def true_log_p(hidden: Tensor, weight: Tensor, sampled: Sampled) -> Tensor:
    """By sorting, as samplers do it: the smallest set of best tokens that holds `top_p` of the mass."""
    logits = hidden @ weight.t() / sampled.temperature
    ranked, order = logits.softmax(-1).sort(-1, descending=True)
    outside = (ranked.cumsum(-1) - ranked >= sampled.top_p) & (sampled.top_p < 1)
    logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits.log_softmax(-1)


def true_head(hidden: Tensor, weight: Tensor, targets: Tensor, sampled: Sampled) -> tuple[Tensor, Tensor]:
    log_p = true_log_p(hidden, weight, sampled)
    finite = log_p.masked_fill(log_p.isinf(), 0.0)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * finite).sum(-1)


@pytest.mark.parametrize(
    "sampled", [Sampled(), Sampled(0.7, 1.0), Sampled(0.7, 0.95), Sampled(1.3, 0.5)], ids=str
)
@pytest.mark.parametrize("chunk", [3, 64])
def test_head_equals_the_sampled_distribution(world: World, sampled: Sampled, chunk: int) -> None:
    draw = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(20, 16, generator=draw), torch.randn(97, 16, generator=draw)
    probabilities = true_log_p(hidden.double(), weight.double(), sampled).exp()
    targets = torch.multinomial(probabilities, 1, generator=draw)[:, 0]
    group = dist.group.WORLD
    d_logprobs, d_entropy = torch.randn(20, generator=draw), torch.randn(20, generator=draw)
    results = []
    for double in (False, True):
        h, w = ((x.double() if double else x.clone()).requires_grad_() for x in (hidden, weight))
        if double:
            logprobs, entropy = true_head(h, w, targets, sampled)
        else:
            logprobs, entropy = token_logprobs(h, w, targets, sampled=sampled, chunk=chunk, tp_group=group)
        (logprobs * d_logprobs + entropy * d_entropy).sum().backward()
        results.append((logprobs, entropy, h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-5


def test_a_sampled_token_outside_the_learners_nucleus_keeps_a_finite_logprob(world: World) -> None:
    hidden, weight = torch.ones(1, 1), torch.tensor([[9.0], [0.0], [-1.0]])
    logprobs, _ = token_logprobs(
        hidden, weight, torch.tensor([2]), sampled=Sampled(1.0, 0.5), chunk=8, tp_group=dist.group.WORLD
    )
    assert logprobs.isfinite().all()


def test_head_of_no_rows(world: World) -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    logprobs, entropy = token_logprobs(
        hidden, torch.ones(5, 4), torch.zeros(0, dtype=torch.long), sampled=Sampled(), chunk=8,
        tp_group=dist.group.WORLD,
    )  # fmt: skip
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)


# ---- loss


def terms(**values: list[float]) -> TokenTerms:
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    zero = torch.zeros_like(tensors["weights"])
    return TokenTerms(**{"entropy": zero, "logprobs": zero, "old": zero, **tensors})


def test_on_policy_loss_is_minus_the_weight() -> None:
    losses, clipped = token_losses(terms(weights=[1.0, -2.0]), LossConfig())
    assert losses.tolist() == [-1.0, 2.0]
    assert not clipped.any()


def test_clipping_binds_where_it_would_reward_too_large_a_step() -> None:
    ratio = [1.5, 1.5, 0.5, 0.5]
    values = terms(
        logprobs=[math.log(r) for r in ratio], weights=[1.0, -1.0, 1.0, -1.0]
    )  # positive and negative advantage on either side
    losses, clipped = token_losses(values, LossConfig(clip_low=0.2, clip_high=0.3))
    np.testing.assert_allclose(losses, [-1.3, 1.5, -0.5, 0.8], rtol=1e-6)
    assert clipped.tolist() == [True, False, False, True]


def test_importance_weights_are_truncated() -> None:
    loss = LossConfig(importance_cap=2.0)
    losses, _ = token_losses(terms(weights=[1.0, 1.0], engine=[-math.log(5), math.log(4)]), loss)
    np.testing.assert_allclose(losses, [-2.0, -0.25], rtol=1e-6)


def test_k3_penalty_and_entropy_bonus() -> None:
    values = terms(weights=[0.0], logprobs=[-1.0], old=[-1.0], reference=[-1.5], entropy=[0.7])
    losses, _ = token_losses(values, LossConfig(kl=0.1, entropy=0.01))
    np.testing.assert_allclose(losses, [0.1 * (math.exp(-0.5) + 0.5 - 1) - 0.007], rtol=1e-5)


def test_sequence_ratio_has_the_sequences_value_and_every_tokens_gradient() -> None:
    logprobs = torch.tensor([0.1, -0.3], requires_grad=True)
    ratio = math.exp(-0.1)
    values = TokenTerms(
        logprobs=logprobs, entropy=torch.zeros(2), weights=torch.ones(2), old=torch.zeros(2),
        sequence_log_ratio=torch.full((2,), -0.1),
    )  # fmt: skip
    losses, _ = token_losses(values, LossConfig(ratio="sequence"))
    losses.sum().backward()
    np.testing.assert_allclose(losses.detach(), [-ratio, -ratio], rtol=1e-6)
    np.testing.assert_allclose(logprobs.grad, [-ratio, -ratio], rtol=1e-6)


# ---- layouts


def shape(**over: int) -> ModelShape:
    sizes = {"vocab": 256, "hidden": 64, "layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 96}
    family = "qwen3_moe" if over.get("experts") else "qwen3"
    return ModelShape(
        family=FAMILIES[family], tied=False, norm_eps=1e-6, max_positions=4096, **{**sizes, **over}
    )  # type: ignore[arg-type]


MOE = {"experts": 8, "experts_per_token": 2, "expert_ffn": 48}


@pytest.mark.parametrize(
    ("layout", "model", "size", "reason"),
    [
        (LayoutConfig(tensor=3), {}, 3, "8 attention heads do not divide by tensor=3"),
        (LayoutConfig(tensor=2), {}, 3, "world size 3 is no multiple"),
        (LayoutConfig(tensor=8), {"kv_heads": 3}, 8, "one must be a multiple of the other"),
        (LayoutConfig(tensor=2), {"vocab": 255}, 2, "vocabulary of 255"),
        (LayoutConfig(pipeline=3), {}, 3, "4 layers do not divide by pipeline=3"),
        (LayoutConfig(pipeline=2, virtual_pipeline=4), {}, 2, "chunks=4"),
        (LayoutConfig(virtual_pipeline=2), {}, 1, "virtual_pipeline needs pipeline > 1"),
        (LayoutConfig(expert=3), MOE, 3, "8 experts do not divide by expert=3"),
        (LayoutConfig(expert=2), {}, 2, "has no experts"),
        (LayoutConfig(tensor=2), MOE, 2, "need sequence=true"),
        (LayoutConfig(tensor=2, sequence=True, expert_tensor=5), MOE, 10, "expert width 48 does not divide"),
    ],
)
def test_an_illegal_layout_says_why(
    layout: LayoutConfig, model: dict[str, int], size: int, reason: str
) -> None:
    with pytest.raises(LayoutError) as error:
        check_layout(layout, shape(**model), size)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"freeze_router": True}, "policy.freeze_router=true would do nothing, since Qwen3"),
        ({"router_replay": True}, "policy.router_replay=true would"),
        ({"dispatcher": "deepep"}, "policy.dispatcher=deepep would"),
        (
            {"dispatcher": "hybridep", "freeze_router": True},
            "freeze_router=true and policy.dispatcher=hybridep",
        ),
    ],
)
def test_what_is_asked_of_experts_is_refused_for_a_dense_model(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        check_policy(PolicyConfig(**asked), shape(), 1)
    assert check_policy(PolicyConfig(**asked), shape(**MOE), 1).data == 1
    for harmless in ("auto", "alltoall"):
        assert check_policy(PolicyConfig(dispatcher=harmless), shape(), 2).data == 2  # type: ignore[arg-type]


def test_a_legal_layout_divides_the_world() -> None:
    world = check_layout(
        LayoutConfig(tensor=2, pipeline=2, context=2, expert=4, sequence=True), shape(**MOE), 32
    )
    assert (world.model, world.data, world.expert_data) == (8, 4, 4)


# ---- layers


@pytest.mark.parametrize("setting", [{"spec": "te"}, {"fp8": "blockwise"}], ids=str)
def test_what_needs_transformer_engine_says_so_where_there_is_none(setting: dict[str, str]) -> None:
    with pytest.raises(SpellError, match=r"policy\.(spec=te|fp8=blockwise) needs Transformer Engine"):
        uses_transformer_engine(PolicyConfig(**setting))  # type: ignore[arg-type]
    assert not uses_transformer_engine(PolicyConfig())


# ---- mismatch


def test_mismatch_by_label() -> None:
    batch = TrainBatch(
        (Group([1], (Sample([2, 3], [0, 0], [-1.0, -2.0]),)), Group([1], (Sample([4], [0], [-1.0]),)))
    )
    scores = Scores([[np.array([-1.5, -2.0])], [np.array([-0.7])]], [])
    gaps = mismatch(batch, scores, ["a", "b"], 0)
    expected = [-0.5, 0.0, 0.3]
    assert gaps["mismatch/mean"] == pytest.approx(np.abs(expected).mean())
    assert gaps["mismatch/max"] == pytest.approx(0.5)
    assert gaps["mismatch/k3"] == pytest.approx(np.mean([math.exp(g) - 1 - g for g in expected]))
    assert (gaps["mismatch/a"], gaps["mismatch/b"]) == (pytest.approx(0.25), pytest.approx(0.3))
