"""Transfer inside one process: a bucket is a list of references, and nothing is copied but into place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from spell_megatron.rollout.transfer.receiver import Receiver

NAME = "inproc"


@dataclass
class InprocInit(WeightTransferInitInfo):
    """There is nobody to meet."""


@dataclass
class InprocUpdate(WeightTransferUpdateInfo):
    weights: list[tuple[str, torch.Tensor]]


class InprocReceiver(Receiver[InprocInit, InprocUpdate]):
    init_info_cls = InprocInit
    update_info_cls = InprocUpdate

    def init_transfer_engine(self, init_info: InprocInit) -> None:
        """Nothing to set up."""

    def receive_weights(self, update_info: InprocUpdate) -> None:
        self.load(update_info.weights)


def register() -> None:
    """Make the backend known to vLLM, once in a process."""
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, InprocReceiver)
