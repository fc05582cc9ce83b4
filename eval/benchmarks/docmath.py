"""DocMath-Eval testmini: numerical reasoning over financial documents, 800 questions in four subsets.

The score is the protocol's numeric equality; `official` is the data set's own scorer, which accepts
any power of ten and reads an unreadable answer as zero.
"""

from __future__ import annotations

import math
from functools import partial

from eval import extract
from eval.benchmark import Grade, Item, Mode
from eval.benchmarks.reading import Reading, prompt
from eval.data import BadRow, Data, Row, Source, identity, text, texts
from spell_megatron.selfplay.grading import extract_answer
from spell_megatron.selfplay.numbers import parse_number
from spell_megatron.selfplay.tasks.number import TOLERANCE, math_equal, rounded_up

SUBSETS = ("complong", "compshort", "simplong", "simpshort")
SHOWN = 300


class DocMath(Reading):
    name = "docmath"
    title = "DocMath-Eval"
    task = "docmath_qa"

    def load(self, data: Data) -> list[Item]:
        return [
            item for subset in SUBSETS for item in data.items(_source(subset), partial(self._item, subset))
        ]

    @staticmethod
    def _item(subset: str, index: int, row: Row) -> Item:
        truth = row.get("ground_truth")
        if isinstance(truth, bool) or parse_number(str(truth)) is None:
            raise BadRow("no ground_truth that is a number")
        question = text(row, "question")
        message = prompt("\n".join(texts(row, "paragraphs")), question, "Therefore, the answer is")
        return Item(
            id=identity(row, index, "question_id") if row.get("question_id") else f"{subset}-{index}",
            messages=({"role": "user", "content": message},),
            question=question,
            references=(str(truth),),
            labels={"subset": subset},
        )

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        answer, gold = answer or "", item.references[0]
        prediction = extract_answer(self.task, answer) if mode == "strict" else extract.number(answer)
        metrics = {"official": float(official_equal(prediction or "", gold))}
        if prediction is None:
            return Grade(0.0, None, answer.strip()[-SHOWN:], metrics)
        return Grade(float(math_equal(prediction, gold)), prediction, prediction, metrics)


def official_equal(prediction: str, reference: str) -> bool:
    """The authors' own equality: a power of ten apart, or within 0.15 % at scale 1, 100, 1e3 or 1e5."""
    predicted, wanted = (parse_number(side.split(" or ")[0]) or 0.0 for side in (prediction, reference))
    small, large = sorted((abs(predicted), abs(wanted)))
    if small > 0:
        power = round(math.log10(large) - math.log10(small))
        if power < 300 and math.isclose(small * 10.0**power, large, rel_tol=1e-12):
            return True
        if any(small * scale <= 2 * large and _near(small * scale, large) for scale in (100.0, 1e3, 1e5)):
            return True
    return rounded_up(small) == rounded_up(large) or _near(predicted, wanted)


def _near(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= TOLERANCE * abs(wanted)


def _source(subset: str) -> Source:
    """Configurations are spelled with a hyphen or an underscore, as one file or as a folder of files."""
    names = (f"{subset}[-_]testmini*", f"{subset}[-_]testmini/*", f"{subset}.*")
    files = tuple(f"{folder}{name}" for name in names for folder in ("", "data/"))
    return Source("yale-nlp/DocMath-Eval", files, folder="docmath")
