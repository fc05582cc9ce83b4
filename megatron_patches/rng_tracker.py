"""The tracker of random states reads and writes the CUDA generator only.

Without CUDA the seeds of the tracker are a silent no-op (tensor_parallel/random.py:235): here it tracks
states of the CPU generator. `torch.cuda.manual_seed` stays a no-op, so callers seed torch themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron_patches.patch import Patch


def _needed() -> bool:
    return not torch.cuda.is_available()


def _get(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _add(self: Any, name: str, seed: int) -> None:
    if seed in self.seeds_ or name in self.states_:
        raise ValueError(f"the random state {name!r} or its seed {seed} is there already")
    self._is_initialized = True
    self.seeds_.add(seed)
    self.states_[name] = torch.Generator().manual_seed(seed).get_state()


@contextlib.contextmanager
def _fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    outer_state, outer_name = torch.get_rng_state(), self._current_state_name
    if outer_name != "default-rng":
        self.states_[outer_name] = outer_state
    torch.set_rng_state(self.states_[name])
    self._current_state_name = name
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer_state)
        self._current_state_name = outer_name


def _apply() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = _get
    random._set_cuda_rng_state = _set
    random.CudaRNGStatesTracker.add = _add
    random.CudaRNGStatesTracker.fork = _fork


PATCH = Patch(
    name="rng_tracker",
    scope="cpu",
    upstream="megatron/core/tensor_parallel/random.py:41,73,211,242",
    breaks="initialisation and recomputation raise, or draw from an unseeded generator",
    needed=_needed,
    apply=_apply,
)
