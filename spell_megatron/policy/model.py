"""From a Hugging Face config to this rank's part of a Megatron GPTModel that computes over spans."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.moe import fused_a2a
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from spell_megatron.config import PolicyConfig
from spell_megatron.policy.attention import SpanAttention
from spell_megatron.policy.experts import combine_once, round_router_logits
from spell_megatron.policy.head import Sampled, token_logprobs
from spell_megatron.policy.layers import torch_block_spec
from spell_megatron.policy.layout import depth, dispatcher, megatron_sizes
from spell_megatron.policy.offload import keep_on_host
from spell_megatron.policy.spans import SpanPlan
from spell_megatron.types import SpellError
from spell_megatron.weights.known import hugging_face_config
from spell_megatron.weights.names import weights_of
from spell_megatron.weights.shape import ModelShape
from spell_megatron.weights.table import Split

_log = logging.getLogger(__name__)

_FP8_TOKENS = {"off": 1, "delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""What the number of tokens of a product must be a multiple of."""


def token_grain(policy: PolicyConfig) -> int:
    """What a rank's tokens of a stream must be a multiple of: under sequence parallelism each TP rank has its share."""
    return _FP8_TOKENS[policy.fp8] * (policy.layout.tensor if policy.layout.sequence else 1)


class SpanModel(GPTModel):
    """A GPTModel whose positions come from the plan and whose head runs on response tokens only.

    In: the ids and positions of a `SpanPlan` (as `packed_seq_params`). Out, on the last pipeline stage:
    log-probs and entropies of the plan's target tokens, `[n]` each; elsewhere hidden states.
    """

    def __init__(self, *args: Any, rope: Qwen3RotaryEmbedding, head_chunk: int, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.inv_freq = rope.inv_freq
        self.head_chunk = head_chunk
        self.sampled = Sampled()

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        """Rotary angles by position id (upstream counts rows instead: models/gpt/gpt_model.py:361)."""
        hidden, _, *rest = super()._preprocess(input_ids=input_ids, position_ids=position_ids, **kwargs)
        angles = position_ids.view(-1, 1).float() * self.inv_freq.to(position_ids.device)
        return hidden, torch.cat((angles, angles), -1)[:, None, None, :], *rest

    def _postprocess(
        self, hidden_states: Tensor, packed_seq_params: SpanPlan, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not self.post_process:
            return hidden_states
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        if self.config.sequence_parallel:
            # The head's own backward pass sums over the TP ranks, so this gather's must only split.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return token_logprobs(
            hidden_states.squeeze(1).index_select(0, packed_seq_params.rows),
            weight,
            packed_seq_params.targets,
            sampled=self.sampled,
            chunk=self.head_chunk,
            tp_group=self.pg_collection.tp,
        )


def build_chunks(policy: PolicyConfig, shape: ModelShape, folder: Path) -> list[SpanModel]:
    """The pipeline chunks of this rank (one, unless the schedule is interleaved), weights not yet filled."""
    rope = Qwen3RotaryEmbedding(hugging_face_config(folder, shape.family))
    config = transformer_config(policy, shape, rope_scaling=rope.attention_scaling)
    if config.expert_model_parallel_size > 1:
        flex = config.moe_token_dispatcher_type == "flex"
        kernels = config.moe_flex_dispatcher_backend if flex else "all-to-all"
        _log.info("tokens are sent to experts by %s", kernels)
    chunks = []
    for stage in range(policy.layout.virtual_pipeline or 1):
        vp_stage = stage if policy.layout.virtual_pipeline else None
        where = {"ignore_virtual": False, "vp_stage": vp_stage}
        chunks.append(
            SpanModel(
                config,
                block_spec(policy, config, vp_stage),
                shape.vocab,
                shape.max_positions,
                pre_process=mpu.is_pipeline_first_stage(**where),
                post_process=mpu.is_pipeline_last_stage(**where),
                share_embeddings_and_output_weights=shape.tied,
                vp_stage=vp_stage,
                rope=rope,
                head_chunk=policy.head_chunk,
            )
        )
        if policy.router_dtype == "model" and policy.dtype != "float32":
            round_router_logits(chunks[-1], getattr(torch, policy.dtype))
    _mark_split_parameters(chunks, shape)
    if policy.freeze_router:  # before gradient buffers and optimizer are made of what needs gradients
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(not name.endswith("mlp.router.weight"))
    chunks = [cast(SpanModel, chunk.to(torch.cuda.current_device())) for chunk in chunks]
    recomputed = depth(policy, shape).recomputed
    for chunk in chunks:
        if policy.fp8 == "off":  # whose own recomputation may begin at another layer
            combine_once(chunk.decoder.layers[:recomputed])
        if policy.offload_layers:
            others = chunk.decoder.layers[recomputed:]
            keep_on_host(others, policy.offload_layers, next(chunk.parameters()).device)
    return chunks


def _mark_split_parameters(chunks: list[SpanModel], shape: ModelShape) -> None:
    """Say of every parameter that is cut over TP ranks that it is: the gradient norm counts it on each.

    Upstream does so only as a by-product of initialisation (tensor_parallel/layers.py:137), which is skipped.
    """
    for weight in weights_of(chunks, shape.family, shape.tied):
        if weight.split is not Split.REPLICATED:
            weight.parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.parameter.partition_dim = 1 if weight.split is Split.ROW else 0  # type: ignore[attr-defined]
            weight.parameter.partition_stride = 1  # type: ignore[attr-defined]


def transformer_config(
    policy: PolicyConfig, shape: ModelShape, *, rope_scaling: float = 1.0
) -> TransformerConfig:
    """Megatron's config of a Hugging Face model in a layout.

    HF scales both rotated queries and keys by `rope_scaling` (YaRN's attention factor); here its square goes
    into the softmax scale, which is the same product.
    """
    layout, dtype = policy.layout, getattr(torch, policy.dtype)
    te = uses_transformer_engine(policy)
    # The default refuses variable lengths, dense models too.
    moe: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if shape.experts:
        moe |= {
            "num_moe_experts": shape.experts,
            "moe_router_topk": shape.experts_per_token,
            "moe_ffn_hidden_size": shape.expert_ffn,
            "moe_grouped_gemm": True,
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not shape.norm_topk,
            "moe_router_load_balancing_type": "none",  # an auxiliary loss would pull against the reward
            "moe_router_dtype": "fp32",
            "moe_permute_fusion": te and policy.fusions.permute,
        }
        if (kernels := _dispatcher(policy)) != "alltoall":
            moe |= {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": kernels}
    fp8: dict[str, Any] = {}
    if policy.fp8 != "off":
        by_blocks = policy.fp8 in ("blockwise", "mxfp8")  # fine enough for gradients without a wider exponent
        fp8 = {"fp8_recipe": policy.fp8, "fp8": "e4m3" if by_blocks else "hybrid"}
    recompute: dict[str, Any] = {}
    if policy.recompute != "none":  # attention itself knows where it is not to be
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": depth(policy, shape).recomputed,
        }
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        softmax_scale=rope_scaling**2 / math.sqrt(shape.head_dim),
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,  # keeps gate, up and product for backward, not what lies between
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_bias,
        qk_layernorm=shape.family.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=te and policy.fusions.weight_gradients,
        apply_rope_fusion=te and policy.fusions.rope,
        deterministic_mode=te and policy.deterministic,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,  # the weights come from the model folder
        **megatron_sizes(layout),
        sequence_parallel=layout.sequence,
        variable_seq_lengths=layout.pipeline > 1,  # streams differ in length
        batch_p2p_comm=False,
        calculate_per_token_loss=True,  # sums over ranks and microbatches, divided once by the token count
        **moe,
        **fp8,
        **recompute,
    )


