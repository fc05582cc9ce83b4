"""What a group of verdicts on one response says, and what each of its voters earns.

A vote is 1 (YES), 0 (NO) or None (neither, both, cut off).
"""

from __future__ import annotations

from collections.abc import Sequence

Vote = int | None


def majority(votes: Sequence[Vote]) -> Vote:
    """The verdict of the group; None where most votes are invalid, or as many say YES as NO."""
    yes, no = votes.count(1), votes.count(0)
    if yes == no or len(votes) - yes - no > max(yes, no):
        return None
    return int(yes > no)


def vote_reward(vote: Vote, verdict: Vote) -> float:
    """1 for a vote with the majority, 0 for a valid one against it, -1 for an invalid one."""
    return -1.0 if vote is None else float(vote == verdict)


def agreement(votes: Sequence[Vote], verdict: Vote) -> float:
    """Share of the valid votes that agree with the verdict; 0 where there is no verdict."""
    valid = sum(vote is not None for vote in votes)
    return votes.count(verdict) / valid if verdict is not None and valid else 0.0


def is_usable(votes: Sequence[Vote], rule: float, *, bounds: tuple[float, float], consistent: bool) -> bool:
    """Whether a group teaches the verifier something that can be trusted.

    Its valid votes must disagree (their agreement lies within `bounds`), and, with `consistent`, its
    majority must say of the response what the rule says.
    """
    verdict = majority(votes)
    if verdict is None or (consistent and verdict != rule):
        return False
    return bounds[0] <= agreement(votes, verdict) <= bounds[1]
