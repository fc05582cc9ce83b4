"""LongBench's multi-hop sets (THUDM/LongBench): 200 questions each over joined Wikipedia passages.

The data set is script-based, so its `data.zip` is read, or a Parquet copy of it.
"""

from __future__ import annotations

from eval.benchmark import Item
from eval.benchmarks.reading import Reading, prompt
from eval.data import Data, Row, Source, identity, text, texts


class LongBench(Reading):
    config: str

    def load(self, data: Data) -> list[Item]:
        source = Source(
            "THUDM/LongBench",
            (
                f"data.zip!*{self.config}.jsonl",
                f"{self.config}.jsonl",
                f"data/{self.config}.jsonl",
                f"{self.config}/test*.parquet",
                f"data/{self.config}/test*.parquet",
            ),
            folder=self.name,
        )
        return data.items(source, self._item)

    @staticmethod
    def _item(index: int, row: Row) -> Item:
        question = text(row, "input")
        return Item(
            id=identity(row, index, "_id"),
            messages=({"role": "user", "content": prompt(text(row, "context"), question)},),
            question=question,
            references=texts(row, "answers"),
        )
