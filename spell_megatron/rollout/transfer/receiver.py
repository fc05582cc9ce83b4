"""The engine's end of a transfer: full tensors under Hugging Face names, loaded layer by layer.

Runs inside a vLLM worker. vLLM's layer-wise reload collects the tensors of a layer (they may come in
several pieces and be sharded over tensor-parallel workers), processes them as after the first load, and
copies them into the storage that kernels and graphs already refer to. A CPU has nothing that refers to storage:
there they are loaded in place (`cpu_reload`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from spell_megatron.rollout.transfer.cpu_reload import CpuReload, keep_from

Init = TypeVar("Init", bound=WeightTransferInitInfo)
Update = TypeVar("Update", bound=WeightTransferUpdateInfo)


class LayerwiseReload:
    """vLLM's own reload, of everything."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        self._model, self._config = model, config
        initialize_layerwise_reload(model)

    def finish(self) -> None:
        finalize_layerwise_reload(self._model, self._config)

    def keep_from(self, memory: torch.Tensor) -> None:
        keep_from(memory, self._model)


class Receiver(WeightTransferEngine[Init, Update]):
    """Start and finish of an update; a subclass says how the tensors arrive (`receive_weights`)."""

    _reload: CpuReload | LayerwiseReload | None = None

    @property
    def _on_cpu(self) -> bool:
        device: torch.device = self.device
        return device.type == "cpu"

    def start_weight_update(self) -> None:
        if self._reload is not None:  # an update failed half way
            self._reload.finish()
        self._reload = (CpuReload if self._on_cpu else LayerwiseReload)(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if not self._on_cpu:  # the base class asks an accelerator that a CPU does not have
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        reload, self._reload = self._reload, None
        assert reload is not None, "vLLM finishes what it started"
        reload.finish()

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Give tensors to the model. What it does not copy, it keeps until their layer is complete."""
        model: Any = self.model  # every vLLM model has load_weights, torch's Module does not
        model.load_weights(iter(weights))

    def keep_from(self, memory: torch.Tensor) -> None:
        """Copy what was loaded from `memory` and is still to be processed: the memory is about to change."""
        assert self._reload is not None, "weights come within an update"
        self._reload.keep_from(memory)

    def shutdown(self) -> None:
        """Nothing to release."""
