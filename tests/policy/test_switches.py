"""Which kernels and precisions a GPU gets, decided from what is installed there; no GPU is asked."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import megatron_patches
from megatron_patches.patch import Patch
from spell_megatron.config import FusionsConfig, LayoutConfig, PolicyConfig
from spell_megatron.policy import model
from spell_megatron.policy.kernels import flash
from spell_megatron.policy.layout import dispatcher
from spell_megatron.policy.spans import plan_spans
from spell_megatron.policy.world import be_deterministic
from spell_megatron.types import SpellError
from spell_megatron.weights.shape import model_shape

pytestmark = pytest.mark.unit


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that is asked for its kind only; what was activated on it."""
    active: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    return active


def install(monkeypatch: pytest.MonkeyPatch, *operators: str) -> None:
    """FlashAttention 3 with these of its operators."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace())
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(**dict.fromkeys(operators)), raising=False)


def test_attention_is_version_3s_where_its_backward_pass_is_there(
    hopper: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flash.choose("auto") == "FlashAttention 2"
    install(monkeypatch, "fwd")
    assert flash.choose("auto") == "FlashAttention 2"
    with pytest.raises(SpellError, match="no backward"):
        flash.choose("fa3")
    install(monkeypatch, "fwd", "bwd")
    assert flash.choose("fa2") == "FlashAttention 2"
    assert not hopper
    assert flash.choose("auto") == "FlashAttention 3"
    assert hopper == ["FA3"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert flash.choose("auto") == "FlashAttention 2"


@pytest.mark.usefixtures("hopper")
def test_a_precision_of_blackwell_is_refused_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "HAVE_TE", True)
    assert model.uses_transformer_engine(PolicyConfig(fp8="blockwise"))
    with pytest.raises(SpellError, match="blockwise"):
        model.uses_transformer_engine(PolicyConfig(fp8="mxfp8"))


@pytest.mark.usefixtures("hopper")
def test_float32_is_left_to_torch_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's products of float32 are made in TF32."""
    monkeypatch.setattr(model, "HAVE_TE", True)
    assert model.uses_transformer_engine(PolicyConfig())
    assert not model.uses_transformer_engine(PolicyConfig(dtype="float32"))
    assert model.uses_transformer_engine(PolicyConfig(dtype="float32", spec="te"))


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["delayed", "tensorwise", "blockwise"]),
    st.lists(st.integers(1, 300), min_size=1, max_size=9),
)
def test_every_tensor_parallel_rank_has_whole_blocks_of_fp8(
    tp: int, cp: int, fp8: Any, lengths: list[int]
) -> None:
    policy = PolicyConfig(fp8=fp8, layout=LayoutConfig(tensor=tp, sequence=tp > 1, context=cp))
    prompt, *replies = lengths
    groups = [(range(prompt), [range(reply) for reply in replies])]
    tokens = plan_spans(groups, cp_size=cp, multiple=model.token_grain(policy)).ids.shape[1]
    assert tokens % tp == 0 and tokens // tp % 16 == 0


@pytest.mark.parametrize("there", [True, False])
def test_fused_kernels_are_transformer_engines(
    there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from models import make_model

    shape = model_shape(make_model("moe", tmp_path))
    monkeypatch.setattr(model, "uses_transformer_engine", lambda _: there)
    monkeypatch.setattr(model, "TransformerConfig", SimpleNamespace)
    spread = LayoutConfig(expert=2)
    with pytest.raises(SpellError, match="not installed"):
        model.transformer_config(PolicyConfig(dispatcher="deepep", layout=spread), shape)
    monkeypatch.setattr(model.fused_a2a, "HAVE_DEEP_EP", True)
    with pytest.raises(SpellError, match="there are none"):
        model.transformer_config(PolicyConfig(dispatcher="deepep", layout=LayoutConfig(tensor=2)), shape)
    made = model.transformer_config(PolicyConfig(layout=spread), shape)
    assert made.moe_token_dispatcher_type == "alltoall", "there is no GPU"
    for on in (True, False):
        fusions = FusionsConfig(permute=on, rope=on, weight_gradients=on)
        policy = PolicyConfig(fusions=fusions, dispatcher="deepep", layout=spread)
        made = model.transformer_config(policy, shape)
        keys = ("moe_permute_fusion", "apply_rope_fusion", "gradient_accumulation_fusion")
        assert [getattr(made, key) for key in keys] == [on and there] * 3
        assert (made.moe_token_dispatcher_type, made.moe_flex_dispatcher_backend) == ("flex", "deepep")


@pytest.mark.parametrize(
    ("layout", "others", "chosen"),
    [
        ({"expert": 8}, {}, "deepep"),
        ({"expert": 4, "expert_tensor": 2, "tensor": 2, "sequence": True}, {}, "deepep"),
        ({"expert": 8, "expert_tensor": 2}, {}, "alltoall"),  # two nodes
        ({"expert": 6}, {}, "alltoall"),  # of which DeepEP has no kernels
        ({"expert": 1}, {}, "alltoall"),
        ({"expert": 8}, {"dtype": "float32"}, "alltoall"),
        ({"expert": 8}, {"deterministic": True}, "alltoall"),
        ({"expert": 16}, {"dispatcher": "deepep"}, "deepep"),
        ({"expert": 8}, {"dispatcher": "alltoall"}, "alltoall"),
    ],
)
def test_deepep_sends_where_its_kernels_can(
    layout: dict[str, Any], others: dict[str, Any], chosen: str
) -> None:
    policy = PolicyConfig(layout=LayoutConfig(**layout), **others)
    assert dispatcher(policy, 8, deepep=True) == chosen
    if "dispatcher" not in others:
        assert dispatcher(policy, 8, deepep=False) == "alltoall"
        assert dispatcher(policy, 3, deepep=True) == "alltoall", "experts of a layer on two nodes"


def test_bit_equal_results_want_an_environment_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    be_deterministic(torch.device("cpu"))
    for key in ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NCCL_ALGO"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(SpellError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 NVTE"):
        be_deterministic(torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("there", "said"), [(True, "with"), (False, "without")])
def test_what_transformer_engine_does_itself_is_not_said_to_be_mended(
    there: bool, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other: Any = "torch" if there else "te"
    patch = Patch("p", "any", "u", "b", needed=lambda: False, apply=lambda: None, layers=other)
    monkeypatch.setattr(megatron_patches, "PATCHES", (patch,))
    monkeypatch.setattr(megatron_patches, "has_transformer_engine", lambda: there)
    with caplog.at_level(logging.DEBUG):
        assert megatron_patches.apply.__wrapped__() == ()
    assert caplog.messages == [f"patch p is not needed {said} Transformer Engine"]
