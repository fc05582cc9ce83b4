"""What vLLM needs from a process, on a CPU and on CUDA.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from spell_megatron.base.ownership import make_own
from spell_megatron.base.topology import Topology, topology
from spell_megatron.config import Config
from spell_megatron.rollout.dialect import CPU, CUDA, LOG_LEVEL, Backend, own_environment


@cache
def current() -> Backend:
    return CUDA if torch.cuda.is_available() else CPU


def here(config: Config, ranks: int | None = None) -> Topology:
    """The topology of a configuration on the devices that this process may use."""
    cuda = current() is CUDA
    return topology(config, cuda=cuda, gpus=torch.cuda.device_count() if cuda else 0, ranks=ranks)


def prepare(scratch: Path) -> None:
    """Set up this process for an engine inside it. Call before vLLM is imported."""
    make_own(scratch)
    os.environ.update(own_environment(scratch))
    quiet()
    if current() is CPU:
        import torch._dynamo

        # vLLM decorates sampling and layers with torch.compile even where it is told to be eager: half a
        # minute of compilation for a small model. Graphs exist for CUDA's sake.
        torch._dynamo.config.disable = True


def quiet() -> None:
    """Keep vLLM's warnings off our console: they are about tuning. Call before vLLM is imported."""
    level = os.environ.setdefault(LOG_LEVEL, "ERROR")
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
