"""Ranks meet on one interface, and nobody without their secret is among them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from spell_megatron.base import rendezvous
from spell_megatron.base.rendezvous import (
    LOOPBACK,
    Gloo,
    RendezvousError,
    Sealed,
    connect,
    listening,
    meet,
    serve,
)

pytestmark = pytest.mark.unit

SECONDS = 60.0
OURS, THEIRS = "our secret", "another run's secret"


def heard_at(port: int) -> set[str]:
    """Addresses on which this process listens at a port."""
    return {
        found.laddr.ip
        for found in psutil.Process().net_connections("inet")
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port
    }


def both(*ranks: Callable[[], Any]) -> list[Any]:
    """What ranks at the same time returned, or raised."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        running = [pool.submit(rank) for rank in ranks]
        return [one.exception() or one.result() for one in running]


@pytest.fixture
def store() -> dist.TCPStore:
    return serve(listening(LOOPBACK), SECONDS)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Where torchrun's variables say that rank 0 is."""
    with listening(LOOPBACK) as free:
        number = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", LOOPBACK)
    monkeypatch.setenv("MASTER_PORT", str(number))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return number


def test_a_store_listens_on_one_address(store: dist.TCPStore, port: int) -> None:
    assert heard_at(store.port) == {LOOPBACK}
    one, two = both(lambda: meet(0, 2, "", SECONDS), lambda: meet(1, 2, "", SECONDS))
    one.set("a", "1")
    assert two.get("a") == b"1"
    assert heard_at(port) == {LOOPBACK}
    alone = meet(0, 1, "", SECONDS)
    assert isinstance(alone, dist.TCPStore) and heard_at(alone.port) == {LOOPBACK}


def test_a_port_that_another_job_has_is_said_to_be() -> None:
    with (
        listening(LOOPBACK) as taken,
        pytest.raises(RendezvousError, match=r"cannot listen.*in use.*another job"),
    ):
        listening(LOOPBACK, taken.getsockname()[1])
    with pytest.raises(RendezvousError, match=r"cannot listen on 192\.0\.2\.1"):
        listening("192.0.2.1")


def test_what_a_stranger_writes_is_not_believed(store: dist.TCPStore) -> None:
    sealed, stranger = Sealed(store, b"key"), connect(LOOPBACK, store.port, SECONDS)
    sealed.set("rank 0", b"my address")
    assert Sealed(stranger, b"key").get("rank 0") == b"my address"
    stranger.set("rank 1", stranger.get("rank 0"))  # sealed, as another name
    stranger.set("rank 2", b"his address")
    Sealed(stranger, b"no key").set("rank 3", b"his address")
    for name in ("rank 1", "rank 2", "rank 3"):
        with pytest.raises(RendezvousError, match="does not know the key"):
            sealed.get(name)


@pytest.mark.parametrize("key", [b"key", b"no key"])
def test_a_rank_that_does_not_know_the_key_is_found_out(store: dist.TCPStore, key: bytes) -> None:
    def join(rank: int, key: bytes) -> Any:
        group = Gloo(connect(LOOPBACK, store.port, SECONDS), rank, 2, address=LOOPBACK, seconds=SECONDS)
        rendezvous.prove(group, key)
        return group

    found = both(lambda: join(0, b"key"), lambda: join(1, key))
    if key == b"key":
        assert [group.size() for group in found] == [2, 2]
    else:
        assert "rank 1 of 2 does not know the secret" in str(found[0])
        assert "rank 0 of 2 does not know the secret" in str(found[1])


def test_two_runs_at_one_port_do_not_cross(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = both(lambda: meet(0, 2, OURS, SECONDS), lambda: meet(1, 2, OURS, SECONDS))
    with pytest.raises(RendezvousError, match="another job has the port"):
        meet(0, 2, THEIRS, SECONDS)
    monkeypatch.setattr(rendezvous, "_HERE_SECONDS", 0.5)
    with pytest.raises(RendezvousError, match=rf"rank 0 of this run is not at {LOOPBACK}:{port}"):
        meet(1, 2, THEIRS, SECONDS)
    ours[1].set("theirs?", "no")
    assert ours[0].get("theirs?") == b"no"
    assert not connect(LOOPBACK, port, SECONDS).check(["theirs?"])


def test_a_stranger_in_a_runs_store_is_neither_rank_0_nor_another(port: int) -> None:
    bare = serve(listening(LOOPBACK, port), SECONDS)
    run = dist.PrefixStore(rendezvous.seal(OURS.encode(), b"the name of the run").hex(), bare)
    run.set("here", "")
    run.set("answer/1", "who reads a store knows its names, and not the secret")
    with pytest.raises(RendezvousError, match="whoever serves the store"):
        meet(1, 2, OURS, SECONDS)
    run.set("greeting/1", b"0" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # rank 0 does not serve it
        with pytest.raises(RendezvousError, match="came as rank 1"):
            meet(0, 2, OURS, SECONDS)


def test_the_address_towards_a_machine_is_one_of_this() -> None:
    assert rendezvous.own_address(LOOPBACK) == LOOPBACK
    assert not rendezvous.own_address(socket.gethostname()).startswith("0.")
