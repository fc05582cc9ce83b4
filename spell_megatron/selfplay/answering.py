"""How a question is answered: the responder's prompt, one response, and the rule's opinion of it."""

from __future__ import annotations

from collections.abc import Sequence

from spell_megatron.selfplay.episode import Episode, Response
from spell_megatron.selfplay.evidence import REQUEST, numbered
from spell_megatron.selfplay.fitting import Fitted
from spell_megatron.selfplay.grading import extract_answer, is_correct
from spell_megatron.selfplay.seeds import Name
from spell_megatron.selfplay.writer import Writer
from spell_megatron.types import Document


def answer_prompt(writer: Writer, episode: Episode, documents: Sequence[Document]) -> Fitted | None:
    """The question over these documents; None where it does not fit."""
    question, evidence = episode.posed, bool(writer.settings.beyond.evidence and documents)
    return writer.fit(
        lambda shown: writer.prompts.responder(question, shown) + (REQUEST if evidence else ""),
        numbered(documents) if evidence else documents,
        writer.settings.sampling.responder_tokens,
    )


async def answer(writer: Writer, episode: Episode, prompt: Fitted, name: Sequence[Name]) -> Response:
    """One response, with the rule's opinion of it for its reward."""
    question = episode.posed
    rollout, text = await writer.write(prompt, writer.settings.sampling.responder_tokens, name)
    found = None if rollout.finish == "length" else extract_answer(question.task, text)
    rule = float(found is not None and is_correct(question.task, found, question.answer))
    return Response(rollout, text, found, rule, reward=rule)
