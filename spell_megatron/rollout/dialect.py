"""vLLM's dialect: every route, argument, environment variable and word that is vLLM's and not ours.

Nothing here imports vLLM. `tests/rollout/test_contract.py` looks for all of it in vLLM's source.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from spell_megatron.config import ConfigError, RolloutConfig

PREFIX = "VLLM_"
"""Prefix of its environment variables."""
LOG_LEVEL = "VLLM_LOGGING_LEVEL"
START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
SERVED_NAME = "policy"
"""What a server calls the model."""


class Route(StrEnum):
    """Routes of a server."""

    HEALTH = "/health"
    GENERATE = "/inference/v1/generate"
    """Tokens in, tokens out."""
    WEIGHT_INFO = "/weight_info"
    """Which version it holds."""
    NAME_WEIGHTS = "/update_weight_version"
    WORLD_SIZE = "/get_world_size"
    PAUSE = "/pause"
    RESUME = "/resume"
    SLEEP = "/sleep"
    WAKE = "/wake_up"
    OPEN_TRANSFER = "/init_weight_transfer_engine"
    CLOSE_TRANSFER = "/shutdown_weight_transfer_engine"
    BEGIN_UPDATE = "/start_weight_update"
    UPDATE = "/update_weights"
    END_UPDATE = "/finish_weight_update"
    FORGET_PREFIXES = "/reset_prefix_cache"
    CALL_WORKERS = "/collective_rpc"


PAUSES = {"finish": "wait", "restart": "abort", "continue": "keep"}
"""Its modes of a pause, by what `rollout.servers.in_flight` says of running requests."""
SLEEP_TAGS = {"weights": "weights", "cache": "kv_cache"}
"""vLLM's names for what an engine takes back when it wakes."""
KEEPS, DISCARDS = 1, 2
"""Its levels of sleep: weights go to host memory, or nowhere."""
EXPERTS_FROM = "routed_experts_prompt_start"
"""The sampling parameter that names the prompt's first token whose experts are told."""
_SEED_BITS = 63  # its seed of a request is a signed 64-bit number


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


def sampling_parameters(
    *,
    seed: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stop: Sequence[int],
    experts_from: int | None = None,
) -> dict[str, Any]:
    """The parameters of one completion, by vLLM's names."""
    told = {} if experts_from is None else {EXPERTS_FROM: experts_from}
    return {
        "seed": seed & ((1 << _SEED_BITS) - 1),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop_token_ids": list(stop),
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
        **told,
    }


def engine_arguments(
    settings: RolloutConfig, backend: Backend, *, sleeps: bool = False, tells_experts: bool = False
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
        # Of a folder that Mistral made it would otherwise read other files than the trainer.
        "config_format": "hf",
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
    return {"load_format": "safetensors"} | arguments | passed_through(settings, arguments)


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


def server_arguments(
    settings: RolloutConfig, model: Path, *, door: str, tokenizer: bool, transfer: str | None
) -> dict[str, Any]:
    """Those that a server has besides; `door` is the middleware before its routes, `transfer` its weights' way."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "served_model_name": SERVED_NAME,
        "middleware": door,
        "allowed_origins": [],  # of browsers
        "disable_uvicorn_access_log": True,  # a line a request would fill disks
        "tensor_parallel_size": settings.servers.tensor,
        "skip_tokenizer_init": not tokenizer,
        "enable_scale_out": True,  # the endpoint that takes and gives tokens
        "enable_prompt_tokens_details": True,  # says how much of a prompt was cached
        "chat_template": "{{ '' }}",  # prompts come as tokens: no template of the folder is run
    }
    if transfer is not None:
        arguments["weight_transfer_config"] = json.dumps({"backend": transfer})
        arguments["worker_extension_cls"] = "spell_megatron.rollout.transfer.extension.Extension"
    return arguments


def passed_through(settings: RolloutConfig, ours: Collection[str]) -> dict[str, Any]:
    """`rollout.engine` under vLLM's names. Raises ConfigError for what is set by another key, or by us."""
    given = {name.lstrip("-").replace("-", "_"): value for name, value in settings.engine.items()}
    for name in given.keys() & {*ours, *_OURS}:
        keys = {field.name for field in fields(settings)}
        owner = _OURS.get(name, f"rollout.{name}" if name in keys else "this program")
        raise ConfigError(f"rollout.engine: {name} is set by {owner}; leave it out")
    return given


def passed_variables(settings: RolloutConfig, ours: Collection[str]) -> dict[str, str]:
    """`rollout.engine_environment`. Raises ConfigError for what is no variable of vLLM's, or is ours to set."""
    for name in settings.engine_environment:
        if not name.startswith(PREFIX):
            raise ConfigError(f"rollout.engine_environment: {name} is no variable of vLLM's ({PREFIX}…)")
        if name in ours:
            raise ConfigError(f"rollout.engine_environment: {name} is set by this program; leave it out")
    return dict(settings.engine_environment)


TRAINERS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")
"""Variables that are the trainer's alone. Buffers in expandable segments cannot be shared between a server's ranks,
which vLLM does with those of its CUDA graphs: cudaIpcGetMemHandle refuses them, and the worker ends."""


def common_environment(scratch: Path) -> dict[str, str]:
    """Variables of every vLLM process; `scratch` receives what it would leave in the home folder, which a container may
    not have."""
    return {
        "VLLM_CACHE_ROOT": str(scratch / "cache"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(scratch),
        "VLLM_NO_USAGE_STATS": "1",  # no report to the outside
        "VLLM_DO_NOT_TRACK": "1",
    }


def own_environment(scratch: Path) -> dict[str, str]:
    """Variables of a process of ours with an engine inside."""
    return {
        **common_environment(scratch),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs here, not in a child process
    }


def server_environment(backend: Backend, scratch: Path, sockets: str, way: str | None) -> dict[str, str]:
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
    if backend is CPU:
        variables["TORCHDYNAMO_DISABLE"] = "1"  # as in `backend.prepare`
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # servers on one machine would bind the same cores
        # Memory of packed weights is for the next ones; from the system they would come back page by page.
        variables["GLIBC_TUNABLES"] = (
            f"glibc.malloc.mmap_threshold={1 << 30}:glibc.malloc.trim_threshold={2 << 30}"
        )
    return variables
