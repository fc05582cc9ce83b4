"""Where processes of a run meet: on one interface, and among those alone that know its secret.

torch and gloo exchange their addresses in a TCPStore. By itself it listens on every interface and believes whoever
connects, and gloo takes who dials first for the rank that it waits for. So a store listens on a socket that was bound
before (`serve`), what stands in it is sealed (`Sealed`) or its ends greet each other first (`meet`), and the ranks of
a group prove over its own connections that they know the key (`prove`) before anything else goes over them.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections.abc import Sequence
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import torch
import torch.distributed as dist

from spell_megatron.base.secret import DIGEST_BYTES, PORT_PIPE, RANKS_SECRET, seal, sealed
from spell_megatron.types import SpellError

_log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
_PORT_BYTES = 2
_NONCE_BYTES = 32
_HERE_SECONDS = 120.0
"""The store is rank 0's, as a rule: once it is there, so is rank 0."""
_JOIN_SECONDS = 300.0
"""Ranks of one job start so far apart, however little time a collective is given."""


class RendezvousError(SpellError):
    """Ranks of a run could not meet, or somebody else was there."""


def listening(host: str, port: int = 0) -> socket.socket:
    """A socket that listens on one address of this machine; on a free port where none is given.

    Raises RendezvousError where the port is taken, or the address is none of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as error:
        raise RendezvousError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; where another job has the port, start again"
            " (MASTER_PORT of a job follows from its number)"
        ) from None


def serve(bound: socket.socket, seconds: float) -> dist.TCPStore:
    """A store on a socket of `listening`, which it takes over."""
    host, port = bound.getsockname()[:2]
    # libuv's server and the plain one differ in whether they take a socket of IPv6; a run's store is small.
    return _store(host, port, seconds, is_master=True, master_listen_fd=bound.detach(), use_libuv=False)


def connect(host: str, port: int, seconds: float) -> dist.TCPStore:
    """A store that another process serves. Waits for it."""
    return _store(host, port, seconds, is_master=False)


def own_address(host: str) -> str:
    """The address of this machine that packets to `host` bear: the one interface between the two. None is sent."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


class Sealed(dist.Store):
    """A store whose values are believed where they bear the seal of the key. Names are part of it."""

    def __init__(self, store: dist.Store, key: bytes) -> None:
        super().__init__()
        self._store, self._key = store, key

    def set(self, name: str, value: str | bytes) -> None:
        given = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(name, seal(self._key, name.encode(), given) + given)  # type: ignore[arg-type]

    def get(self, name: str) -> bytes:
        found = bytes(self._store.get(name))
        value = found[DIGEST_BYTES:]
        if not sealed(found[:DIGEST_BYTES], self._key, name.encode(), value):
            raise RendezvousError(f"the store's {name} was written by somebody who does not know the key")
        return value

    def wait(self, names: list[str], *timeout: Any) -> None:
        self._store.wait(names, *timeout)


class Gloo(dist.ProcessGroupGloo):
    """A group of gloo's that listens on one address of this machine."""

    def __init__(self, store: dist.Store, rank: int, size: int, *, address: str, seconds: float) -> None:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=seconds)
        super().__init__(store, rank, size, options)
        self._kept = store  # torch's side of a store in Python does not keep that alive


def prove(group: dist.ProcessGroup | dist.ProcessGroupGloo, key: bytes) -> None:
    """Have all ranks of a group prove to each other that they know the key, or raise RendezvousError."""
    rank, size = group.rank(), group.size()
    nonces = _gathered(group, size, os.urandom(_NONCE_BYTES))
    proofs = _gathered(group, size, seal(key, str(rank).encode(), *nonces))
    for other, proof in enumerate(proofs):
        if not sealed(proof, key, str(other).encode(), *nonces):
            raise RendezvousError(
                f"rank {other} of {size} does not know the secret of this run: somebody else took its place;"
                " nothing was sent to it"
            )


def join(backend: str, secret: str, seconds: float) -> None:
    """Make the group of all ranks that RANK, WORLD_SIZE and MASTER_PORT tell of, or of this process alone.

    With a `secret`, of their run's or their starter's, all prove that they know it. Raises RendezvousError.
    """
    among_ranks = "RANK" in os.environ and "MASTER_PORT" in os.environ
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if among_ranks else (0, 1)
    starters = os.environ.pop(RANKS_SECRET, "")
    secret = secret or starters
    if all_here(size):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens where others can come
    store = meet(rank, size, secret, seconds)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
    )
    if secret and size > 1:
        prove(dist.distributed_c10d._get_default_group(), secret.encode())


