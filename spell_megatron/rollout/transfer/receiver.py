"""The engine's end of a transfer: full tensors under Hugging Face names, loaded layer by layer.

Runs inside a vLLM worker. vLLM's layer-wise reload collects the tensors of a layer (they may come in
several pieces and be sharded over tensor-parallel workers), processes them as after the first load, and
copies them into the storage that kernels and graphs already refer to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from spell_megatron.rollout.transfer import cpu_repack

Init = TypeVar("Init", bound=WeightTransferInitInfo)
Update = TypeVar("Update", bound=WeightTransferUpdateInfo)


class Receiver(WeightTransferEngine[Init, Update]):
    """Start and finish of an update; a subclass says how the tensors arrive (`receive_weights`)."""

    _open = False

    @property
    def _on_cpu(self) -> bool:
        device: torch.device = self.device
        return device.type == "cpu"

    def start_weight_update(self) -> None:
        if self._open:  # an update that failed half way left layers without storage
            self.finish_weight_update()
        if self._on_cpu:
            cpu_repack.before_reload(self.model)
        initialize_layerwise_reload(self.model)
        self._open = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if not self._on_cpu:  # the base class asks an accelerator that a CPU does not have
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self._on_cpu:
            cpu_repack.after_reload(self.model)
        self._open = False

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Give tensors to the model; they are kept until their layer is complete."""
        model: Any = self.model  # every vLLM model has load_weights, torch's Module does not
        model.load_weights(iter(weights))

    def shutdown(self) -> None:
        """Nothing to release."""
