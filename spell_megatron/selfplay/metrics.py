"""A step of self-play in numbers, flat names as `responder/reward`.

A mean over nothing has no entry: a step without verdicts has no `verifier/reward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from spell_megatron.selfplay import rewards
from spell_megatron.selfplay.averages import mean
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.play import Play

_QUARTERS = ("0_25", "25_50", "50_75", "75_100")


def step_metrics(play: Play) -> dict[str, float]:
    """Everything that the report, the console and TensorBoard show of a step's episodes."""
    episodes = play.episodes
    values: dict[str, float | None] = {}
    for role in play.roles:
        values |= role.metrics(episodes)
    values |= {
        **_judge(episodes),
        **_outcomes(play),
        **{f"episodes/{name}": count for name, count in asdict(play.tally).items()},
        **_difficulty(episodes),
        "memory/questions": play.remembered,
        "memory/rings": play.rings,
        "memory/hits": mean(bool(e.history) for e in episodes if e.asked),
        "batch/response_tokens": play.batch.train.response_tokens,
        **play.batch.facts,
        **{f"batch/{role.name}_samples": play.batch.samples(role.name) for role in play.roles},
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def _judge(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """The external judge; nothing of it where none was asked."""
    responses = [response for episode in episodes for response in episode.responses]
    judged = [response for response in responses if response.judged is not None]
    failed = sum(bool(response.unjudged) for response in responses)
    return {
        "judge/asked": len(judged) + failed or None,
        "judge/failed": failed if judged or failed else None,
        "judge/yes": mean(response.judged or 0.0 for response in judged),
        "judge/verifier_agreement": mean(r.judged == r.verdict for r in judged if r.verdict is not None),
    }


def _outcomes(play: Play) -> dict[str, float | None]:
    """Counts of every outcome, and how many answered questions had variance."""
    named = dict.fromkeys(rewards.PAPER, 0) | dict(play.outcomes)
    answered = [episode for episode in play.episodes if episode.answered]
    return {
        **{f"outcome/{name.removeprefix('dropped:')}": count for name, count in named.items()},
        "groups/kept_share": mean(episode.kept for episode in answered),
        "rounds": play.rounds,
        "questions": len(play.episodes),
    }


def _difficulty(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """How the mean rewards of the questions are distributed: none, quarters between, all."""
    means = [episode.mean_reward for episode in episodes if episode.answered]
    inner = [min(int(value * 4), 3) for value in means if 0 < value < 1]
    return {
        "difficulty/mean": mean(means),
        "difficulty/unsolved": mean(value <= 0 for value in means),
        **{
            f"difficulty/{name}": inner.count(i) / len(means) if means else None
            for i, name in enumerate(_QUARTERS)
        },
        "difficulty/solved": mean(value >= 1 for value in means),
    }
