"""One vLLM server as a process: its command line, its log, its end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from spell_megatron.base.interpreter import environment, python
from spell_megatron.base.ownership import make_own
from spell_megatron.base.secret import new_secret
from spell_megatron.base.topology import visible
from spell_megatron.config import RolloutConfig
from spell_megatron.rollout import backend, dialect, door, guard, private_folder
from spell_megatron.rollout.address import Address
from spell_megatron.rollout.engine import EngineError

_LOG_LINES, _LOG_BYTES = 15, 64 << 10
"""Characters of the end of a log in a message."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server. The same launch may be started again and again."""

    model: Path
    settings: RolloutConfig
    scratch: Path
    """vLLM's caches, which it loads and executes: this user's alone."""
    log: Path
    """Standard output and error, appended to."""
    transfer: str | None = None
    """The weight-transfer backend; None for a server that keeps its weights."""
    tokenizer: bool = False
    """Whether it can turn text into tokens and back."""
    devices: tuple[int, ...] = ()
    """GPUs, by their number among those that this process may use; all where empty."""
    threads: int | None = None
    """CPU threads; vLLM's choice where None."""
    sleeps: bool = False
    """Whether it can give its memory back for a while."""
    tells_experts: bool = False
    """Whether completions come with the experts that made them."""

    def command(self, where: Mapping[str, Any]) -> list[str]:
        """`where` it listens, in vLLM's arguments."""
        arguments: dict[str, Any] = {
            **dialect.engine_arguments(
                self.settings, backend.current(), sleeps=self.sleeps, tells_experts=self.tells_experts
            ),
            **dialect.server_arguments(
                *(self.settings, self.model),
                door=f"{door.__name__}.{door.Door.__name__}",
                tokenizer=self.tokenizer,
                transfer=self.transfer,
            ),
            **where,
        }
        return python(backend.current().server, *_flags(arguments))

    def environment(self, sockets: str, secret: str) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in environment().items()
            if not name.startswith(dialect.PREFIX) and name not in dialect.TRAINERS
        }
        ours = dialect.server_environment(backend.current(), self.scratch, sockets, self.transfer)
        variables = {
            **inherited,
            **dialect.passed_variables(self.settings, ours),
            **ours,
            door.VARIABLE: secret,
        }
        if self.devices:
            variables["CUDA_VISIBLE_DEVICES"] = visible(self.devices, inherited.get("CUDA_VISIBLE_DEVICES"))
        if self.threads is not None:
            variables["OMP_NUM_THREADS"] = str(self.threads)
        return variables


@dataclass(slots=True)
class Server:
    """A server that was started. It ends with `stop`, and with this process, whichever comes first."""

    address: Address
    group: int
    """Process group of the server and all its workers."""
    log: Path
    _guard: subprocess.Popen[bytes] = field(repr=False)
    _sockets: Path = field(repr=False)

    @classmethod
    def start(cls, launch: Launch, port: int = 0, secret: str = "") -> Server:
        """Start it on a Unix socket, or on a port of `servers.host` for clients elsewhere. Without a `secret` it gets
        one of its own. Raises SpellError where others can write to its caches."""
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        make_own(launch.scratch)
        secret = secret or new_secret()
        with private_folder.make() as (sockets, lock), launch.log.open("ab") as log:
            if port:
                host = launch.settings.servers.host
                where: dict[str, Any] = {"host": host, "port": port}
                address = Address(f"http://{host}:{port}", secret=secret)
            else:
                where = {"uds": str(sockets / "http")}
                address = Address("http://engine", where["uds"], secret)
            process = subprocess.Popen(
                python(guard.__name__, *launch.command(where)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=launch.environment(str(sockets), secret),
                start_new_session=True,
                pass_fds=(lock,),  # the guard's, for as long as it lives
            )
        assert process.stdout is not None
        group = int(process.stdout.readline() or 0)
        return cls(address, group, launch.log, process, sockets)

    def running(self) -> bool:
        return self._guard.poll() is None

    def stop(self) -> None:
        """End the whole family; returns when it has ended. Idempotent."""
        for pipe in (self._guard.stdin, self._guard.stdout):
            if pipe is not None:
                pipe.close()
        self._guard.wait()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def tail(self) -> str:
        """The end of the log, for an error message."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
                lines = log.read(_LOG_BYTES).decode("utf-8", "replace").strip().splitlines()
        except OSError as error:
            return f"its log {self.log} cannot be read: {error}"
        return f"the end of {self.log}:\n" + "\n".join(lines[-_LOG_LINES:])


@contextmanager
def serve(model: Path, settings: RolloutConfig, scratch: Path, *, log: Path) -> Iterator[Address]:
    """A server with its own tokenizer, for as long as the block runs; yields its address once it answers.

    Raises EngineError where it ends, or stays silent for `settings.servers.start_seconds`.
    """
    server = Server.start(Launch(model, settings, scratch, log, tokenizer=True))
    deadline = time.monotonic() + settings.servers.start_seconds
    try:
        with server.address.client(trust_env=False, timeout=5.0) as client:
            while not _answers(client):
                if not server.running():
                    raise EngineError(f"the vLLM server ended before it answered; {server.tail()}")
                if time.monotonic() > deadline:
                    seconds = settings.servers.start_seconds
                    raise EngineError(f"the vLLM server was not ready in {seconds:.0f} s; {server.tail()}")
                time.sleep(0.5)
        yield server.address
    finally:
        server.stop()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get(dialect.Route.HEALTH).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _flags(arguments: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return flags
