"""The life of an engine server as a pure state machine.

    STARTING ──ready──> SYNCING ──synced to the target──> HEALTHY <──> SUSPECT
        ^                  ^  └────────── new version ────────┘           │
        └──restarted── DEAD <──────── exited, or too many faults ─────────┘

The supervisor reports what happened; the state says what to do next, and only HEALTHY is given requests.
One rule makes stale answers impossible: HEALTHY means that the verified version of this very process is
the target version, and all of its memory awake. Nothing else leads there, least of all a restart.

A server that takes turns with the trainer sleeps (ASLEEP) while that has the memory. With its weights awake and its
cache asleep it can be given new weights (SYNCING), and nothing else; so it sleeps on afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from spell_megatron.rollout.engine import Memory


class State(Enum):
    STARTING = "starting"
    """The process exists and does not answer yet."""
    SYNCING = "syncing"
    """It answers, and must receive the target version."""
    HEALTHY = "healthy"
    """It holds the target version, verified: the only state that is given requests."""
    SUSPECT = "suspect"
    """It was healthy and did not answer; it gets probes, no requests."""
    ASLEEP = "asleep"
    """Memory of it is the trainer's: no requests and no probes. One that cannot be woken is restarted."""
    DEAD = "dead"
    """It is gone, or must be killed; a new process takes its place."""
    LOST = "lost"
    """It was restarted too often without ever becoming healthy, or is given up by who keeps it."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The new process answers."""


@dataclass(frozen=True, slots=True)
class Synced:
    """A transfer of `version` ended, and the engine says that it holds it."""

    version: int


@dataclass(frozen=True, slots=True)
class SyncFailed:
    """A transfer ended half way: the weights are of no version."""


@dataclass(frozen=True, slots=True)
class Answered:
    """It answered a probe."""


@dataclass(frozen=True, slots=True)
class Failed:
    """It did not answer a probe or a request, or with an error."""


@dataclass(frozen=True, slots=True)
class NewVersion:
    """The policy has new weights."""

    version: int


@dataclass(frozen=True, slots=True)
class Slept:
    """It gave its memory back."""

    kept: bool
    """Whether its weights come back with the memory."""


@dataclass(frozen=True, slots=True)
class Woke:
    """It has a part of its memory again."""

    memory: Memory


@dataclass(frozen=True, slots=True)
class Evicted:
    """It was on its way, and had to make room for the trainer: no fault of its own."""


@dataclass(frozen=True, slots=True)
class Exited:
    """The process ended, or was found unfit to live."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Who keeps it up will not start it again."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """A new process is about to take its place."""


Event = (
    Ready
    | Synced
    | SyncFailed
    | Answered
    | Failed
    | NewVersion
    | Slept
    | Woke
    | Evicted
    | Exited
    | GivenUp
    | Restarted
)
_ALL: frozenset[Memory] = frozenset({"weights", "cache"})


@dataclass(frozen=True, slots=True)
class Limits:
    failures: int = 3
    """Faults in a row that make a server dead."""
    restarts: int = 5
    """Restarts in a row, none of them ending healthy, before it is lost."""


@dataclass(frozen=True, slots=True)
class Health:
    target: int
    """The version that requests must be answered with."""
    state: State = State.STARTING
    held: int | None = None
    """The version that this process verifiably holds."""
    asleep: frozenset[Memory] = frozenset()
    """What of its memory is not there."""
    blank: bool = False
    """Its weights were given up, and none came since."""
    failures: int = 0
    restarts: int = 0

    @property
    def serves(self) -> bool:
        return self.state is State.HEALTHY

    @property
    def receives(self) -> bool:
        """Whether it can be given weights, and needs some."""
        return self.state is State.SYNCING and "weights" not in self.asleep


def after(health: Health, event: Event, limits: Limits) -> Health:
    """The state that follows. Events that come too late for a state leave it as it is."""
    match event, health.state:
        case NewVersion(version), state:
            if version < health.target:
                raise ValueError(f"the target version goes back from {health.target} to {version}")
            idle = state is State.HEALTHY or (state is State.ASLEEP and "weights" not in health.asleep)
            new = State.SYNCING if idle and version != health.held else state
            return replace(health, target=version, state=new)
        case _, State.LOST:
            return health
        case Evicted(), State.STARTING:
            return replace(_dead(health), restarts=max(0, health.restarts - 1))
        case Exited(), _:
            return _dead(health)
        case GivenUp(), _:
            return replace(_dead(health), state=State.LOST)
        case Restarted(), State.DEAD if health.restarts >= limits.restarts:
            return replace(health, state=State.LOST)
        case Restarted(), State.DEAD:
            return replace(health, state=State.STARTING, restarts=health.restarts + 1)
        case Slept(kept), State.HEALTHY | State.SUSPECT | State.SYNCING | State.ASLEEP:
            held, blank = (health.held, health.blank) if kept else (None, True)
            return replace(health, state=State.ASLEEP, held=held, blank=blank, asleep=_ALL, failures=0)
        case Woke(memory), State.ASLEEP | State.SYNCING if memory in health.asleep:
            asleep = health.asleep - {memory}
            current = health.held == health.target
            awake = health.state if asleep else State.HEALTHY if current else State.SYNCING
            return replace(health, state=awake, asleep=asleep)
        case Ready(), State.STARTING:
            return replace(health, state=State.SYNCING)
        case Synced(version), State.SYNCING if version == health.target:
            rest = State.ASLEEP if health.asleep else State.HEALTHY
            return replace(health, state=rest, held=version, blank=False, failures=0, restarts=0)
        case Synced(version), State.SYNCING:  # the policy moved on meanwhile
            return replace(health, held=version, blank=False)
        case SyncFailed(), State.SYNCING:
            return _faulted(replace(health, held=None), State.SYNCING, limits)
        case Answered(), State.SUSPECT:
            back = State.HEALTHY if health.held == health.target else State.SYNCING
            return replace(health, state=back, failures=0)
        case Answered(), State.HEALTHY:
            return replace(health, failures=0)
        case Failed(), State.HEALTHY | State.SUSPECT:
            return _faulted(health, State.SUSPECT, limits)
        case Failed(), State.SYNCING:
            return _faulted(health, State.SYNCING, limits)
    return health


def _faulted(health: Health, state: State, limits: Limits) -> Health:
    failures = health.failures + 1
    if failures >= limits.failures:
        return _dead(health)
    return replace(health, state=state, failures=failures)


def _dead(health: Health) -> Health:
    return replace(health, state=State.DEAD, held=None, asleep=frozenset(), blank=False, failures=0)
