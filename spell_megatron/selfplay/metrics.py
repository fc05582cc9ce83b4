"""A step of self-play in numbers, flat names as `responder/reward`.

A mean over nothing has no entry: a step without verdicts has no `verifier/reward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import fmean

from spell_megatron.selfplay import rewards, voting
from spell_megatron.selfplay.episode import Episode, Response
from spell_megatron.selfplay.novelty import distinct_share, novelties
from spell_megatron.selfplay.play import Play
from spell_megatron.types import Rollout

_QUARTERS = ("0_25", "25_50", "50_75", "75_100")


def step_metrics(play: Play) -> dict[str, float]:
    """Everything that the report, the console and TensorBoard show of a step's episodes."""
    episodes = play.episodes
    values = {
        **_questioner(episodes),
        **_responder(episodes),
        **_verifier(episodes),
        **_judge(episodes),
        **_outcomes(play),
        **{f"episodes/{name}": count for name, count in asdict(play.tally).items()},
        **_difficulty(episodes),
        "memory/questions": play.remembered,
        "memory/rings": play.rings,
        "memory/hits": _mean(bool(e.history) for e in episodes if e.asked),
        "batch/questions": sum(e.kept for e in episodes),
        "batch/failures": play.batch.failures,
        "batch/verifier_pool": play.batch.verifier_pool,
        "batch/verifier_wanted": play.batch.verifier_wanted,
        "batch/gated": play.batch.gated or None,
        "batch/response_tokens": play.batch.train.response_tokens,
        **{
            f"batch/{role}_samples": play.batch.samples(role)
            for role in ("questioner", "responder", "verifier")
        },
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def _questioner(episodes: Sequence[Episode]) -> dict[str, float | None]:
    asked = [episode for episode in episodes if episode.asked]
    rollouts = [episode.asked for episode in asked if episode.asked]
    return {
        "questioner/reward": _mean(e.reward for e in asked if e.reward is not None),
        **_by_task("questioner/reward", [(e.task, e.reward) for e in asked if e.reward is not None]),
        **_lengths("questioner", rollouts),
        "questioner/prompt_tokens": _mean(len(rollout.prompt) for rollout in rollouts),
        "questioner/documents": _mean(len(e.documents) for e in asked),
        "questioner/document_share": _mean(
            len(e.documents) / e.cluster_documents for e in asked if e.documents
        ),
        "questioner/remembered": _mean(len(e.history) for e in asked),
        "questioner/format_errors": _mean(e.outcome == rewards.BAD_FORMAT for e in asked),
        "questioner/ungrounded": _mean(e.outcome == rewards.BAD_GROUND for e in asked if e.probe),
        "questioner/cut_tokens": _mean(e.cut_tokens for e in asked),
        "questioner/novelty": _mean(novelties(episodes)),
        "questioner/distinct": distinct_share(asked),
        "questioner/unanswerable": _mean(not e.answerability.rule for e in asked if e.answerability),
    }


def _responder(episodes: Sequence[Episode]) -> dict[str, float | None]:
    responses = [(e.task, response) for e in episodes if e.answered for response in e.responses]
    return {
        "responder/reward": _mean(response.reward for _, response in responses),
        **_by_task("responder/reward", [(task, response.reward) for task, response in responses]),
        "responder/rule": _mean(response.rule for _, response in responses),
        "responder/no_answer": _mean(response.answer is None for _, response in responses),
        **_lengths("responder", [response.rollout for _, response in responses]),
        "responder/prompt_tokens": _mean(len(response.rollout.prompt) for _, response in responses),
    }


def _verifier(episodes: Sequence[Episode]) -> dict[str, float | None]:
    judged = [response for episode in episodes for response in episode.responses if response.judgements]
    decided = [response for response in judged if response.verdict is not None]
    judgements = [judgement for response in judged for judgement in response.judgements]
    return {
        "verifier/reward": _mean(judgement.reward for judgement in judgements),
        **_lengths("verifier", [judgement.rollout for judgement in judgements]),
        "verifier/invalid": _mean(judgement.vote is None for judgement in judgements),
        "verifier/yes": _mean(response.verdict for response in decided if response.verdict is not None),
        "verifier/no_majority": _mean(response.verdict is None for response in judged),
        "verifier/rule_agreement": _mean(response.verdict == response.rule for response in decided),
        "verifier/self_consistency": _mean(_consistency(response) for response in decided),
    }


def _judge(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """The external judge; nothing of it where none was asked."""
    responses = [response for episode in episodes for response in episode.responses]
    judged = [response for response in responses if response.judged is not None]
    failed = sum(bool(response.unjudged) for response in responses)
    return {
        "judge/asked": len(judged) + failed or None,
        "judge/failed": failed if judged or failed else None,
        "judge/yes": _mean(response.judged or 0.0 for response in judged),
        "judge/verifier_agreement": _mean(r.judged == r.verdict for r in judged if r.verdict is not None),
    }


def _outcomes(play: Play) -> dict[str, float | None]:
    """Counts of every outcome, and how many answered questions had variance."""
    named = dict.fromkeys((rewards.KEPT, *rewards.FAILURES), 0) | dict(play.outcomes)
    answered = [episode for episode in play.episodes if episode.answered]
    return {
        **{f"outcome/{name.removeprefix('dropped:')}": count for name, count in named.items()},
        "groups/kept_share": _mean(episode.kept for episode in answered),
        "rounds": play.rounds,
        "questions": len(play.episodes),
    }


def _difficulty(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """How the mean rewards of the questions are distributed: none, quarters between, all."""
    means = [episode.mean_reward for episode in episodes if episode.answered]
    inner = [min(int(mean * 4), 3) for mean in means if 0 < mean < 1]
    return {
        "difficulty/mean": _mean(means),
        "difficulty/unsolved": _mean(mean <= 0 for mean in means),
        **{
            f"difficulty/{name}": inner.count(i) / len(means) if means else None
            for i, name in enumerate(_QUARTERS)
        },
        "difficulty/solved": _mean(mean >= 1 for mean in means),
    }


def _lengths(role: str, rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Tokens per completion, and the share that was cut at the limit."""
    return {
        f"{role}/length": _mean(len(rollout.tokens) for rollout in rollouts),
        f"{role}/truncated": _mean(rollout.finish == "length" for rollout in rollouts),
    }


def _by_task(name: str, values: Sequence[tuple[str, float]]) -> dict[str, float | None]:
    tasks = sorted({task for task, _ in values})
    return {f"{name}/{task}": _mean(value for other, value in values if other == task) for task in tasks}


def _consistency(response: Response) -> float:
    return voting.agreement(response.votes, response.verdict)


def _mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    numbers = [float(value) for value in values]
    return fmean(numbers) if numbers else None
