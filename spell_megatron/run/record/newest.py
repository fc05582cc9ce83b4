"""The newest episodes of a run, read from its files while it writes them."""

from __future__ import annotations

import json
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path

from spell_megatron.run.record.folder import RunFolder
from spell_megatron.selfplay.episode import Episode, Response
from spell_megatron.types import Rollout, SpellError

KEPT = 200
"""Episodes that are remembered."""
_STEPS = 2
"""Newest steps whose files are read."""


@dataclass(slots=True)
class _Place:
    """How far a step's file was read, and the outcomes met on the way."""

    offset: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Newest:
    """`read` reads on where it stopped: a step's file may be large, and only its new lines are parsed.

    Of the episodes the texts are kept and the tokens dropped, but those that the questioner was given.
    """

    folder: RunFolder
    episodes: deque[Episode] = field(default_factory=lambda: deque(maxlen=KEPT))
    """The oldest first."""
    _places: dict[int, _Place] = field(default_factory=dict)

    def read(self) -> None:
        steps = self.folder.recorded_steps[-_STEPS:]
        for step in self._places.keys() - set(steps):
            del self._places[step]
        for step in steps:
            self._read(step, self.folder.rollouts(step))

    def outcomes(self, step: int) -> Counter[str]:
        """How many episodes of a step have ended so far, by outcome."""
        return self._places.get(step, _Place()).outcomes

    def _read(self, step: int, path: Path) -> None:
        place = self._places.setdefault(step, _Place())
        try:
            if path.stat().st_size < place.offset:  # a resumed run makes the step again
                self._forget(step)
                place = self._places.setdefault(step, _Place())
            with path.open("rb") as file:
                file.seek(place.offset)
                while (line := file.readline()).endswith(b"\n"):
                    place.offset += len(line)
                    self._take(line, place)
        except FileNotFoundError:  # packed away since
            self._forget(step)

    def _take(self, line: bytes, place: _Place) -> None:
        try:
            episode = _texts(Episode.from_dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError, SpellError):
            return
        place.outcomes[episode.outcome] += 1
        self.episodes.append(episode)

    def _forget(self, step: int) -> None:
        self._places.pop(step, None)
        left = [episode for episode in self.episodes if episode.step != step]
        self.episodes.clear()
        self.episodes.extend(left)


def _texts(episode: Episode) -> Episode:
    asked = replace(_bare(episode.asked), prompt=episode.asked.prompt) if episode.asked else None
    turns = tuple(replace(turn, rollout=_bare(turn.rollout)) for turn in episode.turns)
    responses = tuple(map(_said, episode.responses))
    return replace(episode, asked=asked, probe=None, answerability=None, responses=responses, turns=turns)


def _said(response: Response) -> Response:
    judgements = tuple(replace(one, rollout=_bare(one.rollout)) for one in response.judgements)
    return replace(response, rollout=_bare(response.rollout), judgements=judgements)


def _bare(rollout: Rollout) -> Rollout:
    return Rollout((), (), (), rollout.finish, rollout.version)
