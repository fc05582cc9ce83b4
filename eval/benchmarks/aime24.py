"""AIME 2024: 30 problems, answers 0 to 999 (some with leading zeros)."""

from eval.benchmarks.contest import Contest
from eval.data import Source


class Aime24(Contest):
    name = "aime24"
    title = "AIME 2024"
    source = Source(
        "HuggingFaceH4/aime_2024",
        ("data/train*.parquet", "train*.parquet", "*.jsonl", "*.parquet"),
        folder="aime24",
    )
