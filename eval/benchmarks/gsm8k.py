"""GSM8K: 1,319 word problems of primary school (the paper's Table 7). Gold stands behind "####"."""

from eval.benchmarks.contest import Contest
from eval.data import BadRow, Row, Source, text


class Gsm8k(Contest):
    name = "gsm8k"
    title = "GSM8K"
    source = Source(
        "openai/gsm8k", ("main/test*.parquet", "test*.parquet", "test*.jsonl", "main/test*.jsonl"), "gsm8k"
    )

    def gold(self, row: Row) -> str:
        _, mark, gold = text(row, "answer").rpartition("####")
        if not mark or not gold.strip():
            raise BadRow("no #### in the answer")
        return gold.replace(",", "")
