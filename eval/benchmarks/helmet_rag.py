"""HELMET retrieval-augmented answering: 105 retrieved passages, a short answer, four sets of questions.

HELMET has files of their own for every length; those of 16K tokens are read, which is the paper's length
(Table 8). They hold each question several times, with the gold passages at other places: its authors draw questions
and ask all rows of each. The score is their substring match with any gold answer; the wording of the prompt is ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
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
        """All rows of the questions that are drawn. The draw is here: no model changes it, and the files are large."""
        test, train = (_source(file) for file in FILES[name])
        shots = {row["key"]: row for row in data.items(train, _usable) if _rare(row)}
        questions: defaultdict[str, list[Row]] = defaultdict(list)
        for row in data.items(test, _usable):
            if _rare(row):
                questions[row["key"]].append(row)
        rows = list(questions.values())
        return [
            _item(name, list(shots.values()), number, depth, row)
            for number in sorted(shuffled(len(rows))[:ROWS])
            for depth, row in enumerate(rows[number])
        ]

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        if answer is None:
            return Grade(0.0, None)
        found = answer_after("answer:", answer.strip())
        # HELMET takes the better of the whole text and what stands behind "Answer:".
        read = found if mode == "strict" else answer
        return Grade(float(any(cover_exact_match(read, gold) for gold in item.references)), found or None)


def _usable(index: int, row: Row) -> Row:
    """What is needed of a row. `key` is the same in all rows of a question: its id, where the set has one."""
    if not isinstance(row.get("ctxs"), list) or not all(isinstance(passage, dict) for passage in row["ctxs"]):
        raise BadRow("no ctxs")
    question = text(row, "question")
    return {
        "key": question if row.get("id") is None else str(row["id"]),
        "question": question,
        "answers": texts(row, "answers"),
        "passages": _passages(row),
        "s_pop": row.get("s_pop"),
    }


def _rare(row: Row) -> bool:
    views = row["s_pop"]
    return not isinstance(views, int | float) or views < RAREST


def _item(name: str, shots: list[Row], number: int, depth: int, row: Row) -> Item:
    """One row of question `number`, whose rows share their demonstrations."""
    others = [shot for shot in shots if shot["key"] != row["key"]]
    shown = [others[index] for index in shuffled(len(others), number)[:SHOTS]]
    demonstrations = "".join(
        f"{shot['passages']}\n\nQuestion: {shot['question']}\nAnswer: {shot['answers'][0]}\n\n"
        for shot in shown
    )
    context, question = row["passages"], row["question"]
    content = fill(PROMPT, demonstrations=demonstrations, context=context, question=question)
    return Item(
        id=f"{name}-{number}-{depth}",
        messages=({"role": "user", "content": content},),
        question=question,
        references=row["answers"],
        labels={"set": name},
        group=f"{name}-{number}",
        context=context,
    )


def _passages(row: Mapping[str, Any]) -> str:
    return "\n\n".join(f"Document (Title: {p.get('title', '')}): {p.get('text', '')}" for p in row["ctxs"])


def _source(file: str) -> Source:
    return Source(HUB, (file, f"kilt/{file}", f"data/kilt/{file}", f"*/{file}"), folder="helmet")
