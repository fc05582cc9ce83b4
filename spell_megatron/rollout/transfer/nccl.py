"""vLLM's broadcast between GPUs, whose ends meet without a store.

vLLM's own sender has them meet in a TCPStore, whose pickles everybody unloads, on a port that is to be chosen. Here
NCCL's identifier of the group goes to the engines behind their secret: it holds the address of NCCL's own, and a random
number without which NCCL turns a connection away.
"""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo, VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.nccl_common import (
    NCCLWeightTransferInitInfo,
    uid_init_process_group,
    worker_init_payload,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

NAME = "nccl"


@dataclass
class NcclTrainerInit(TrainerInitInfo):
    backend: ClassVar[str] = "nccl-by-identifier"

    world_size: int
    packed_num_buffers: int


class NcclTrainer(NCCLTrainerWeightTransferEngine):
    """The trainer's end, on rank 0 alone. The engines' end is vLLM's `nccl`."""

    init_info_cls = NcclTrainerInit

    @classmethod
    def trainer_init(
        cls, init_info: NcclTrainerInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> NcclTrainer:
        if source is None:
            raise ValueError("the nccl backend sends whole models: it needs a WeightSource")
        bucket = {
            "packed": True,
            "packed_buffer_size_bytes": DEFAULT_PACKED_BUFFER_SIZE_BYTES,
            "packed_num_buffers": init_info.packed_num_buffers,
        }
        trainer, made, size = cls(client=client, source=source, **bucket), identifier(), init_info.world_size
        text = base64.b64encode(made).decode()
        worker = NCCLWeightTransferInitInfo(rank_offset=1, world_size=size, nccl_unique_id_b64=text, **bucket)
        with ThreadPoolExecutor(1) as pool:  # both ends wait for each other
            joined = pool.submit(client.init_weight_transfer_engine, worker_init_payload(worker))
            device = torch.accelerator.current_device_index()
            trainer.model_update_group = uid_init_process_group(made, 0, size, device)
            joined.result()
        return trainer


def identifier() -> bytes:
    """A new group's, by NCCL."""
    return bytes(NCCLLibrary().ncclGetUniqueId())


def register() -> None:
    """Make the sender known to vLLM, once in a process."""
    if NcclTrainerInit.backend not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(NcclTrainerInit.backend, NcclTrainer)
