"""Writing a learner's state while the training goes on.

Megatron-core plans which rank writes what. The tensors are then copied to host memory, and a thread of every
rank writes its files. Upstream's own background writers fork or spawn processes, which a process that holds
an engine cannot afford, and end with collectives of the group that the training uses meanwhile: the threads
have a group of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from spell_megatron.checkpoint.faults import reason
from spell_megatron.checkpoint.files import digests
from spell_megatron.checkpoint.state import learner_state
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import Group, Value, agreed

_Part = tuple[str, list[WriteResult], dict[str, str]]
"""Of one rank: a fault, what was written for the index, digests of the files."""


class Staged:
    """A learner's state in host memory, with what is to be written of it by this rank. A collective."""

    def __init__(self, learner: Learner, folder: Path) -> None:
        learner.settle()
        fresh = learner.schedule.num_steps == 0
        self.folder, self._strategy = folder, _Planned("torch_dist", 1)
        request = dist_checkpointing.save(
            learner_state(learner, loading=False, fresh=fresh),
            str(folder),
            self._strategy,
            async_sharded_save=True,
        )
        assert request is not None
        self._write, arguments = request.async_fn, request.async_fn_args
        if self._write is not None:
            self._rank, buckets, self._results = arguments
            self._buckets = [
                (path, key, (texts, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors]))
                for path, key, (texts, tensors) in buckets
            ]

    def write(self) -> list[WriteResult]:
        """Write this rank's files, through to the disk. Raises what the file system raises."""
        if self._write is None:
            return []
        self._write(self._rank, self._buckets, self._results)
        written = self._results.get_nowait()
        if isinstance(written, Exception):
            raise written
        return list(chain.from_iterable(written.values()))

    def close(self, results: list[list[WriteResult]]) -> None:
        """Write the index of all ranks' files. For rank 0."""
        self._strategy.writer.finish(self._strategy.metadata, results)
        save_config(CheckpointingConfig(self._strategy.backend, self._strategy.version), str(self.folder))


class _Planned(TorchDistSaveShardedStrategy):
    """Upstream's strategy up to the plan, which it otherwise hides in a collective callback."""

    writer: Any
    metadata: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, plan: Any, *more: Any) -> Any:
        self.writer, self.metadata = writer, plan[1]
        return super()._get_save_and_finalize_callbacks(writer, plan, *more)


class Write:
    """A state on its way to the disk. `commit` is rank 0's last act, given the digests of all ranks' files."""

    def __init__(self, staged: Staged, group: Group, commit: Callable[[dict[str, str]], None]) -> None:
        self._staged, self._group, self._commit = staged, group, commit
        self._fault = ""
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> str:
        """Until the state is committed; why it is not, the same on every rank."""
        self._thread.join()
        return self._fault

    def _run(self) -> None:
        try:
            parts = gathered(self._written(), self._group)
            self._fault = agreed(self._finished(parts) if parts else "", self._group)
        except (Exception, CheckpointException) as error:  # of the group: another rank is gone
            self._fault = reason(error, self._staged.folder)

    def _written(self) -> _Part:
        """What this rank has written, or why it could not."""
        try:
            results = self._staged.write()
            own = {result.storage_data.relative_path for result in results}
            return "", results, digests(self._staged.folder, own)
        except (Exception, CheckpointException) as error:
            return reason(error, self._staged.folder), [], {}

    def _finished(self, parts: list[_Part]) -> str:
        """Commit what all ranks have written; why that fails."""
        if fault := next((fault for fault, _, _ in parts if fault), ""):
            return fault
        try:
            self._staged.close([results for _, results, _ in parts])
            self._commit({name: digest for _, _, own in parts for name, digest in own.items()})
        except (Exception, CheckpointException) as error:
            return reason(error, self._staged.folder)
        return ""


def gathered(value: Value, group: Group) -> list[Value]:
    """The values of all ranks on rank 0, nothing elsewhere."""
    if group is None:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []
