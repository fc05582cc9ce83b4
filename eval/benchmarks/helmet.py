"""HELMET summarisation: 100 novels (InfiniteBench-Sum) and 100 court cases (Multi-LexSum).

With a judge the score is HELMET's: fluency times the F1 of key points found (recall) and sentences
supported (precision). Without one it is ROUGE-L sum, which is another scale and labelled so. The
prompts' wording is ours; lengths, demonstrations and what they ask for are HELMET's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from eval.benchmark import Ask, Benchmark, Grade, Item, Mode, Terms, Unjudged, Verdict, fill
from eval.data import Data, Row, Source, identity, text, texts
from spell_megatron.selfplay.reading.thoughts import strip_thinking

BOOKS = Source(
    "xinrongzhang2022/InfiniteBench", ("longbook_sum_eng.jsonl", "*/longbook_sum_eng.jsonl"), "helmet"
)
BOOK_POINTS = Source(
    "allenai/helmet-plus",
    (
        "longbook_sum_eng_keypoints.jsonl",
        "*/longbook_sum_eng_keypoints.jsonl",
        "*/*/longbook_sum_eng_keypoints.jsonl",
    ),
    "helmet",
)
CASES = Source(
    "allenai/helmet-plus",
    ("multi_lexsum_val.jsonl", "*/multi_lexsum_val.jsonl", "*/*/multi_lexsum_val.jsonl"),
    "helmet",
)
SEED = 42
SHOTS = 2
ROWS = 100
SHORTEST = 65_536
"""Tokens of the shortest context in HELMET's own setting."""

BOOK_PROMPT = """Here is a book. Summarise it in about 1000 to 1200 words. Tell only of the plot and the \
characters: no themes, no background, no analysis, no commentary.

For example:

{demonstrations}

Now, read the following story:

{context}

Now summarise the book. Start with "Summary:"."""
CASE_PROMPT = """Here are the legal documents of a civil rights lawsuit. Summarise the case in one paragraph \
of 200 to 250 words: briefly its background, the parties involved and the outcome.

Example summaries:

{demonstrations}

Now, summarise the following legal documents:

{context}

Now summarise the case. Start with "Summary:"."""

FLUENCY = """Judge the fluency of a text. Score 1 if it is coherent, grammatical and does not repeat itself \
(a last sentence that is cut off is no fault). Score 0 if it is incoherent, repetitive, gibberish, or not a \
complete answer.

Text:
<text>
{summary}
</text>

Give your score as JSON: {"fluency": 0} or {"fluency": 1}"""
RECALL = """Judge how much of an expert's summary {kind} another summary contains. Below are the expert's \
key points. Count those whose facts are supported by the summary.

Key points:
{points}

<summary>
{summary}
</summary>

Go through the key points one by one. Then give the number of supported ones as JSON: {"recall": 3}"""
PRECISION = """Judge how much of a summary {kind} is right. Count its sentences, and count those whose facts \
are supported by the expert's summary.

<expert>
{expert}
</expert>

<summary>
{summary}
</summary>

Go through the sentences one by one. Then give both numbers as JSON: {"precision": 7, "sentence_count": 20}"""