def _dispatcher(policy: PolicyConfig) -> str:
    """Raises SpellError where what is asked for is not installed, or has nobody to send to."""
    there = {"alltoall": True, "deepep": fused_a2a.HAVE_DEEP_EP, "hybridep": fused_a2a.HAVE_HYBRIDEP}
    deepep = there["deepep"] and torch.cuda.is_available()
    chosen = dispatcher(policy, torch.cuda.device_count(), deepep=deepep)
    if not there[chosen]:
        raise SpellError(
            f"policy.dispatcher={chosen} needs DeepEP, which is not installed: build it from"
            " github.com/deepseek-ai/DeepEP (its branch hybrid-ep for hybridep), or leave policy.dispatcher=auto"
        )
    if chosen != "alltoall" and policy.layout.expert * policy.layout.expert_tensor == 1:
        raise SpellError(
            f"policy.dispatcher={chosen} sends tokens to other ranks, of which there are none: leave it auto, or give"
            " policy.layout.expert more than 1"
        )
    return chosen


def block_spec(policy: PolicyConfig, config: TransformerConfig, vp_stage: int | None) -> Any:
    """Layers of plain torch, or of Transformer Engine with the same parameter names and our attention."""
    attention = ModuleSpec(SpanAttention, params={"keep_output": policy.recompute == "all_but_attention"})
    if not uses_transformer_engine(policy):
        return torch_block_spec(config, attention, vp_stage)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = attention
    return spec


def uses_transformer_engine(policy: PolicyConfig) -> bool:
    """Whether layers are Transformer Engine's. Raises SpellError where they are asked for and cannot be.

    `auto` leaves float32 to torch: Transformer Engine rounds the factors of its products to TF32.
    """
    there = bool(HAVE_TE) and torch.cuda.is_available()
    if there and policy.fp8 == "mxfp8" and torch.cuda.get_device_capability() < (10, 0):
        raise SpellError(
            f"policy.fp8=mxfp8 is for Blackwell, and this is {torch.cuda.get_device_name()}: set policy.fp8=blockwise"
        )
    if there or (policy.spec != "te" and policy.fp8 == "off"):
        return there and policy.prefers_te
    key = "policy.spec=te" if policy.spec == "te" else f"policy.fp8={policy.fp8}"
    raise SpellError(
        f"{key} needs Transformer Engine and a GPU, and here is {'no GPU' if HAVE_TE else 'no Transformer Engine'}:"
        " pip install --no-build-isolation 'transformer-engine[pytorch]' on a machine with a GPU, or leave"
        " policy.spec=auto and policy.fp8=off, which need neither"
    )