def meet(rank: int, size: int, secret: str, seconds: float) -> dist.Store:
    """The store of a run's ranks, served by rank 0 at MASTER_ADDR and MASTER_PORT, or where the pipe of a starter says.

    With a `secret` nothing of another run's ranks is seen in it. Raises RendezvousError where rank 0 cannot serve it,
    or is not found in it.
    """
    if size == 1:
        return serve(listening(LOOPBACK), seconds)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    seconds = max(seconds, _JOIN_SECONDS)
    pipe = os.environ.pop(PORT_PIPE, "")
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        bound = listening(_interface(host, size), port)
        port = bound.getsockname()[1]
        if pipe:
            os.write(int(pipe), port.to_bytes(_PORT_BYTES, "big") * (size - 1))
        store: dist.Store = serve(bound, seconds)
    else:
        port = _told(int(pipe), seconds) if pipe else port
        store = connect(host, port, seconds)
    os.environ["MASTER_PORT"] = str(port)
    key = secret.encode()
    store = dist.PrefixStore(seal(key, b"the name of the run").hex(), store)
    _greet(store, rank, size, key, f"{host}:{port}")
    return store


def all_here(size: int) -> bool:
    """Whether all ranks are on this machine, as whoever started them says."""
    return size == int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _store(host: str, port: int, seconds: float, **arguments: Any) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            host, port, timeout=timedelta(seconds=seconds), wait_for_workers=False, **arguments
        )
    except (dist.DistError, RuntimeError) as error:
        raise RendezvousError(f"no store at {host}:{port}: {str(error).splitlines()[0]}") from None


def _told(pipe: int, seconds: float) -> int:
    """The port of rank 0's store, once that listens."""
    told = os.read(pipe, _PORT_BYTES) if select.select([pipe], [], [], seconds)[0] else b""
    if not told:
        raise RendezvousError("rank 0 of this run ended, or did not come, before the ranks met")
    return int.from_bytes(told, "big")


def is_loopback(host: str) -> bool:
    """Whether a name stands for an address where no other machine can come."""
    return ip_address(_address(host).partition("%")[0]).is_loopback


def _address(host: str) -> str:
    return str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0])


def _interface(host: str, size: int) -> str:
    """The address to listen on for ranks that look for `host`."""
    found = _address(host)
    named = host not in (found, "localhost")
    if named and is_loopback(host) and not all_here(size):
        _log.warning(
            "%s stands for %s on this node (/etc/hosts), where others cannot come: the ranks' store listens on all"
            " interfaces",
            host,
            found,
        )
        return "0.0.0.0"
    return host


def _greet(store: dist.Store, rank: int, size: int, key: bytes, where: str) -> None:
    """Have rank 0 and the others prove to each other that they are of one run. Ends when all are there."""
    if rank:
        nonce = os.urandom(_NONCE_BYTES)
        store.set(f"greeting/{rank}", nonce + seal(key, b"rank", str(rank).encode(), nonce))  # type: ignore[arg-type]
        try:
            store.wait(["here"], timedelta(seconds=_HERE_SECONDS))
        except (dist.DistError, RuntimeError):
            raise RendezvousError(
                f"rank 0 of this run is not at {where}: another run's may be, by the same port; start again, or set"
                " another MASTER_PORT"
            ) from None
        if not sealed(bytes(store.get(f"answer/{rank}")), key, b"rank 0", nonce):
            raise RendezvousError(f"whoever serves the store at {where} does not know the secret of this run")
        return
    store.set("here", "")
    answers = {}
    for other in range(1, size):
        given = bytes(store.get(f"greeting/{other}"))
        nonce, proof = given[:_NONCE_BYTES], given[_NONCE_BYTES:]
        if not sealed(proof, key, b"rank", str(other).encode(), nonce):
            raise RendezvousError(
                f"somebody who does not know the secret of this run came as rank {other} to {where}"
            )
        answers[f"answer/{other}"] = seal(key, b"rank 0", nonce)
    for name, answer in answers.items():
        store.set(name, answer)  # type: ignore[arg-type]


def _gathered(group: Any, size: int, own: bytes) -> Sequence[bytes]:
    """Every rank's bytes, as many of each."""
    given = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    found = [torch.empty_like(given) for _ in range(size)]
    group.allgather([found], [given]).wait()
    return [bytes(one.numpy()) for one in found]
