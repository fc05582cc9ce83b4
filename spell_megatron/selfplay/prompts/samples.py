"""What every template must show, tried before a run starts: with samples of all that it will be asked to insert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spell_megatron.types import Document, Question, SpellError

if TYPE_CHECKING:
    from spell_megatron.selfplay.prompts import Prompts

_DOCUMENTS = (Document("1", "what-document-one-says", "its-title"), Document("2", "what-document-two-says"))
_TEXTS = tuple(document.text for document in _DOCUMENTS)


def check_prompts(prompts: Prompts, task: str) -> None:
    """Raise SpellError where a message cannot be made, or leaves out what its role cannot do without."""
    choices = {letter: f"choice-{letter}" for letter in "ABCD"} if task == "doc_mc" else {}
    key = "C" if choices else None
    asked = Question(task, "what-is-asked", key or "the-reference", choices)
    said = "what-the-responder-said"
    for role, what, message, wanted in (
        ("questioner", "the documents", prompts.questioner(task, _DOCUMENTS, (), key), _TEXTS),
        ("questioner", "documents and earlier questions", prompts.questioner(task, _DOCUMENTS, (asked,), key),
         (*_TEXTS, asked.text)),
        ("responder", "documents, question and choices", prompts.responder(asked, _DOCUMENTS),
         (*_TEXTS, asked.text, *choices.values())),
        ("responder", "the question", prompts.responder(asked, ()), (asked.text,)),
        ("verifier", "question, reference and answer", prompts.verifier(asked, said),
         (asked.text, asked.answer, said)),
    ):  # fmt: skip
        if missing := [text for text in wanted if text not in message]:
            raise SpellError(
                f"the {role}'s prompt of {task} leaves out {what}: in a trial {missing[0]!r} was not in it;"
                " docs/prompts.md names the variables"
            )
