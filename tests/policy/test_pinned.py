"""Pinned host memory: given back before it is freed, and only when nobody has a view of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spell_megatron.policy import colocation
from spell_megatron.policy.checkpoint import write
from spell_megatron.policy.checkpoint.boxes import Box
from spell_megatron.policy.checkpoint.parts import TensorPart
from spell_megatron.policy.colocation import host_memory

pytestmark = pytest.mark.unit

CUDA = torch.device("cuda")


class Driver:
    """What CUDA knows of pinned memory: bytes by their address."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def register(self, address: int, size: int, _flags: int) -> int:
        assert address not in self.pinned, "pinned already"
        self.pinned[address] = size
        return 0

    def unregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    cudart = SimpleNamespace(cudaHostRegister=found.register, cudaHostUnregister=found.unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return found


def sizes(driver: Driver) -> list[int]:
    return sorted(driver.pinned.values())


def part(elements: int) -> TensorPart:
    return TensorPart(
        "weight", (elements,), Box((0,), (elements,)), torch.arange(elements, dtype=torch.float32)
    )


def test_memory_is_pinned_for_as_long_as_anybody_views_it(driver: Driver) -> None:
    piece = host_memory(4096, CUDA)
    assert driver.pinned == {piece.data_ptr(): 4096}
    view = piece[64:128].view(torch.float32)
    del piece
    assert sizes(driver) == [4096]
    del view
    assert driver.pinned == {}


@pytest.fixture
def taken(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What was pinned whenever more was asked for."""
    found = list[list[int]]()

    def noted(size: int, _device: torch.device) -> torch.Tensor:
        found.append(sizes(driver))
        return host_memory(size, CUDA)

    for module in (colocation, write):
        monkeypatch.setattr(module, "host_memory", noted)
    return found


def test_a_copy_of_another_size_takes_the_place_of_the_one_before(
    driver: Driver, taken: list[list[int]]
) -> None:
    """Before its first step a learner saves its weights alone."""
    copy = write.HostCopy()
    for elements in (16, 64, 64, 32):
        [kept] = copy.of([part(elements)], CUDA)
        assert torch.equal(kept.data, part(elements).data)
        assert sizes(driver) == [4 * elements]
        del kept
    assert taken == [[], [], []], "two were pinned at once"
    del copy
    assert driver.pinned == {}


def test_a_storage_that_has_grown_is_copied_into_one_piece(driver: Driver, taken: list[list[int]]) -> None:
    memory, storage = colocation._HostMemory(), torch.zeros(1024, dtype=torch.uint8).untyped_storage()
    for size in (1024, 4096, 4096, 2048):
        storage.resize_(size)
        memory.copy(storage)
        assert sizes(driver) == [size]
    assert taken == [[], [], []], "two were pinned at once"
