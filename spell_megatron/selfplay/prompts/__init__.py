"""The wording: one jinja2 template per role and task, in one folder per style.

`full` is written for real models, `short` for the toy one. A template is looked up from the most
special to the most general name: `{role}_{task}_history.j2` (where there is a history),
`{role}_{task}.j2`, `{role}.j2`. Documents, questions and answers enter as values: they are inserted,
never rendered, and made safe for their place before a template sees them (see `quoting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spell_megatron.selfplay.quoting import safe
from spell_megatron.selfplay.reading.objects import last_object
from spell_megatron.selfplay.reading.texts import normalise
from spell_megatron.types import Document, Question, SpellError

_FOLDER = Path(__file__).parent
_KEY = "A"
"""The letter for which an example is shown."""


class Prompts:
    """Templates of one style."""

    def __init__(self, style: str) -> None:
        if not (_FOLDER / style).is_dir():
            styles = sorted(
                path.name for path in _FOLDER.iterdir() if path.is_dir() and path.name[0] not in "._"
            )
            raise SpellError(f"no prompt style {style!r}: model.prompts is one of {', '.join(styles)}")
        self._templates = Environment(
            loader=FileSystemLoader(_FOLDER / style),
            undefined=StrictUndefined,
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )

    def questioner(
        self,
        task: str,
        documents: Sequence[Document],
        history: Sequence[Question] = (),
        key: str | None = None,
    ) -> str:
        """Ask for one new question; `key` is the letter that a multiple-choice answer has to have."""
        return self.render("questioner", task, documents=documents, history=history, key=key)

    def responder(self, question: Question, documents: Sequence[Document]) -> str:
        """Ask the question. Without documents the context reads "Empty"."""
        return self.render("responder", question.task, question=question, documents=documents)

    def verifier(self, question: Question, answer: str) -> str:
        """Ask whether an answer says the same as the reference."""
        return self.render(
            "verifier", question.task, question=question, answer=answer, reference=question.answer
        )

    def examples(self, task: str) -> frozenset[str]:
        """Texts of the JSON example in the questioner's prompts of a task, normalised: the echo of one is no question.

        The letter of an example's answer is none of them, since it is the key that was asked for.
        """
        texts: set[str] = set()
        for history in ((), (Question(task, "?", "?"),)):
            found = last_object(self.questioner(task, (), history, _KEY), "question")
            fields = found.value if found else {}
            options = fields.get("options")
            texts.update(options.values() if isinstance(options, dict) else ())
            texts.update(str(fields.get(name, "")) for name in ("question", "answer"))
        return frozenset(filter(None, map(normalise, texts - {_KEY})))

    def render(self, role: str, task: str, **variables: Any) -> str:
        """The message of a role. `task` is known to every template."""
        names = [f"{role}_{task}.j2", f"{role}.j2"]
        if variables.get("history"):
            names.insert(0, f"{role}_{task}_history.j2")
        return self._templates.select_template(names).render(task=task, **safe(role, variables)).strip()
