"""LongBench-v2: 503 four-way choices over contexts of 8K to 2M words. The rule alone decides."""

from __future__ import annotations

from eval import extract
from eval.benchmark import Benchmark, Grade, Item, Mode
from eval.benchmarks.reading import prompt
from eval.data import BadRow, Data, Row, Source, identity, text
from spell_megatron.selfplay.grading import extract_answer

SOURCE = Source(
    "THUDM/LongBench-v2",
    ("data.json", "data/train*.parquet", "train*.parquet", "*.jsonl"),
    folder="longbench-v2",
)
LETTERS = "ABCD"


class LongBenchV2(Benchmark):
    name = "longbench-v2"
    title = "LongBench-v2"
    long = True

    def load(self, data: Data) -> list[Item]:
        return data.items(SOURCE, self._item)

    @staticmethod
    def _item(index: int, row: Row) -> Item:
        answer = text(row, "answer").strip()
        if len(answer) != 1 or answer not in LETTERS:
            raise BadRow("answer is not one of A-D")
        choices = "\n".join(f"({letter}) {text(row, f'choice_{letter}').strip()}" for letter in LETTERS)
        asked = text(row, "question").strip()
        question = f"What is the correct answer to this question: {asked}\nChoices:\n{choices}"
        return Item(
            id=identity(row, index, "_id"),
            messages=({"role": "user", "content": prompt(text(row, "context"), question)},),
            question=question,
            references=(answer,),
            labels={name: str(row[name]) for name in ("difficulty", "length", "domain") if row.get(name)},
        )

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        if answer is None:
            return Grade(0.0, None)
        letter = extract_answer("doc_mc", answer) if mode == "strict" else extract.letter(answer)
        return Grade(float(letter == item.references[0]), letter)
