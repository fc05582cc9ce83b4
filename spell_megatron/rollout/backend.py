"""What vLLM needs from a process, on a CPU and on CUDA, its environment variables among it.

vLLM assumes that it owns the process: it seeds the global generators, replaces torch functions, writes
into the temporary folder and edits the environment. `prepare` says what vLLM must know before it is
imported, `undisturbed` puts back what it changes.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spell_megatron.config import Config, ConfigError, Rollout
from spell_megatron.topology import Topology, topology


@dataclass(frozen=True, slots=True)
class Backend:
    """Where vLLM computes, and what follows from it."""

    device: str
    eager: bool
    """No graph capture and no compilation, whatever the configuration says."""
    block_size: int | None
    """Tokens of a KV block, the grain of the prefix cache; None leaves it to vLLM."""
    kv_cache_mib: int | None
    """KV cache where the configuration gives none; None takes a share of device memory."""
    cuts_prompts: bool
    """Long prompts are computed in several steps (chunked prefill)."""
    sleeps: bool
    """Memory can be given back between rollouts."""
    server: str
    """Module that is a server's program: the `vllm` script would need the distribution of that name."""


# A CPU build has nothing to capture, and compiling a small model takes longer than running it. vLLM's own
# block of 128 tokens caches little of a short prompt; 32 is the smallest that its CPU kernels like. Its
# default KV cache would be most of the machine's memory. After a prompt's unfinished part it rewinds the
# request's random generator by an offset that CPU generators do not have, and dies.
CPU = Backend(
    "cpu",
    eager=True,
    block_size=32,
    kv_cache_mib=512,
    cuts_prompts=False,
    sleeps=False,
    server="spell_megatron.rollout.cpu_start",
)
CUDA = Backend(
    "cuda",
    eager=False,
    block_size=None,
    kv_cache_mib=None,
    cuts_prompts=True,
    sleeps=True,
    server="vllm.entrypoints.openai.api_server",
)
SLEEP_TAGS = {"weights": "weights", "cache": "kv_cache"}
"""vLLM's names for what an engine takes back when it wakes."""


@cache
def current() -> Backend:
    return CUDA if torch.cuda.is_available() else CPU


def here(config: Config, ranks: int | None = None) -> Topology:
    """The topology of a configuration on the devices that this process may use."""
    cuda = current() is CUDA
    return topology(config, cuda=cuda, gpus=torch.cuda.device_count() if cuda else 0, ranks=ranks)


def engine_arguments(
    settings: Rollout, backend: Backend, *, sleeps: bool = False, tells_experts: bool = False
) -> dict[str, Any]:
    """vLLM's engine arguments that every engine has, by vLLM's names, for a process or a command line.

    Those of `rollout.engine` are among them; raises ConfigError where they are ours to set.
    """
    # A step must have room for a token of every sequence, and where prompts are not cut, for a whole one.
    least = (
        settings.max_num_seqs if backend.cuts_prompts else max(settings.max_num_seqs, settings.max_model_len)
    )
    arguments: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": max(settings.max_batched_tokens, least),
        "enable_chunked_prefill": backend.cuts_prompts,
        "enforce_eager": settings.eager or backend.eager,
        "enable_prefix_caching": True,
        # The trainer's log-probs are of the distribution sampled from; vLLM's default is the raw one.
        "logprobs_mode": "processed_logprobs",
        # Sampling is ours alone: a model's generation_config.json must not add top-k or penalties.
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
    }
    if backend.block_size is not None:
        arguments["block_size"] = backend.block_size
    kv_cache_mib = settings.kv_cache_mib or backend.kv_cache_mib
    if kv_cache_mib is not None:
        arguments["kv_cache_memory_bytes"] = kv_cache_mib << 20
    if backend is not CPU:
        # vLLM compares this share with what is free even where the cache's size is given; its default is 0.92.
        arguments["gpu_memory_utilization"] = settings.gpu_memory
    if sleeps and backend.sleeps:
        arguments["enable_sleep_mode"] = True
    if tells_experts:
        arguments["enable_return_routed_experts"] = True
    return arguments | passed_through(settings, arguments)


_OURS = {
    "model": "model.path",
    "served_model_name": "this program",
    "host": "rollout.servers.host",
    "allowed_origins": "nobody: no browser talks to an engine",
    "api_key": "this program",
    "port": "this program",
    "uds": "this program",
    "middleware": "this program",
    "tensor_parallel_size": "rollout.servers.tensor",
    "seed": "seed",
    "enable_sleep_mode": "rollout.placement",
    "kv_cache_memory_bytes": "rollout.kv_cache_mib",
    "gpu_memory_utilization": "rollout.gpu_memory",
    "enforce_eager": "rollout.eager",
    "max_num_batched_tokens": "rollout.max_batched_tokens",
    "enable_return_routed_experts": "policy.router_replay",
    "weight_transfer_config": "rollout.servers.transfer",
    "worker_extension_cls": "this program",
    "tokenizer": "model.path",
    "chat_template": "nobody: prompts come as tokens",
    "trust_remote_code": "nobody: no code of a model is run",
}
"""vLLM's arguments that are not to be passed through, by what decides on them."""


