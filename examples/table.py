"""A task of one's own: the cell of a table, by its row and its column.

The questioner must ask for one cell ("What is the pet of Nora?"), and an answer is right if it is the cell's text and
nothing else, where free-form questions take an answer that holds the reference. In the toy world rows are people and
shops, columns what is said of them; its model knows no such task, so the prompt asks for a free-form question and the
parser keeps those that are of this kind.
"""

from __future__ import annotations

import re
from typing import ClassVar

from spell_megatron.selfplay.reading.texts import normalise
from spell_megatron.selfplay.tasks import Draft, Failure
from spell_megatron.selfplay.tasks.general import General
from spell_megatron.types import Question

NO_CELL = Failure("dropped:no_cell")
_CELL = re.compile(r"\s*What is the (?P<column>\w[\w ]*) of (?P<row>\w[\w ]*)\?\s*")


class Table(General):
    name, label = "table", "table cell"
    templates: ClassVar = {
        "questioner_table.j2": '{% set task = "doc_general_qa" %}{% include "questioner.j2" %}'
    }

    def question(self, draft: Draft) -> Question | Failure:
        """Dropped without a penalty where it asks for something else: the model was not told better."""
        asked = super().question(draft)
        return asked if isinstance(asked, Failure) or _CELL.fullmatch(draft.text) else NO_CELL

    def is_correct(self, answer: str, reference: str) -> bool:
        return normalise(answer) == normalise(reference)

    def trial(self) -> Question:
        return Question(self.name, "What is the column of row?", "the-reference")
