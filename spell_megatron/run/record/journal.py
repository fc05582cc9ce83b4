"""The step's finished episodes, written down the moment they finish.

What is in the journal is never generated twice: a resumed step reads it and goes on from there. Not so where the
configuration has changed what would be sampled: a step that starved on dull questions is to be asked anew.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from spell_megatron.config import Config, SelfPlayConfig
from spell_megatron.run.record.folder import JsonLines, RunFolder, read_lines, writing
from spell_megatron.selfplay.episode import Episode

_log = logging.getLogger(__name__)


class Journal:
    """Episodes of one step, one JSON object a line. Raises SpellError where it cannot be written."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        self.path = folder.rollouts(step)
        self._lines = JsonLines(self.path)

    def append(self, episode: Episode) -> None:
        """Survives the end of this process; `sync` makes it survive the machine's."""
        self._lines.append(episode.to_dict())

    def read(self) -> list[Episode]:
        """Episodes in the order of their completion; one that was cut short is dropped with a warning."""
        return [Episode.from_dict(row) for row in read_lines(self.path)]

    def sync(self) -> None:
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


def same_episodes(one: Config, other: Config) -> bool:
    """Whether two configurations sample the same episodes, however many of them they ask for and use."""
    return _shape(one) == _shape(other)


def forget_episodes(folder: RunFolder, after: int) -> None:
    """Remove the journals of the steps that are yet to be made."""
    for step in folder.recorded_steps:
        if step > after:
            _log.info("the episodes of step %d belong to another configuration and are asked for again", step)
            with writing(folder.rollouts(step)):
                folder.rollouts(step).unlink()


def _shape(config: Config) -> tuple[object, ...]:
    """What an episode depends on; of self-play all but what is done around the episodes."""
    around = {name: getattr(_DEFAULT, name) for name in _AROUND}
    play = replace(config.selfplay, **around)
    return config.seed, config.model, config.corpus, play, config.rollout.max_model_len


_DEFAULT = SelfPlayConfig()
_AROUND = (
    *("questions", "round_questions", "max_rounds", "whole_rounds"),
    *("concurrency", "max_staleness", "leftovers"),
    *("memory_range", "failure_ratio", "train_questioner", "train_verifier"),
    *("verifier_consistency", "verifier_agreement", "verifier_share"),
)
