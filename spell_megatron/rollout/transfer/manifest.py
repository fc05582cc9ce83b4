"""Which tensors an update must bring.

vLLM keeps the old values of a layer that an update forgets, and fills half a fused layer with whatever
was in memory. Both would train on silently, so every stream of weights is held against the checkpoint
that the engine was started from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spell_megatron.rollout.engine import EngineError
from spell_megatron.types import SpellError
from spell_megatron.weights.contents import read_contents

if TYPE_CHECKING:
    import torch

STAGED_BYTES = 1 << 30
"""Bytes of a GPU's memory, at least, for a local transfer to stage tensors in."""
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Manifest:
    """Shape of every tensor of a checkpoint, by Hugging Face name."""

    shapes: Mapping[str, tuple[int, ...]]
    optional: frozenset[str] = frozenset()
    """Names that may be there or not: the output head of a model that shares it with its embedding."""

    @property
    def mixture(self) -> bool:
        """Whether it has experts. Of those vLLM keeps tensors (maps, work spaces) that are neither parameters nor
        buffers: they would not come back where weights are given up, so they never are."""
        return any(".experts." in name for name in self.shapes)

    @classmethod
    def of(cls, folder: Path) -> Manifest:
        """The manifest of a model folder, checked. Raises EngineError where it is not one to train."""
        try:
            contents = read_contents(folder)
        except SpellError as error:
            raise EngineError(str(error)) from None
        shape = contents.shape
        return cls(contents.sizes, frozenset({shape.family.head}) if shape.tied else frozenset())

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(math.prod(shape) for shape in self.shapes.values())

    def checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass a stream on; raise EngineError at the first wrong tensor, or at the end if any is missing."""
        missing = set(self.shapes) - self.optional
        seen: set[str] = set()
        for name, tensor in weights:
            if name in seen:
                raise EngineError(f"the update brings {name!r} twice")
            seen.add(name)
            if name not in self.shapes and name not in self.optional:
                raise EngineError(f"the update brings {name!r}, which the engine's model does not have")
            shape = self.shapes.get(name)
            if shape is not None and tuple(tensor.shape) != shape:
                raise EngineError(
                    f"the update brings {name!r} of shape {list(tensor.shape)}, the engine holds"
                    f" {list(shape)}: send full tensors, gathered over every parallel rank"
                )
            missing.discard(name)
            yield name, tensor
        if missing:
            shown = ", ".join(sorted(missing)[:_SHOWN])
            raise EngineError(f"the update lacks {len(missing)} tensors of the engine's model: {shown}")


def buckets(
    weights: Iterable[tuple[str, torch.Tensor]], limit: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Cut a stream into lists of at most `limit` bytes; a larger tensor travels alone."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def described(bucket: Sequence[tuple[str, torch.Tensor]]) -> tuple[list[str], list[str], list[list[int]]]:
    """Names, dtypes and shapes, as a message tells them."""
    dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket]
    return [name for name, _ in bucket], dtypes, [list(tensor.shape) for _, tensor in bucket]
