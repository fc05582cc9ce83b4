"""HELMET in-context learning: hundreds of labelled sentences, then one to label; five sets.

Labels are numbers drawn anew for every question, so that only the examples tell what they mean. The numbers of
examples are HELMET's for 16K tokens, the paper's length (Table 8); the wording of the prompt is ours.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from eval.benchmark import Benchmark, Grade, Item, Mode, Terms, fill
from eval.benchmarks.helmet import SEED, answer_after, shuffled
from eval.data import BadRow, Data, Row, Source, text
from eval.squad import exact_match
from spell_megatron.selfplay.seeds import seed_of

QUESTIONS = 500
PROMPT = """The examples map texts to labels. Give the last text its label. Write "label: [label]" and nothing else.

{context}

{question}"""
Example = tuple[str, str]
"""A text and the name of its label."""


@dataclass(frozen=True, slots=True)
class Labels:
    """One set: its files, the column of the label, how many examples make 16K tokens."""

    name: str
    hub: str
    config: str
    column: str
    shots: int
    test: str = "test"
    """Split of the questions; a tenth of the training split where empty."""

    def rows(self, data: Data, split: str) -> list[Example]:
        return data.items(self._source(split), self._example)

    def _example(self, index: int, row: Row) -> Example:
        label = row.get(self.column)
        if label is None or isinstance(label, bool):
            raise BadRow(f"no {self.column}")
        return text(row, "text"), str(label)

    def _source(self, split: str) -> Source:
        folders = (f"{self.config}/", f"data/{self.config}/", "data/", "default/", "")
        files = (f"{folder}{split}*.{kind}" for folder in folders for kind in ("parquet", "jsonl", "csv"))
        return Source(self.hub, tuple(files), folder=f"icl-{self.name}")


SETS = (
    Labels("trec_coarse", "CogComp/trec", "default", "coarse_label", 800),
    Labels("trec_fine", "CogComp/trec", "default", "fine_label", 800),
    Labels("banking77", "PolyAI/banking77", "default", "label", 720),
    Labels("clinic150", "clinc/clinc_oos", "plus", "intent", 880, test="validation"),
    Labels("nlu", "xingkunliuxtracta/nlu_evaluation_data", "default", "label", 1020, test=""),
)


class HelmetIcl(Benchmark):
    name = "helmet-icl"
    title = "HELMET ICL"
    long = True
    paper = Terms(cut="head")
    official = Terms(greedy=True, max_tokens=20, cut="head")
    rule = "label"
    macro = "set"

    def load(self, data: Data) -> list[Item]:
        return [item for labels in SETS for item in _items(labels, data)]

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        found = answer_after("label:", (answer or "").strip())
        return Grade(float(bool(found) and exact_match(found, item.references[0])), found or None)


def _items(labels: Labels, data: Data) -> Iterator[Item]:
    train = labels.rows(data, "train")
    if labels.test:
        test = labels.rows(data, labels.test)
    else:
        order = shuffled(len(train))
        cut = len(train) // 10
        test, train = [train[i] for i in order[:cut]], [train[i] for i in order[cut:]]
    names = sorted({label for _, label in (*train, *test)})
    shown = balanced(train, labels.shots)
    for number in shuffled(len(test))[:QUESTIONS]:
        question, label = test[number]
        numbers = dict(zip(names, _numbers(len(names), labels.name, number), strict=True))
        context = "\n\n".join(f"{example}\nlabel: {numbers[name]}" for example, name in shown)
        content = fill(PROMPT, context=context, question=question)
        yield Item(
            id=f"{labels.name}-{number}",
            messages=({"role": "user", "content": content},),
            question=question,
            references=(str(numbers[label]),),
            labels={"set": labels.name},
            context=context,
        )


def balanced(rows: Sequence[Example], shots: int) -> list[Example]:
    """`shots` examples in rounds that hold every label once, in an order of its own; rare labels repeat theirs."""
    draw = random.Random(SEED)
    by_label: defaultdict[str, list[Example]] = defaultdict(list)
    for row in rows:
        by_label[row[1]].append(row)
    rounds = math.ceil(shots / len(by_label)) if by_label else 0
    drawn = [_drawn(group, rounds, draw) for group in by_label.values()]
    return [example for one in zip(*drawn, strict=True) for example in draw.sample(one, len(one))][:shots]


def _drawn(group: Sequence[Example], count: int, draw: random.Random) -> list[Example]:
    """`count` of a label's examples; one comes again after all of them have come."""
    turns = math.ceil(count / len(group))
    return [example for _ in range(turns) for example in draw.sample(group, len(group))][:count]


def _numbers(count: int, name: str, number: int) -> list[int]:
    """What the labels are called in one question."""
    numbers = list(range(count))
    random.Random(seed_of(SEED, name, number)).shuffle(numbers)
    return numbers
