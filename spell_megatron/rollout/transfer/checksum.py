"""A number that two ends of a transfer can compare instead of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
_FACTOR, _MODULUS = 1_000_003, 1 << 64


def checksum(tensor: torch.Tensor) -> int:
    """Every element's bits times its place, summed modulo 2^64, piece by piece: the same on any device.

    Differs where an element or its place does, and, all but certainly, wherever two tensors do.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = 0
    for piece in bits.split(_CHUNK):
        places = torch.arange(1, len(piece) + 1, device=piece.device)
        total = (total * _FACTOR + int((piece * places).sum())) % _MODULUS
    return total


def noted(
    weights: Iterable[tuple[str, torch.Tensor]], sums: MutableMapping[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass a stream of tensors on, and write their checksums down by name."""
    for name, tensor in weights:
        sums[name] = checksum(tensor)
        yield name, tensor
