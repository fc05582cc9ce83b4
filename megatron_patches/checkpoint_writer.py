"""Checkpoints are written by forked processes, and their results come back over a spawned one.

strategies/filesystem_async.py:266 forks once per file from a process that by then runs many threads (the
rollout engine's among them), which may deadlock; :54 spawns a manager that imports the main module again
(seconds) and hangs for ever without psutil. Here the files are written by the calling process, through the
same upstream function. Who wants to overlap writing and training calls it from a thread.
"""

from __future__ import annotations

import inspect
import queue
from typing import Any

from megatron_patches.patch import Patch


def _module() -> Any:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    return filesystem_async


def _queue_maker() -> str:
    """Its name has lost an underscore since 0.16."""
    return next(n for n in ("_get_write_results_queue", "get_write_results_queue") if hasattr(_module(), n))


def _needed() -> bool:
    return ".Manager()" in inspect.getsource(getattr(_module(), _queue_maker()))


def _write_here(
    transform_list: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], global_results: Any
) -> None:
    results: dict[int, Any] = {}
    for index, bucket in enumerate(write_buckets):
        output: queue.Queue[tuple[int, Any]] = queue.Queue()
        count: queue.Queue[int] = queue.Queue()
        count.put(index)
        _module().FileSystemWriterAsync.write_preloaded_data(
            transform_list, index, bucket, output, count, use_fsync=True
        )
        _, written = output.get()
        if isinstance(written, Exception):
            global_results.put(written)
            return
        results[index] = written
    global_results.put(results)


def _apply() -> None:
    module = _module()
    setattr(module, _queue_maker(), queue.Queue)
    writer = module.FileSystemWriterAsync
    if hasattr(writer, "write_preloaded_data_multiproc"):  # 0.19 writes by threads and does not fork
        writer.write_preloaded_data_multiproc = staticmethod(_write_here)


PATCH = Patch(
    name="checkpoint_writer",
    scope="any",
    upstream="megatron/core/dist_checkpointing/strategies/filesystem_async.py:54,266",
    breaks="saving takes seconds for nothing, hangs without psutil, and forks a threaded process",
    needed=_needed,
    apply=_apply,
)
