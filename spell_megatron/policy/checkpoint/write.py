"""Writing a learner's state while the training goes on.

Every rank writes a file of its own parts, without asking the others, and takes the file's digest as it writes. In the
background that is a thread's work, from a copy in host memory. What is in the files comes together on rank 0 at last,
which makes the index of it. The threads have a group of their own: the training uses all others meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from spell_megatron.policy.agreement import Group, agreed, gathered
from spell_megatron.policy.checkpoint.faults import reason
from spell_megatron.policy.checkpoint.files import TENSORS, new_digest
from spell_megatron.policy.checkpoint.index import Entry, write_index
from spell_megatron.policy.checkpoint.parts import TensorPart
from spell_megatron.policy.checkpoint.state import VALUES, learner_state
from spell_megatron.policy.colocation import host_memory
from spell_megatron.policy.learner import HeldPolicy

_Written = tuple[str, list[Entry], dict[str, str]]
"""What one rank tells: a fault, what is in its file, the file's digest."""
_ALIGNED = 64
"""Bytes; a multiple of every element's size."""


class HostCopy:
    """A rank's parts in host memory: once, for as long as they are saved."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def of(self, parts: list[TensorPart], device: torch.device) -> list[TensorPart]:
        """The same parts, which nobody changes until the next call."""
        sizes = [-(-part.data.nbytes // _ALIGNED) * _ALIGNED for part in parts]
        if self.memory.numel() != sum(sizes):
            self.memory = torch.empty(0, dtype=torch.uint8)  # so that there are never both
            self.memory = host_memory(sum(sizes), device)
        copies = []
        for part, end, size in zip(parts, accumulate(sizes), sizes, strict=True):
            piece = self.memory[end - size : end - size + part.data.nbytes]
            copy = piece.view(part.data.dtype).view(part.data.shape)
            copies.append(replace(part, data=copy.copy_(part.data, non_blocking=True)))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return copies


class Staged:
    """A learner's state as it is to be written by this rank. With a `copy` in host memory the learner may go on."""

    def __init__(self, learner: HeldPolicy, folder: Path, copy: HostCopy | None = None) -> None:
        learner.settle()
        self.folder, self._rank = folder, learner.world.rank
        self._parts, self._values = learner_state(learner)
        if copy is not None:
            self._parts = copy.of(self._parts, learner.world.device)

    def write(self) -> tuple[list[Entry], dict[str, str]]:
        """Write this rank's file, through to the disk; what is in it, and its digest by its name.

        Raises what the file system raises.
        """
        if self._rank == 0:
            torch.save(self._values, self.folder / VALUES)
        if not self._parts:
            return [], {}
        name, entries = f"__{self._rank}_0{TENSORS}", list[Entry]()
        with (self.folder / name).open("wb") as raw:
            file = _Digested(raw)
            for part in self._parts:
                begin = file.position
                torch.save(_alone(part.data), file)  # type: ignore[arg-type]  # it writes and flushes alone
                place = (name, begin, file.position - begin)
                entries.append(Entry(part.key, part.data.dtype, part.whole, part.box, *place))
            raw.flush()
            os.fsync(raw.fileno())
        return entries, {name: file.digest.hexdigest()}

    def close(self, entries: list[Entry]) -> None:
        """Write the index of all ranks' files. For rank 0."""
        write_index(self.folder, entries)
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))


class _Digested:
    """A file that is written from its beginning to its end, and the digest of that."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.position = file, new_digest(), 0

    def write(self, content: Any) -> int:
        self.digest.update(content)
        self.position += len(content)
        return self._file.write(content)

    def flush(self) -> None:
        pass


def _alone(tensor: Tensor) -> Tensor:
    """On the host, in a storage of its own: torch saves the whole of a storage."""
    found = tensor.cpu()
    return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()


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
            written = gathered(self._written(), self._group)
            self._fault = agreed(self._finished(written) if written else "", self._group)
        except Exception as error:  # of the group: another rank is gone
            self._fault = reason(error, self._staged.folder)

    def _written(self) -> _Written:
        """What this rank has written, or why it could not."""
        try:
            return "", *self._staged.write()
        except Exception as error:
            return reason(error, self._staged.folder), [], {}

    def _finished(self, written: list[_Written]) -> str:
        """Commit what all ranks have written; why that fails."""
        if fault := next((fault for fault, *_ in written if fault), ""):
            return fault
        try:
            self._staged.close([entry for _, entries, _ in written for entry in entries])
            self._commit({name: digest for *_, own in written for name, digest in own.items()})
        except Exception as error:
            return reason(error, self._staged.folder)
        return ""
