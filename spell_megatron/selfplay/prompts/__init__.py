"""The wording: one jinja2 template per role and task, in one folder per style.

`full` is written for real models, `short` for the toy one, and a folder of the user's own stands for either. A
template is looked up from the most special to the most general name: `{role}_{task}_history.j2` (where there is a
history), `{role}_{task}.j2`, `{role}.j2`. Documents, questions and answers enter as values: they are inserted, never
rendered, and made safe for their place before a template sees them (see `quoting`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import extract_tb
from typing import Any

from jinja2 import (
    ChoiceLoader,
    DictLoader,
    FileSystemLoader,
    StrictUndefined,
    TemplateError,
    TemplatesNotFound,
    TemplateSyntaxError,
)
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spell_megatron.selfplay.quoting import LONGEST, TAGS, safe
from spell_megatron.selfplay.reading.objects import last_object
from spell_megatron.selfplay.reading.texts import normalise
from spell_megatron.types import Document, Question, SpellError

STYLES = ("full", "short")
_FOLDER = Path(__file__).parent
_TAG = re.compile(rf"</?([^\W\d_][\w-]{{0,{LONGEST - 1}}})(?:\s[^<>]*)?>")
_SHOWN = re.compile(r"<([\w-]{1,40})>[^<>{]*</\1>")
"""Tags around the template's own words, as an example of what to write: they mark no place."""
_KEY = "A"
"""The letter for which an example is shown."""


class Prompts:
    """Templates of one style: a shipped one's name, or a folder. `language` and `form` are known to every template.

    `more` are templates by file name that stand where the folder has none of that name.
    """

    def __init__(
        self,
        style: str,
        *,
        language: str = "English",
        form: str = "sentence",
        more: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = _FOLDER / style if style in STYLES else Path(style)
        if not self.folder.is_dir():
            raise SpellError(
                f"no prompts {style!r}: model.prompts is one of {', '.join(STYLES)}, or a folder of templates"
                " (`spell-megatron prompts OUT` writes one to begin with)"
            )
        sources = [path.read_text(encoding="utf-8", errors="replace") for path in self.folder.rglob("*.j2")]
        self._tags = TAGS | {
            tag.casefold()
            for source in (*sources, *(more or {}).values())
            for tag in _TAG.findall(_SHOWN.sub("", source))
        }
        self._templates = ImmutableSandboxedEnvironment(
            loader=ChoiceLoader([FileSystemLoader(self.folder), DictLoader(more or {})]),
            undefined=StrictUndefined,
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self._templates.globals |= {"language": language, "form": form}

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
            "verifier",
            question.task,
            judged=True,
            question=question,
            answer=answer,
            reference=question.answer,
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

    def render(self, role: str, task: str, *, judged: bool = False, **variables: Any) -> str:
        """The message of a role. `task` is known to every template; `judged` asks for a verdict on what is shown."""
        names = [f"{role}_{task}.j2", f"{role}.j2"]
        if variables.get("history"):
            names.insert(0, f"{role}_{task}_history.j2")
        try:
            return (
                self._templates.select_template(names)
                .render(task=task, **safe(variables, judged=judged, tags=self._tags))
                .strip()
            )
        except TemplatesNotFound as error:
            raise SpellError(f"{self.folder}: there is none of the templates {', '.join(names)}") from error
        except TemplateSyntaxError as error:
            raise SpellError(f"{error.filename}, line {error.lineno}: {error.message}") from error
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            known = ", ".join(sorted({*self._templates.globals, "task", *variables} - set(DEFAULT_NAMESPACE)))
            raise SpellError(f"{self._place(error, names)}: {error}; the variables here: {known}") from error

    def _place(self, error: BaseException, names: Sequence[str]) -> str:
        """The innermost of the folder's files that an error comes from, with its line."""
        places = [(frame.filename, frame.lineno) for frame in extract_tb(error.__traceback__)]
        within = [(name, line) for name, line in places if Path(name).is_relative_to(self.folder)]
        return f"{within[-1][0]}, line {within[-1][1]}" if within else f"{self.folder}: {names[0]}"


def write_prompts(out: Path, style: str = "full") -> None:
    """Write the templates of a shipped style into a new folder, for editing. Raises SpellError."""
    if style not in STYLES:
        raise SpellError(f"no style {style!r}: choose {' or '.join(STYLES)}")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SpellError(f"{out} is not empty: nothing was written; choose a new folder")
        shutil.copytree(_FOLDER / style, out, dirs_exist_ok=True)
    except OSError as error:
        raise SpellError(f"cannot write the prompts into {out}: {error}; choose another folder") from None
