"""MATH-500: 500 competition problems of five levels and seven subjects (the paper's Table 7)."""

from eval.benchmarks.contest import Contest
from eval.data import Row, Source


class Math500(Contest):
    name = "math500"
    title = "MATH-500"
    source = Source(
        "HuggingFaceH4/MATH-500", ("test*.jsonl", "data/test*.parquet", "test*.parquet"), "math500"
    )

    def labels(self, row: Row) -> dict[str, str]:
        return {name: str(row[name]) for name in ("level", "subject") if row.get(name)}
