"""What a question must pass before it is answered: it needs its documents, and they suffice.

Without documents a responder must not be right: such a question asks for what is known anyway (grounding).

With those that the questioner read it must be (answerability). Search Self-Play (arXiv 2510.18821) keeps a question
only if it is answered from the documents that it was made of, among a few others; there the check was worth ten points.
Here one response reads what the questioner read and some distractors of the cluster. A question that it misses is
dropped, neither rewarded nor penalised: a penalty for bad questions drove the questioner there into a spiral.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from spell_megatron.selfplay import rewards
from spell_megatron.selfplay.answering import answer, answer_prompt
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.fitting import PROMPT_TOO_LONG
from spell_megatron.selfplay.writer import Job, Writer

UNANSWERABLE = "dropped:unanswerable"


async def ground(writer: Writer, job: Job, episode: Episode) -> Episode:
    """One response without documents: what it answers correctly needs no reading."""
    if not writer.settings.grounding:
        return episode
    prompt = answer_prompt(writer, episode, ())
    if prompt is None:
        return replace(episode, outcome=PROMPT_TOO_LONG)
    probe = await answer(writer, episode, prompt, writer.name(job, "probe"))
    grounded = probe.rule < writer.settings.grounding_threshold
    return replace(episode, probe=probe, outcome="" if grounded else rewards.BAD_GROUND)


async def answerable(writer: Writer, job: Job, episode: Episode) -> Episode:
    """One response with what the questioner read, among distractors: what it misses cannot be answered."""
    distractors = writer.settings.beyond.answerability
    if distractors is None:
        return episode
    documents = job.cluster.documents
    chosen = probed_documents(
        len(documents), episode.documents, distractors, writer.random(job, "distractors")
    )
    prompt = answer_prompt(writer, episode, [documents[index] for index in chosen])
    if prompt is None:
        return replace(episode, outcome=PROMPT_TOO_LONG)
    probe = await answer(writer, episode, prompt, writer.name(job, "answerability"))
    return replace(episode, answerability=probe, outcome="" if probe.rule else UNANSWERABLE)


def probed_documents(
    available: int, read: Sequence[int], distractors: int, random: Random
) -> tuple[int, ...]:
    """Indices, in document order, of what the probe reads in a cluster of `available` documents."""
    others = [index for index in range(available) if index not in read]
    return tuple(sorted([*read, *random.sample(others, min(distractors, len(others)))]))
