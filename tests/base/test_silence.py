"""Whatever lasts is heard from: a command says at least once a minute that it goes on, whatever it is at."""

from __future__ import annotations

import builtins
import io
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from rich.text import Text
from typer.testing import CliRunner

from spell_megatron.base import pulse
from spell_megatron.base.pulse import Pulse, working
from spell_megatron.base.terminal import Terminal
from spell_megatron.tools import cli
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit

ON_ITS_WAY = 1
"""Lines that a thread may be about to print when another one is given the word."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENCE_SECONDS", 0.02)
    monkeypatch.setattr(pulse, "_LOOK_SECONDS", 0.02)
    monkeypatch.delenv("RANK", raising=False)


def to(output: io.StringIO) -> Terminal:
    return Terminal(file=output, force_terminal=False, width=9)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def speakers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "pulse"}


def test_whatever_lasts_says_so_until_it_ends() -> None:
    output = io.StringIO()
    with working("importing [a]", to(output)):
        wait_for(lambda: output.getvalue().count("\n") > 1)
        assert speakers()
    wait_for(lambda: not speakers())
    assert not re.sub(r"importing \[a\] \d+:\d\d\n", "", output.getvalue())


def test_whoever_prints_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENCE_SECONDS", 600.0)
    output = io.StringIO()
    to(io.StringIO()).note("something else")
    with working("short", to(output)):
        time.sleep(0.1)
    assert not output.getvalue()


def test_the_innermost_speaks_and_afterwards_whoever_is_around_it() -> None:
    output = io.StringIO()
    with working("train", to(output)):
        with working("loading", to(output)):
            most = output.getvalue().count("train") + ON_ITS_WAY
            wait_for(lambda: output.getvalue().count("loading") > 3)
            assert output.getvalue().count("train") <= most
        wait_for(lambda: output.getvalue().count("train") > most)
        with Pulse(Text, to(output)):
            most = output.getvalue().count("\n") + ON_ITS_WAY
            time.sleep(0.1)
            assert output.getvalue().count("\n") <= most, "others have the word"


def test_no_signal_is_the_speakers() -> None:
    """A run blocks SIGUSR1 in every thread, and waits for it: in one that does not, it would end the process."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    inside: set[int] = set()
    spoken = threading.Event()

    def standing() -> Text:
        inside.update(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        spoken.set()
        return Text("x")

    with Pulse(standing, to(io.StringIO())):
        assert spoken.wait(20)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP} <= inside


ARGUMENTS = {
    "train": ["toy"],
    "resume": ["run"],
    "eval": ["docmath", "--model", "model"],
    "import-hf": ["model", "out"],
    "export-hf": ["run", "out"],
    "parity": ["model"],
    "corpus": ["texts"],
    "prompts": ["out"],
    "report": ["run"],
    "seed-model": ["out"],
    "plan": ["toy"],
    "launch": ["toy"],
}


@pytest.mark.long
@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_command_is_heard_from_while_it_imports_and_of_many_ranks_one(
    monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    """Torch and vLLM take minutes from a cold file system."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli, "listen", lambda: None)  # signals are this process's own
    load = builtins.__import__
    lines: list[str] = []
    monkeypatch.setattr(cli._err, "note", lambda text, style="": lines.append(str(text)))

    def slow(name: str, found: Any = None, *rest: Any) -> Any:
        if found is None or found.get("__name__") != cli.__name__:
            return load(name, found, *rest)
        if rank == "0":
            wait_for(lambda: len(lines) > 1)
        else:
            time.sleep(0.05)
        raise SpellError("enough")

    for command in {str(command.name) for command in cli.app.registered_commands} - {"watch"}:
        lines.clear()
        with monkeypatch.context() as patched:
            patched.setattr(builtins, "__import__", slow)
            CliRunner().invoke(cli.app, [command, *ARGUMENTS.get(command, [])])
        wait_for(lambda: not speakers())
        lines.remove("error enough")
        told = {re.sub(r" \d+:\d\d$", "", said) for said in lines}
        assert told == ({"evaluate" if command == "eval" else command} if rank == "0" else set())
