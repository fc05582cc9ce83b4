"""HELMET retrieval-augmented answering: 105 retrieved passages, a short answer, four sets of questions.

HELMET has files of their own for every length; those of 16K tokens are read, which is the paper's length
(Table 8). The score is its substring match with any gold answer; the wording of the prompt is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from eval.benchmark import Benchmark, Grade, Item, Mode, Terms, fill
from eval.benchmarks.helmet import ROWS, SHOTS, answer_after, shuffled
from eval.data import BadRow, Data, Row, Source, text, texts
from eval.squad import cover_exact_match

HUB = "princeton-nlp/HELMET"
FILES: Mapping[str, tuple[str, str]] = {
    "nq": ("nq-dev-multikilt_1000_k105_dep6.jsonl", "nq-train-multikilt_1000_k3_dep6.jsonl"),
    "triviaqa": (
        "triviaqa-dev-multikilt_1000_k105_dep6.jsonl",
        "triviaqa-train-multikilt_1000_k3_dep6.jsonl",
    ),
    "hotpotqa": (
        "hotpotqa-dev-multikilt_1000_k105_dep3.jsonl",
        "hotpotqa-train-multikilt_1000_k3_dep3.jsonl",
    ),
    "popqa": ("popqa_test_1000_k105_dep6.jsonl", "popqa_test_1000_k3_dep6.jsonl"),
}
"""Questions and demonstrations of each set."""
RAREST = 10**3
"""PopQA's questions are about entities with fewer page views than this."""
PROMPT = """Use the documents to answer the question, briefly. Write the answer as:
Answer: [answer]

{demonstrations}{context}

Question: {question}"""


class HelmetRag(Benchmark):
    name = "helmet-rag"
    title = "HELMET RAG"
    long = True
    paper = Terms(cut="head")
    official = Terms(greedy=True, max_tokens=20, cut="head")
    rule = "substring match"
    macro = "set"

    def load(self, data: Data) -> list[Item]:
        return [item for name in FILES for item in self._set(data, name)]

    @staticmethod
    def _set(data: Data, name: str) -> list[Item]:
        test, train = (_source(file) for file in FILES[name])
        shots, rows = (
            {row["question"]: row for row in data.items(one, _usable) if _rare(row)} for one in (train, test)
        )
        convert = partial(_item, name, list(shots.values()))
        return [convert(number, row) for number, row in enumerate(rows.values())]

    def select(self, items: list[Item], count: Callable[[str], int], terms: Terms) -> list[Item]:
        chosen = []
        for name in FILES:
            of_set = [item for item in items if item.labels["set"] == name]
            chosen += [of_set[index] for index in shuffled(len(of_set))[:ROWS]]
        return chosen

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        if answer is None:
            return Grade(0.0, None)
        found = answer_after("answer:", answer.strip())
        # HELMET takes the better of the whole text and what stands behind "Answer:".
        read = found if mode == "strict" else answer
        return Grade(float(any(cover_exact_match(read, gold) for gold in item.references)), found or None)


def _usable(index: int, row: Row) -> Row:
    texts(row, "answers")
    if not isinstance(row.get("ctxs"), list) or not all(isinstance(passage, dict) for passage in row["ctxs"]):
        raise BadRow("no ctxs")
    return {**row, "question": text(row, "question")}


def _rare(row: Row) -> bool:
    views = row.get("s_pop")
    return not isinstance(views, int | float) or views < RAREST


def _item(name: str, shots: list[Row], number: int, row: Row) -> Item:
    others = [shot for shot in shots if shot["question"] != row["question"]]
    shown = [others[index] for index in shuffled(len(others), number)[:SHOTS]]
    demonstrations = "".join(
        f"{_passages(shot)}\n\nQuestion: {shot['question']}\nAnswer: {shot['answers'][0]}\n\n"
        for shot in shown
    )
    context, question = _passages(row), row["question"]
    content = fill(PROMPT, demonstrations=demonstrations, context=context, question=question)
    return Item(
        id=f"{name}-{number}",
        messages=({"role": "user", "content": content},),
        question=question,
        references=tuple(row["answers"]),
        labels={"set": name},
        context=context,
    )


def _passages(row: Mapping[str, Any]) -> str:
    return "\n\n".join(f"Document (Title: {p.get('title', '')}): {p.get('text', '')}" for p in row["ctxs"])


def _source(file: str) -> Source:
    return Source(HUB, (file, f"kilt/{file}", f"data/kilt/{file}", f"*/{file}"), folder="helmet")
