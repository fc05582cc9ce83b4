"""FRAMES: 824 multi-hop questions, each over the full text of its Wikipedia articles.

`google/frames-benchmark` has links without text; the protocol needs the copy with page texts.
"""

from __future__ import annotations

from eval.benchmark import Item
from eval.benchmarks.reading import Reading, prompt
from eval.data import BadRow, Data, Row, Source, identity, text

SOURCE = Source(
    "Tongyi-Zhiwen/frames",
    ("data/test*.parquet", "test*.parquet", "test*.jsonl", "frames*.jsonl", "*.parquet", "*.jsonl", "*.json"),
    folder="frames",
)


class Frames(Reading):
    name = "frames"
    title = "FRAMES"

    def load(self, data: Data) -> list[Item]:
        return data.items(SOURCE, self._item)

    @staticmethod
    def _item(index: int, row: Row) -> Item:
        pages = row.get("wiki_items")
        if not isinstance(pages, list) or not pages:
            raise BadRow("no wiki_items (use the copy of the data set that holds the page texts)")
        if not all(isinstance(page, dict) for page in pages):
            raise BadRow("wiki_items are not objects")
        question = text(row, "Prompt")
        context = "\n".join(f"{text(page, 'title')}\n{text(page, 'text')}" for page in pages)
        return Item(
            id=identity(row, index, "id", "Unnamed: 0"),
            messages=({"role": "user", "content": prompt(context, question)},),
            question=question,
            references=(text(row, "Answer"),),
            labels={"pages": str(min(len(pages), 5)) + ("+" if len(pages) >= 5 else "")},
        )
