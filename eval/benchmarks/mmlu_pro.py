"""MMLU-Pro: 12,032 questions of 14 categories with up to ten options, five worked examples.

Where no letter can be extracted the official scorer guesses; we count the guess's expectation,
one over the number of options, and report how often that happened.
"""

from __future__ import annotations

import re
from collections import defaultdict

from eval.benchmark import Benchmark, Grade, Item, Mode, Terms, fill
from eval.data import BadRow, Data, Row, Source, identity, text, texts

HUB = "TIGER-Lab/MMLU-Pro"
SHOTS = 5
INSTRUCTION = """The following are multiple choice questions (with answers) about {category}. Think step by \
step and then finish your answer with "the answer is (X)" where X is the correct letter choice.


"""
LETTERS = "ABCDEFGHIJ"

_FIRST = re.compile(r"answer is \(?([A-J])\)?")
_LABEL = re.compile(r"[aA]nswer:\s*([A-J])")
_ALONE = re.compile(r"\b[A-J]\b")


class MmluPro(Benchmark):
    name = "mmlu-pro"
    title = "MMLU-Pro"
    official = Terms(greedy=True, thinking_tokens=20_480)

    def load(self, data: Data) -> list[Item]:
        shots: dict[str, list[str]] = defaultdict(list)
        for category, shot in data.items(_source("validation"), _shot):
            shots[category].append(shot)
        return data.items(_source("test"), lambda index, row: self._item(index, row, shots))

    @staticmethod
    def _item(index: int, row: Row, shots: dict[str, list[str]]) -> Item:
        question, options, category = _options(row)
        answer = text(row, "answer").strip()
        if answer not in LETTERS[: len(options)]:
            raise BadRow("answer is not one of the options")
        instruction = fill(INSTRUCTION, category=category)
        return Item(
            id=identity(row, index, "question_id"),
            messages=(
                {
                    "role": "user",
                    "content": instruction + "".join(shots[category][:SHOTS]) + example(question, options),
                },
            ),
            question=question,
            references=(answer,),
            labels={"category": category},
            facts={"options": len(options)},
        )

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        letter = extract_letter(answer) if answer is not None else None
        if letter is None:
            return Grade(1 / item.facts["options"], None, metrics={"no_letter": 1.0})
        return Grade(float(letter == item.references[0]), letter, metrics={"no_letter": 0.0})


def example(question: str, options: tuple[str, ...], worked: str | None = None) -> str:
    """One question in the set's own layout, with its worked answer or the start of one."""
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    answer = (worked or "Let's think step by step.").removeprefix("A: ")
    return f"Question: {question}\nOptions: {lines}\nAnswer: {answer}\n\n"


def extract_letter(text: str) -> str | None:
    """The official chain: the first "answer is (X)", else "Answer: X", else the last lone letter."""
    text = text.replace("**", "")
    if match := _FIRST.search(text):
        return match[1]
    labels = list(_LABEL.finditer(text))
    if labels:
        end_of_line = text.find("\n", labels[0].start())
        first_line = [m for m in labels if end_of_line < 0 or m.start() < end_of_line]
        return first_line[-1][1]
    alone = _ALONE.findall(text)
    return alone[-1] if alone else None


def _shot(index: int, row: Row) -> tuple[str, str]:
    question, options, category = _options(row)
    return category, example(question, options, text(row, "cot_content"))


def _options(row: Row) -> tuple[str, tuple[str, ...], str]:
    options = tuple(option for option in texts(row, "options") if option != "N/A")
    if not 2 <= len(options) <= len(LETTERS):
        raise BadRow("not 2 to 10 options")
    return text(row, "question"), options, text(row, "category")


def _source(split: str) -> Source:
    files = (f"data/{split}*.parquet", f"{split}*.parquet", f"{split}*.jsonl", f"{split}*.json")
    return Source(HUB, files, folder="mmlu-pro")
