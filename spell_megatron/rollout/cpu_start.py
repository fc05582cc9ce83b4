"""vLLM's API server on a CPU, with one import of vLLM instead of four.

    python -m spell_megatron.rollout.cpu_start ARGUMENTS…      # vLLM's own

vLLM looks at a model's class in a process of its own, so that CUDA is not initialised where others are to be forked.
On a CPU it also spawns its engine core and its worker, for the sake of libraries that bind threads to cores, which
ours are not. Each of these processes imports vLLM anew, ten seconds of a core. Here the class is looked at where it is
asked for, and the others are forked. (vllm 0.32: model_executor/models/registry.py:1079, platforms/cpu.py:409.)
"""

from __future__ import annotations

import os
from typing import Any

from spell_megatron.rollout.dialect import START_METHOD


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


def main() -> None:
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    look_at_models_here()
    fork()
    serve()


if __name__ == "__main__":
    main()
