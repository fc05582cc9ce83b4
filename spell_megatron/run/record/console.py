"""What a run looks like in a terminal: a live bar inside the step, one readable line after it.

Where the output goes elsewhere, to a file or a job's log, the bar is a line a minute: steps of large models take long.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from rich.live import Live as Screen
from rich.text import Text

from spell_megatron.base.pulse import Pulse, clock
from spell_megatron.base.terminal import Terminal
from spell_megatron.selfplay.roles import ROLES

PHASES = ("play", "update", "resync", "measure", "record")
_BAR = 20
"""Characters of the bar."""


class Live(Protocol):
    """What the loop tells whoever watches. Counts are those of the step so far."""

    def begin(self, step: int, needed: int) -> None:
        """A step begins; its batch needs `needed` kept questions."""
        ...

    def phase(self, name: str) -> None:
        """One of play, update, resync, measure, record begins."""
        ...

    def progress(self, *, kept: int, asked: int, rollouts: int, tokens: int) -> None: ...

    def done(self, step: int, metrics: Mapping[str, float]) -> None:
        """The step is over."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        ...


class Console:
    """Live for people: in a terminal a bar that moves, elsewhere plain lines now and then.

    A context manager: the bar is gone when it ends, also after an error.
    """

    def __init__(self, total: int, terminal: Terminal | None = None) -> None:
        self.terminal = terminal or Terminal(stderr=True)
        self._total = total
        self._step = self._needed = self._kept = self._asked = self._rollouts = self._tokens = 0
        self._phase = ""
        self._began = self._phase_began = time.monotonic()
        self._seconds: list[float] = []
        self._pulse = Pulse(self._standing, self.terminal)
        self._screen = Screen(
            console=self.terminal,
            get_renderable=self._bar,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )

    def __enter__(self) -> Console:
        if self.terminal.is_terminal:
            self._screen.start()
        self._pulse.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._screen.stop()
        self._pulse.__exit__()

    def begin(self, step: int, needed: int) -> None:
        self._step, self._needed = step, needed
        self._kept = self._asked = self._rollouts = self._tokens = 0
        self._began = time.monotonic()
        self.phase("play")

    def phase(self, name: str) -> None:
        self._phase, self._phase_began = name, time.monotonic()

    def progress(self, *, kept: int, asked: int, rollouts: int, tokens: int) -> None:
        self._kept, self._asked, self._rollouts, self._tokens = kept, asked, rollouts, tokens

    def done(self, step: int, metrics: Mapping[str, float]) -> None:
        self._seconds = [*self._seconds[-9:], time.monotonic() - self._began]
        self._phase = ""
        self.terminal.note(step_line(step, self._total, metrics))

    def note(self, text: str) -> None:
        self.terminal.note(text)

    def _standing(self) -> Text:
        return self._bar() or Text(f"{clock(time.monotonic() - self._began)} since the last step")

    def _bar(self) -> Text:
        if not self._phase:
            return Text()
        seconds = time.monotonic() - self._phase_began
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"step {self._step}/{self._total}" if self._step else "before step 1", "bold")
        line.append(f"  {self._phase} {clock(seconds)}", "cyan")
        if self._phase == "play":
            full = round(_BAR * min(1.0, self._kept / max(1, self._needed)))
            line.append("  " + "━" * full, "cyan").append("━" * (_BAR - full), "bright_black")
            line.append(f"  {self._kept}/{self._needed} kept")
        if (left := self._left(seconds)) is not None:
            line.append(f"  {left}", "dim")
        if self._phase == "play":
            speed = _short(self._tokens / max(seconds, 1.0))
            line.append(f"  {speed} tokens/s, {self._asked:,} asked, {self._rollouts:,} rollouts", "dim")
        return line

    def _left(self, seconds: float) -> str | None:
        """How long the run may last, by its last steps; before there are any, the play by its kept questions."""
        if self._seconds and self._step:
            mean = sum(self._seconds) / len(self._seconds)
            left = mean * (self._total - self._step + 1) - (time.monotonic() - self._began)
            return f"{clock(max(0.0, left))} left"
        if self._phase == "play" and self._kept:
            left = seconds * (self._needed - self._kept) / self._kept
            return f"{clock(max(0.0, left))} left of this play"
        return None


def step_line(step: int, total: int, metrics: Mapping[str, float]) -> Text:
    """One line about a step; figures that were not measured are left out."""
    width = len(str(total))
    line = Text.assemble((f"step {step:>{width}}/{total}", "bold"))

    def add(name: str, value: str, style: str = "") -> None:
        line.append("  ")
        line.append(f"{name} ", style="dim")
        line.append(value, style=style)

    if any(f"{role}/reward" in metrics for role in ROLES):
        rewards = " ".join(
            f"{role[0]} {metrics[f'{role}/reward']:.2f}" for role in ROLES if f"{role}/reward" in metrics
        )
        add("reward", rewards, "bold")
    if "outcome/kept" in metrics and "questions" in metrics:
        add("kept", f"{metrics['outcome/kept']:.0f}/{metrics['questions']:.0f}")
    if "questioner/format_errors" in metrics:
        add("valid", f"{1 - metrics['questioner/format_errors']:.0%}")
    if "verifier/rule_agreement" in metrics:
        add("verifier", f"{metrics['verifier/rule_agreement']:.0%}")
    if "mismatch/mean" in metrics:
        add("mismatch", f"{metrics['mismatch/mean']:.1e}")
    if "heldout/mean" in metrics:
        add("held-out", f"{metrics['heldout/mean']:.3f}", "bold green")
    phases = [f"{name} {metrics[f'time/{name}']:.1f}" for name in PHASES if f"time/{name}" in metrics]
    if phases:
        add("seconds", " ".join(phases))
    return line


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
