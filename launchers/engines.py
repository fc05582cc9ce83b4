"""The vLLM servers of one node, kept up.

    python -m launchers.engines RUN FIRST_PORT SERVERS

srun starts this once on each node that holds nothing but servers, or (where they share the trainer's GPUs) on
each but the first, whose servers are the trainer's own. A server that ends, or that the trainer's fleet wants ended, is
started again on its port, and the fleet, which knows the ports, brings it to the current weights. One that ends at
once, time after time, is given up alone.

The trainer decides when the job ends: the batch script takes the end of any step for the job's, and kills the others.
So this process stays, without servers if need be, until the job is over.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from spell_megatron.base.ownership import private
from spell_megatron.base.rendezvous import is_loopback, own_address
from spell_megatron.base.secret import read_secret
from spell_megatron.base.terminal import log_to_stderr
from spell_megatron.config import Config, ServersConfig, load_config
from spell_megatron.rollout import backend
from spell_megatron.rollout.keeping import Keeping
from spell_megatron.rollout.server import Launch, Server
from spell_megatron.run.preemption import attempt
from spell_megatron.run.record.folder import RunFolder
from spell_megatron.types import SpellError
from spell_megatron.weights.known import known_folder
from spell_megatron.weights.locate import model_folder

_log = logging.getLogger(__name__)
_POLL_SECONDS = 2.0
_QUICK_SECONDS = 60.0
"""A server that ends sooner has not served: that counts as a failed start."""


@dataclass(slots=True)
class _Kept:
    """One server and its history."""

    launch: Launch
    port: int
    secret: str = field(repr=False)
    keeping: Keeping
    server: Server
    started: float
    failed_starts: int = 0
    ended: float | None = None
    """When it was first seen to have ended."""

    @classmethod
    def start(cls, launch: Launch, port: int, secret: str, keeping: Keeping) -> _Kept:
        return cls(launch, port, secret, keeping, Server.start(launch, port, secret), time.monotonic())

    def mend(self, has_room: Callable[[], bool]) -> bool:
        """Start an ended server again as soon as there is room; False where it ends at once, time after time, or where
        the trainer has given it up, and would not put it to sleep any more."""
        if self.keeping.given_up:
            self.server.stop()
            return False
        asked = self.keeping.asked_to_end
        if asked:
            _log.warning("the trainer wants the server on port %d to end", self.port)
            self.server.stop()
            self.keeping.ended()
        elif self.ended is None and self.server.running():
            return True
        if self.ended is None:
            self.ended = time.monotonic()
            quick = not asked and self.ended - self.started < _QUICK_SECONDS
            self.failed_starts = self.failed_starts + 1 if quick else 0
        if not has_room():
            return True
        _log.warning("the server on port %d has ended; %s", self.port, self.server.tail())
        self.server.stop()
        if self.failed_starts > self.launch.settings.servers.max_restarts:
            return False
        try:
            self.server, self.started = Server.start(self.launch, self.port, self.secret), time.monotonic()
        except (OSError, SpellError) as error:
            _log.warning("no server starts on port %d: %s", self.port, error)
            self.failed_starts += 1
        else:
            self.ended = None
        return True


def launches(run: Path, settings: Config, count: int) -> list[Launch]:
    """The servers of this node, each with its share of the GPUs, listening under the node's own name."""
    rollout, host = settings.rollout, socket.gethostname()
    servers: ServersConfig = replace(rollout.servers, host=_reached(host))
    found = backend.here(settings)
    seats = found.servers(found.engines[-1].node)  # every node that is served like this has the same
    scratch = RunFolder(run).engine_cache / host
    served = run / "engine" / host / "model"  # of this run alone
    model = known_folder(model_folder(settings.model.path), served, settings.model.families)
    return [
        Launch(
            model,
            replace(rollout, servers=servers),
            scratch=scratch,
            log=run / "logs" / f"engine-{host}-{slot}.log",
            transfer=found.transfer,
            devices=seat.gpus,
            sleeps=found.colocated,
            tells_experts=settings.policy.router_replay,
        )
        for slot, seat in enumerate(seats[:count])
    ]


def _reached(host: str) -> str:
    """Where servers listen: under the node's own name, or, where that stands for 127.0.1.1 in its /etc/hosts, at the
    address that faces the trainer."""
    with suppress(OSError):
        if is_loopback(host):
            return own_address(os.environ.get("MASTER_ADDR", host))
    return host


def _room(run: Path, settings: Config) -> Callable[[], bool]:
    """Whether a server may start: where the trainer uses the same GPUs, it is built and not in their memory."""
    if not backend.here(settings).colocated:
        return lambda: True
    return RunFolder(run).vacated(attempt()).exists


def serve(run: Path, first_port: int, count: int) -> None:
    """Keep the servers up until this process is told to end, and stay until it is told so again."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # that is for the trainer, and so are its ends
    signal.signal(signal.SIGTERM, _end)
    kept: list[_Kept] = []
    try:
        secret = read_secret(RunFolder(run).secret)
        settings = load_config(str(RunFolder.open(run).config))
        with private(settings.record.group_readable):
            has_room = _room(run, settings)
            while not has_room():
                time.sleep(_POLL_SECONDS)
            for slot, launch in enumerate(launches(run, settings, count)):
                port = first_port + slot
                keeping = Keeping(run, attempt(), f"http://{_named()}:{port}")
                kept.append(_Kept.start(launch, port, secret, keeping))
            while True:
                for server in [server for server in kept if not _mended(server, has_room)]:
                    _log.error("the server on port %d is given up", server.port)
                    kept.remove(server)
                time.sleep(_POLL_SECONDS)
    except _Ended:
        for server in kept:
            server.server.stop()
        kept.clear()
        signal.pause()
    finally:
        for server in kept:
            server.server.stop()


def _mended(server: _Kept, has_room: Callable[[], bool]) -> bool:
    """Whether a server is kept. A file system that fails for a while ends neither it nor the others."""
    try:
        if server.mend(has_room):
            return True
        server.keeping.give_up()
        return False
    except OSError as error:
        _log.warning("the server on port %d is looked after later: %s", server.port, error)
        return True


def _named() -> str:
    """This node, as the batch script names it to the trainer."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class _Ended(BaseException):
    """SLURM ends the job, or preempts it. The trainer has been told the same, and may have an update to finish."""


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one means it
    raise _Ended


if __name__ == "__main__":
    log_to_stderr(logging.INFO)
    serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
