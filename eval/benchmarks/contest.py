"""Mathematics with one answer: AIME, AMC, MATH-500 and GSM8K differ in their files and in how gold is written.

Equality is math-verify's. It is asked about the last box (or the end of the text where there is none),
cut to a bounded length, in a process of its own: an answer like 9^{9^{9^9}} would hold up a run.
"""

from __future__ import annotations

import re

from eval.benchmark import Benchmark, Grade, Item, Mode, Terms
from eval.data import Data, Row, Source, identity, text
from spell_megatron.selfplay.reading.statements import last_box

_LONGEST = 1_000
_DEGREES = re.compile(r"\^\{?\\circ\}?|°")


class Contest(Benchmark):
    source: Source
    isolated = True
    official = Terms(max_tokens=20_000)
    rule = "math-verify"

    def load(self, data: Data) -> list[Item]:
        return data.items(self.source, self._item)

    def gold(self, row: Row) -> str:
        """The gold answer of a row; raises BadRow."""
        answer = row.get("answer")
        return str(answer) if isinstance(answer, int | float) else text(row, "answer")

    def labels(self, row: Row) -> dict[str, str]:
        """The subsets that a row belongs to."""
        return {}

    def _item(self, index: int, row: Row) -> Item:
        problem = text(row, "problem", "question")
        message = (
            f"{problem.strip()}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
        )
        return Item(
            id=identity(row, index, "id", "ID", "unique_id"),
            messages=({"role": "user", "content": message},),
            question=problem,
            references=(self.gold(row).strip(),),
            labels=self.labels(row),
        )

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        if not answer or not answer.strip():
            return Grade(0.0, None)
        box = last_box(answer)
        prediction = box.strip() if box else None
        return Grade(float(math_verify_equal(box, answer, item.references[0])), prediction)


def math_verify_equal(box: str | None, answer: str, gold: str) -> bool:
    """Whether the last box (the end of the text without one) equals the gold answer."""
    predicted, wanted = _integer(box or ""), _integer(gold)
    if predicted is not None and wanted is not None:
        return predicted == wanted
    from math_verify import parse, verify

    # Without its alarms, which go by the clock: on a machine that is busy they take right answers for wrong ones.
    pred = parse(f"\\boxed{{{box[:_LONGEST]}}}" if box else answer[-_LONGEST:], parsing_timeout=0)
    return bool(verify(parse(f"\\boxed{{{gold}}}", parsing_timeout=0), pred, timeout_seconds=0))


def _integer(text: str) -> int | None:
    """An integer as contests write it: leading zeros, `27.0`, `336^\\circ`."""
    plain = _DEGREES.sub("", text).strip(" $.")
    match = re.fullmatch(r"([+-]?\d{1,15})(?:\.0{1,15})?", plain)
    return int(match[1]) if match else None
