"""What a group of verdicts on one response says, and what each of its voters earns.

A vote is 1 (YES), 0 (NO) or None (neither, both, cut off).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from spell_megatron import config

Vote = int | None

TIES: Mapping[str, Callable[[Sequence[Vote]], Vote]] = {
    "absent": lambda votes: None,
    "first": lambda votes: next(vote for vote in votes if vote is not None),
}
"""What a group says in which as many vote YES as NO, and some do."""


def verdict_of(votes: Sequence[Vote], settings: config.SelfPlayConfig) -> Vote:
    """What the group says of the response, as it is configured."""
    if settings.verdict == "first":
        return votes[0] if votes else None
    return majority(votes, settings.vote_tie)


def majority(votes: Sequence[Vote], tie: str = "absent") -> Vote:
    """The verdict of most; None where most votes are invalid.

    `tie` names what as many YES as NO are (`TIES`). `no` is the paper's rule, which asks more of YES than to be more
    than NO: it takes over half of all votes, invalid ones among them.
    """
    yes, no = votes.count(1), votes.count(0)
    if len(votes) - yes - no > max(yes, no) or not yes + no:
        return None
    if tie == "no":
        return int(2 * yes > len(votes))
    return TIES[tie](votes) if yes == no else int(yes > no)


def vote_reward(vote: Vote, verdict: Vote, invalid: float = -1.0) -> float:
    """1 for a vote with the verdict, 0 for a valid one against it, `invalid` for an invalid one."""
    return invalid if vote is None else float(vote == verdict)


def agreement(votes: Sequence[Vote], verdict: Vote) -> float:
    """Share of the valid votes that agree with the verdict; 0 where there is no verdict."""
    valid = sum(vote is not None for vote in votes)
    return votes.count(verdict) / valid if verdict is not None and valid else 0.0


def is_usable(
    votes: Sequence[Vote], verdict: Vote, rule: float, *, bounds: tuple[float, float], consistent: bool
) -> bool:
    """Whether a group teaches the verifier something that can be trusted.

    Its valid votes must disagree (their agreement with the verdict lies within `bounds`), and, with `consistent`, its
    verdict must say of the response what the rule says.
    """
    if verdict is None or (consistent and verdict != rule):
        return False
    return bounds[0] <= agreement(votes, verdict) <= bounds[1]
