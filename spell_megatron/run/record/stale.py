"""What a resumed run may not go on with: episodes and answers of steps that other weights, or other settings, made.

Journals reach further than the last checkpoint. Where the configuration has changed what would be sampled, none holds:
a step that starved on dull questions is to be asked anew. Where it has changed what is learnt, the next step was
sampled by weights that are still there, and those after it by weights that nobody will have again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from spell_megatron.config import Config
from spell_megatron.run.record.folder import RunFolder, writing

_log = logging.getLogger(__name__)
Section = TypeVar("Section", bound=Any)


def forget_stale(folder: RunFolder, step: int, before: Config, now: Config, *, anew: bool = False) -> None:
    """Remove what does not hold any more of the steps after `step`, which the run goes on from; `anew`: by choice, and
    not because it was its last. Raises SpellError where it cannot be removed."""
    if anew or _sampled(before) != _sampled(now):
        _forget_episodes(folder, step)
        _forget_answers(folder, step or -1)  # before the first step it is measured anew
    elif _learnt(before) != _learnt(now):
        _forget_episodes(folder, step + 1)
        _forget_answers(folder, step)


def _forget_episodes(folder: RunFolder, after: int) -> None:
    for step in (step for step in folder.played_steps if step > after):
        _log.info("the episodes of step %d belong to another configuration and are asked for again", step)
        for path in folder.rollout_files(step):
            with writing(path):
                path.unlink(missing_ok=True)


def _forget_answers(folder: RunFolder, after: int) -> None:
    for path in folder.path.glob("eval/step-*"):
        step = path.name.removeprefix("step-")
        if step.isdecimal() and int(step) > after:
            _log.info(
                "the benchmarks after step %d were answered by other weights: they are asked again", int(step)
            )
            with writing(path):
                shutil.rmtree(path)


def _sampled(config: Config) -> tuple[object, ...]:
    """What an episode depends on, however many of them are asked for and used; of self-play all but what is done around
    the episodes. Of the engine what its log-probs depend on: the remedy for such as the learner does not confirm."""
    play, rollout = _but(config.selfplay, _AROUND), config.rollout
    engine = rollout.kind, rollout.dtype, rollout.engine, rollout.max_model_len
    return config.seed, config.model, config.corpus, play, engine


def _learnt(config: Config) -> tuple[object, ...]:
    """What weights become of the same episodes, up to roundings: all of the learner but how it is spread and computed,
    and what leaves groups or whole steps out."""
    policy = _but(config.policy, _COMPUTED)
    optimizer = _but(policy.optimizer, _SHARDED)
    leaves_out = [getattr(config.record, name) for name in _LEAVES_OUT]
    play = _but(config.selfplay, ("concurrency",))
    return replace(policy, optimizer=optimizer), play, leaves_out


def _but(section: Section, names: Iterable[str]) -> Section:
    """A section with the defaults of some keys."""
    default = type(section)()
    return replace(section, **{name: getattr(default, name) for name in names})


_AROUND = (
    *("questions", "round_questions", "max_rounds", "whole_rounds"),
    *("concurrency", "max_staleness", "leftovers"),
    *("memory_range", "failure_ratio", "train_questioner", "train_verifier"),
    *("verifier_consistency", "verifier_agreement", "verifier_share"),
)
_COMPUTED = (
    *("layout", "spec", "attention", "fusions", "dispatcher", "deterministic", "timeout_seconds"),
    *("recompute", "recompute_layers", "offload_layers", "stream_tokens", "share_prompts", "head_chunk"),
)
_SHARDED = ("distributed", "overlap", "cpu_offload")
_LEAVES_OUT = (
    *("bad_step", "entropy_min", "entropy_max", "reward_min"),
    *("mismatch_action", "mismatch_bound"),
)