def passed_through(settings: Rollout, ours: Collection[str]) -> dict[str, Any]:
    """`rollout.engine` under vLLM's names. Raises ConfigError for what is set by another key, or by us."""
    given = {name.lstrip("-").replace("-", "_"): value for name, value in settings.engine.items()}
    for name in given.keys() & {*ours, *_OURS}:
        keys = {field.name for field in fields(settings)}
        owner = _OURS.get(name, f"rollout.{name}" if name in keys else "this program")
        raise ConfigError(f"rollout.engine: {name} is set by {owner}; leave it out")
    return given


def passed_variables(settings: Rollout, ours: Collection[str]) -> dict[str, str]:
    """`rollout.engine_environment`. Raises ConfigError for what is no variable of vLLM's, or is ours to set."""
    for name in settings.engine_environment:
        if not name.startswith("VLLM_"):
            raise ConfigError(f"rollout.engine_environment: {name} is no variable of vLLM's (VLLM_…)")
        if name in ours:
            raise ConfigError(f"rollout.engine_environment: {name} is set by this program; leave it out")
    return dict(settings.engine_environment)


def common_environment(scratch: Path) -> dict[str, str]:
    """Variables of every vLLM process; `scratch` receives what it would leave in the home folder."""
    return {
        "VLLM_CACHE_ROOT": str(scratch / "cache"),
        "VLLM_NO_USAGE_STATS": "1",  # no report to the outside
        "VLLM_DO_NOT_TRACK": "1",
    }


def server_environment(scratch: Path, sockets: str, way: str | None) -> dict[str, str]:
    """Variables of a vLLM server; `sockets` is a folder with a short path for it alone, `way` its weights'."""
    variables = {
        **common_environment(scratch),
        "VLLM_SERVER_DEV_MODE": "1",  # the weight-update routes
        "VLLM_RPC_BASE_PATH": sockets,
        "TMPDIR": sockets,
        "GLOO_SOCKET_IFNAME": "lo",  # a server's workers are all on its machine
    }
    if way == "ipc":
        # Handles of shared GPU memory come pickled. Only who knows the server's secret can send any (`door`), and who
        # knows it is the server's own user.
        variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if current() is CPU:
        variables["TORCHDYNAMO_DISABLE"] = "1"  # as in `prepare`
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # servers on one machine would bind the same cores
        # Memory of packed weights is for the next ones; from the system they would come back page by page.
        variables["GLIBC_TUNABLES"] = (
            f"glibc.malloc.mmap_threshold={1 << 30}:glibc.malloc.trim_threshold={2 << 30}"
        )
    return variables


def prepare(scratch: Path) -> None:
    """Set up this process for an engine inside it. Call before vLLM is imported."""
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ.update(common_environment(scratch))
    os.environ.update(
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs here, not in a child process
            "VLLM_RPC_BASE_PATH": str(scratch),  # else a socket folder in the temporary folder
        }
    )
    quiet()
    if current() is CPU:
        import torch._dynamo

        # vLLM decorates sampling and layers with torch.compile even where it is told to be eager: half a
        # minute of compilation for a small model. Graphs exist for CUDA's sake.
        torch._dynamo.config.disable = True


def quiet() -> None:
    """Keep vLLM's warnings off our console: they are about tuning. Call before vLLM is imported."""
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)  # some come before its own logging is set up
    # A failed step would print the whole batch; its exception reaches the caller anyway.
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)


@contextmanager
def undisturbed(scratch: Path) -> Iterator[None]:
    """Put back what vLLM changes in this process: random states, threads, affinity, environment, tempdir."""
    environment, temporary = dict(os.environ), tempfile.tempdir
    python_random, numpy_random = random.getstate(), np.random.get_state()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    affinity = os.sched_getaffinity(0)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    tempfile.tempdir = str(scratch)
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's import touches deprecated names of torch
            yield
    finally:
        tempfile.tempdir = temporary
        random.setstate(python_random)
        np.random.set_state(numpy_random)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            set_num_threads(threads)
        if os.sched_getaffinity(0) != affinity:
            os.sched_setaffinity(0, affinity)
        _restore_environment(environment)


@contextmanager
def process_group_kept() -> Iterator[None]:
    """Let an engine stop without taking the process's default group along.

    vLLM's core ends every group of its process, the trainer's too (v1/engine/core.py:839). Inside this block
    it ends its own alone.
    """
    from vllm.distributed import parallel_state

    def destroy_own_groups() -> None:
        if parallel_state._WORLD:
            parallel_state._WORLD.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None

    original = parallel_state.destroy_distributed_environment
    parallel_state.destroy_distributed_environment = destroy_own_groups
    try:
        yield
    finally:
        parallel_state.destroy_distributed_environment = original


def _restore_environment(before: Mapping[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
