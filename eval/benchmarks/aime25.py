"""AIME 2025, parts I and II: 30 problems."""

from eval.benchmarks.contest import Contest
from eval.data import Source


class Aime25(Contest):
    name = "aime25"
    title = "AIME 2025"
    source = Source(
        "math-ai/aime25",
        (
            "aime2025-I*.jsonl",
            "test*.jsonl",
            "data/test*.parquet",
            "test*.parquet",
            "AIME2025-I*/test*.parquet",
        ),
        folder="aime25",
    )
