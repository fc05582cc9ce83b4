"""Transformer layers of plain torch, whose parameters are named as Transformer Engine names them.

So one name table and one checkpoint format serve both layer specs. They run on CPU/gloo and on
CUDA/NCCL. megatron-core's own "local" layers would not do: they forbid context parallelism and packed
streams, materialise the S x S scores, and their norm forbids sequence parallelism
(transformer/dot_product_attention.py:60, transformer/torch_norm.py:32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from megatron_patches.cpu_products import product_into, product_over
from spell_megatron.policy.norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm whose gradient is summed over the TP ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = _norm_weight(config, hidden_size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def _norm_weight(config: TransformerConfig, size: int) -> nn.Parameter:
    weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=torch.cuda.current_device()))
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class NormColumnParallelLinear(ColumnParallelLinear):
    """Norm and column-parallel linear in one module, as Transformer Engine has it."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = _norm_weight(config, input_size)
        self.eps = config.layernorm_epsilon

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`[tokens, batch, hidden]` to `[tokens * tp if sequence parallel, batch, out / tp]`."""
        normed = rms_norm(x, self.layer_norm_weight, self.eps)
        found: tuple[Tensor, Tensor | None] = super().forward(normed, *args, **kwargs)
        return found


class _PerExpert(torch.autograd.Function):
    """`x [tokens, in]`, sorted by expert, times each expert's `[out, in]`, straight into one result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for into, rows, weight in zip(out.split(counts), x.split(counts), weights, strict=True):
            product_into(into, rows, weight.t())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dx, parts = torch.empty_like(x), grad.split(ctx.counts)
        for into, part, weight in zip(dx.split(ctx.counts), parts, weights, strict=True):
            product_into(into, part, weight)
        return (
            dx,
            None,
            *(product_over(part.t(), rows) for part, rows in zip(parts, x.split(ctx.counts), strict=True)),
        )


class _GroupedLinear(nn.Module):
    """One matrix per local expert, `weight0 … weightN`, over tokens sorted by expert.

    `partition_dim` is the dimension that expert tensor parallelism splits. The forward is a loop over
    experts; on CUDA the Transformer Engine spec replaces it by one grouped kernel.
    """

    partition_dim: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], None],
        pg_collection: Any,
        **_: Any,
    ) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        shape = [output_size, input_size]
        shape[self.partition_dim] //= self.tp_group.size()
        for index in range(num_gemms):
            weight = nn.Parameter(
                torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            if config.perform_initialization:
                init_method(weight)
            weight.allreduce = False  # type: ignore[attr-defined]
            setattr(self, f"weight{index}", weight)

    def forward(self, x: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        """`[tokens, in]`, sorted by expert, to `[tokens, out]`."""
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        return _PerExpert.apply(x, tokens_per_expert, *weights), None  # type: ignore[no-untyped-call]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every expert is a slice of one global tensor, so that checkpoints reshard over EP."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        total, first = self.ep_group.size() * self.num_gemms, self.ep_group.rank() * self.num_gemms
        shards: dict[str, Any] = {}
        for index in range(self.num_gemms):
            expert = (len(sharded_offsets), first + index, total)
            local = make_sharded_tensors_for_checkpoint(
                {f"{index}.weight": getattr(self, f"weight{index}")},
                "",
                {f"{index}.weight": self.partition_dim},
                (*sharded_offsets, expert),
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(local, f"{index}.", prefix)
            for shard in local.values():
                shard.replica_id = (*shard.replica_id[:2], mpu.get_expert_data_parallel_rank())
            shards[f"{prefix}weight{index}"] = local[f"{index}.weight"]
        return shards


class ColumnGroupedLinear(_GroupedLinear):
    partition_dim = 0


class RowGroupedLinear(_GroupedLinear):
    partition_dim = 1


def torch_block_spec(
    config: TransformerConfig, core_attention: ModuleSpec, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The decoder block of this rank and pipeline chunk, made of the layers above and of what attends."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=NormColumnParallelLinear,
            core_attention=core_attention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    if config.num_moe_experts is None:
        mlp = ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=NormColumnParallelLinear, linear_fc2=RowParallelLinear),
        )
        pre_mlp_norm: Any = IdentityOp
    else:
        experts = ModuleSpec(
            module=TEGroupedMLP,
            submodules=MLPSubmodules(linear_fc1=ColumnGroupedLinear, linear_fc2=RowGroupedLinear),
        )
        mlp = ModuleSpec(
            module=MoELayer,
            submodules=MoESubmodules(experts=experts),
            metainfo={"fuse_pre_mlp_layernorm": False},
        )
        pre_mlp_norm = RMSNorm
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=pre_mlp_norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )
