"""One question from its prompt to its rewards, without a barrier between the roles.

    ask ─ parse ─ probe ─┬─ respond ─ grade ─┬─ judge          G responses, each judged G times
                         │                   └─ judge …
                         └─ respond …

A question goes to its responders the moment that it parses, a response to its verifiers the moment
that it is complete; hundreds of pipelines share the engine's batch. Every rollout's seed is a hash of
its place, so that what is sampled does not depend on what finishes first. What happens at each place is
the role's (`roles`).
"""

from __future__ import annotations

from collections.abc import Sequence

from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.roles import Role
from spell_megatron.selfplay.writer import Job, Writer


async def play_episode(roles: Sequence[Role], writer: Writer, job: Job) -> Episode:
    """The whole episode, by these roles in their order.

    Raises what the generator raises; cancelling it cancels its requests.
    """
    episode = Episode(
        job.step,
        job.round,
        job.index,
        job.cluster.id,
        job.cluster.domain,
        job.task,
        len(job.cluster.documents),
        history=job.history,
        question=job.question,
    )
    for role in roles:
        if not episode.outcome:
            episode = await role.play(writer, job, episode)
    for role in roles:
        episode = role.earn(episode, writer.settings)
    return episode
