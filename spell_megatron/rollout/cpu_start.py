"""vLLM's API server on a CPU, with one import of vLLM instead of four.

    python -m spell_megatron.rollout.cpu_start ARGUMENTS…      # vLLM's own

vLLM looks at a model's class in a process of its own, so that CUDA is not initialised where others are to be forked.
On a CPU it also spawns its engine core and its worker, for the sake of libraries that bind threads to cores, which
ours are not. Each of these processes imports vLLM anew, ten seconds of a core. Here the class is looked at where it is
asked for, and the others are forked. (vllm 0.32: model_executor/models/registry.py:1079, platforms/cpu.py:409.)

vLLM corrects torch's compiler as it is imported, and for that imports it, which is a tenth of the whole. Nothing is
compiled on a CPU. (env_override.py:894.)

Core and worker look for each other's messages without a pause until none has come for a second. Where nothing but GPUs
computes, that costs nobody anything; here every look is taken from who computes.
(distributed/device_communicators/shm_broadcast.py:117.)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

from spell_megatron.rollout.dialect import START_METHOD

_LOOK_SECONDS = 2e-3
"""After a message, for the next one. ZeroMQ may drop a call that comes within a millisecond of another."""
_RECHECK_MILLISECONDS = 100
"""The longest sleep: a call that was lost all the same costs no more."""
_COMPILER = "torch._inductor.lowering"


@contextmanager
def without_compiler() -> Iterator[None]:
    """vLLM is imported as where torch brings no compiler; whoever wants it afterwards finds it."""
    sys.modules[_COMPILER] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        yield
    finally:
        del sys.modules[_COMPILER]


def look_at_models_here() -> None:
    """Have vLLM look at a model's class in this process."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


def fork() -> None:
    """Have vLLM fork its processes, where its platform wants them spawned."""
    from vllm.platforms.cpu import CpuPlatform

    configure = CpuPlatform.check_and_update_config

    def configure_and_fork(config: Any) -> None:
        configure(config)
        os.environ[START_METHOD] = "fork"

    CpuPlatform.check_and_update_config = staticmethod(configure_and_fork)


def sleep_soon() -> None:
    """Have whoever waits for a message of core or worker sleep until it is called, soon after the last one."""
    from vllm.distributed.device_communicators import shm_broadcast

    condition = shm_broadcast.SpinCondition
    condition.__init__ = partialmethod(condition.__init__, busy_loop_s=_LOOK_SECONDS)
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = _RECHECK_MILLISECONDS


def main() -> None:
    with without_compiler():
        from vllm.entrypoints.launchers.api_server.entry import main as serve

    look_at_models_here()
    fork()
    sleep_soon()
    serve()


if __name__ == "__main__":
    main()
