"""AMC 2023: 40 problems, answers as numbers ("27.0") or formulae."""

from eval.benchmarks.contest import Contest
from eval.data import Source


class Amc23(Contest):
    name = "amc23"
    title = "AMC 2023"
    source = Source(
        "math-ai/amc23", ("data/test*.parquet", "test*.jsonl", "test*.parquet", "*.jsonl"), folder="amc23"
    )
