"""MRCR: find the i-th of several nearly equal requests in a long conversation and repeat its answer.

Its authors send conversations whole, so one that does not fit is skipped and the coverage reported; the paper cuts
them to its input limit. The response must start with a given random string; the score is difflib's ratio of the rest.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from eval.benchmark import Benchmark, Grade, Item, Mode, Terms
from eval.data import NOT_UTF8, BadRow, Data, Row, Source, broken, text

SOURCE = Source(
    "openai/mrcr", ("[248]needle/*.parquet", "[248]needle*.parquet", "*needle*.jsonl"), folder="mrcr"
)
EDGES = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576)
"""Upper ends of the length bins, included; the first bin starts at 4,096."""


class Mrcr(Benchmark):
    name = "mrcr"
    title = "MRCR"
    long = True
    official = Terms(thinking_tokens=20_480, cut="skip")
    isolated = True
    rule = "difflib ratio"

    def load(self, data: Data) -> list[Item]:
        return data.items(SOURCE, self._item)

    @staticmethod
    def _item(index: int, row: Row) -> Item:
        try:
            messages = json.loads(text(row, "prompt"))
        except (ValueError, RecursionError):
            raise BadRow("prompt is not JSON") from None
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise BadRow("prompt is not a list of messages")
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        if broken(messages):
            raise BadRow(NOT_UTF8)
        return Item(
            id=f"{row.get('n_needles')}needle-{index}",
            messages=tuple(messages),
            question=messages[-1]["content"],
            references=(text(row, "answer"),),
            labels={"needles": str(row.get("n_needles"))},
            facts={"prefix": text(row, "random_string_to_prepend")},
        )

    def place(self, item: Item, count: Callable[[str], int]) -> Item:
        official = o200k()
        measure = official or count
        size = sum(measure(message["content"]) for message in item.messages) + measure(item.references[0])
        name = "o200k tokens" if official else "model's tokens"
        return replace(item, labels={**item.labels, name: bin_name(size)})

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        response = (answer or "").lstrip("\n")
        return Grade(ratio(response, item.references[0], item.facts["prefix"]), response[:80] or None)


def ratio(response: str, answer: str, prefix: str) -> float:
    """0 unless the response starts with the prefix; else difflib's ratio of the rest (autojunk on)."""
    if not response.startswith(prefix):
        return 0.0
    matcher = difflib.SequenceMatcher(None, response.removeprefix(prefix), answer.removeprefix(prefix))
    return float(matcher.ratio())


def bin_index(tokens: int) -> int:
    """Bins are (low, high], the first one closed; what lies outside counts with the nearest."""
    return next((index for index, edge in enumerate(EDGES) if tokens <= edge), len(EDGES) - 1)


def bin_name(tokens: int) -> str:
    high = EDGES[bin_index(tokens)]
    return f"{high // 2048}K-{high // 1024}K"


@cache
def o200k() -> Callable[[str], int] | None:
    """Token counter of the data set's own bins; None where its vocabulary cannot be had (offline)."""
    try:
        import tiktoken

        encoding = tiktoken.get_encoding("o200k_base")
    except Exception:  # not installed, or its file neither cached nor downloadable
        return None
    return lambda text: len(encoding.encode(text, disallowed_special=()))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