class Helmet(Benchmark):
    name = "helmet"
    title = "HELMET summarisation"
    long = True
    paper = Terms(cut="head")
    official = Terms(greedy=True, max_tokens=1_200, task_lengths=True, cut="head", shortest=SHORTEST)
    isolated = True
    judged = True
    judge_replaces = True
    rule = "ROUGE-L sum (no HELMET figure)"
    macro = "task"

    def load(self, data: Data) -> list[Item]:
        return self._books(data) + self._cases(data)

    def select(self, items: list[Item], count: Callable[[str], int], terms: Terms) -> list[Item]:
        chosen, shortest = [], terms.shortest
        for task in ("books", "cases"):
            of_task = [item for item in items if item.labels["task"] == task]
            long = [item for item in of_task if not shortest or count(item.context) >= shortest]
            chosen += [long[index] for index in shuffled(len(long))[:ROWS]]
        return chosen

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        summary = (answer or "").strip()
        if not summary:
            return Grade(0.0, None, metrics={"rouge_l_sum": 0.0})
        readings = (summary, answer_after("summary:", summary))
        score = max(rouge_l_sum(reading, item.references) for reading in readings)
        return Grade(score, summary, summary, {"rouge_l_sum": score})

    async def judge(self, item: Item, grade: Grade, ask: Ask, mode: Mode) -> Verdict:
        points: Sequence[str] = item.facts["points"]
        if not points:
            raise Unjudged("no key points")
        kind = "of a novel" if item.labels["task"] == "books" else "of a lawsuit"
        values = {"summary": grade.shown, "kind": kind, "expert": item.facts["expert"]}
        values["points"] = "\n".join(f"{number}. {point}" for number, point in enumerate(points, 1))
        (fluency,) = await ask(fill(FLUENCY, **values), _reader("fluency", most=1))
        (found,) = await ask(fill(RECALL, **values), _reader("recall"))
        supported, sentences = await ask(fill(PRECISION, **values), _reader("precision", "sentence_count"))
        return Verdict(judge_f1(fluency, found, len(points), supported, sentences))

    @staticmethod
    def _books(data: Data) -> list[Item]:
        points: dict[str, list[str]] = {}
        if data.has(BOOK_POINTS):
            points = dict(
                data.items(
                    BOOK_POINTS, lambda index, row: (identity(row, index, "id"), _points(row, "keypoints"))
                )
            )
        rows = data.items(
            BOOKS, lambda index, row: (identity(row, index, "id"), text(row, "context"), texts(row, "answer"))
        )
        items = []
        for number, (name, context, answers) in enumerate(rows):
            others = [row[2][0].strip() for index, row in enumerate(rows) if index != number]
            shown = [others[index] for index in shuffled(len(others))[:SHOTS]]
            demonstrations = "\n\n".join(f"[story text]\nSummary: {summary}" for summary in shown)
            facts = {"points": points.get(name, []), "expert": answers[0]}
            items.append(_item("books", name, BOOK_PROMPT, demonstrations, context, answers, 1200, facts))
        return items

    @staticmethod
    def _cases(data: Data) -> list[Item]:
        rows = data.items(CASES, _case)
        # The training split is not published beside the key points.
        shown, rows = rows[-SHOTS:], rows[:-SHOTS]
        demonstrations = "\n\n".join(f"Summary: {summary.strip()}" for _, _, summary, _ in shown)
        return [
            _item("cases", name, CASE_PROMPT, demonstrations, context, (summary,), 400, facts)
            for name, context, summary, facts in rows
        ]


def _item(
    task: str,
    name: str,
    template: str,
    demonstrations: str,
    context: str,
    references: tuple[str, ...],
    max_tokens: int,
    facts: dict[str, Any],
) -> Item:
    content = fill(template, demonstrations=demonstrations, context=context)
    return Item(
        id=f"{task}-{name}",
        messages=({"role": "user", "content": content},),
        question=f"Summarise this ({task}).",
        references=references,
        labels={"task": task},
        context=context,
        max_tokens=max_tokens,
        facts=facts,
    )


def rouge_l_sum(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L sum F1 with stemming, the best over the references."""
    scores = [_rouge().score(reference, prediction)["rougeLsum"].fmeasure for reference in references]
    return float(max(scores))


def answer_after(mark: str, output: str) -> str:
    """HELMET's parse: the rest of the line after a mark like "Summary:", said once or twice, or the first line."""
    said = re.escape(mark)
    match = re.search(rf"{said}(?:[^\S\n]*{said})?([^\n]*)", output, re.IGNORECASE)
    return (match[1] if match else output.partition("\n")[0]).strip()


def judge_f1(fluency: float, found: float, points: int, supported: float, sentences: float) -> float:
    """fluency · 2RP/(R+P) with R = found/points, P = supported/sentences; a judge may over-count."""
    recall = found / points if points > 0 else 0.0
    precision = supported / sentences if sentences > 0 else 0.0
    return fluency * 2 * recall * precision / (recall + precision) if recall + precision > 0 else 0.0


def last_json(text: str) -> dict[str, Any] | None:
    """The last flat JSON object in a judge's reply, where it is valid."""
    found = re.findall(r"\{[^{}]{0,1000}\}", text)
    try:
        value = json.loads(found[-1]) if found else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _reader(*names: str, most: float = 9_999) -> Callable[[str], tuple[float, ...] | None]:
    def read(reply: str) -> tuple[float, ...] | None:
        value = last_json(strip_thinking(reply) or "") or {}
        numbers = [value.get(name) for name in names]
        if any(isinstance(n, bool) or not isinstance(n, int | float) or not 0 <= n <= most for n in numbers):
            return None
        return tuple(float(n) for n in numbers if n is not None)

    return read


def _case(index: int, row: Row) -> tuple[str, str, str, dict[str, Any]]:
    """Id, documents, short summary and facts of a case; one without a short summary is not part of the task."""
    facts = {"points": _points(row, "summary/short_keypoints"), "expert": str(row.get("summary/long") or "")}
    return identity(row, index, "id"), "\n\n".join(texts(row, "sources")), text(row, "summary/short"), facts


def _points(row: Row, name: str) -> list[str]:
    """Key points; none where the row has none, and its summaries cannot be judged."""
    value = row.get(name)
    return [str(point) for point in value] if isinstance(value, list) else []


def shuffled(count: int, seed: int = SEED) -> list[int]:
    """The order that `datasets.Dataset.shuffle(seed)` gives."""
    return [int(index) for index in np.random.default_rng(seed).permutation(count)]


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"], use_stemmer=True)
