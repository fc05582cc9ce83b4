"""Small data sets in the public sets' own layouts, written by us."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from eval.benchmarks.helmet_rag import FILES

Row = dict[str, Any]


def write_samples(root: Path, long_words: int = 200) -> Path:
    """One folder per data set below `root`. `long_words` is the length of HELMET's contexts."""
    docmath = root / "yale-nlp" / "DocMath-Eval"
    for number, subset in enumerate(
        ("complong-testmini", "compshort_testmini", "simplong-testmini", "simpshort")
    ):
        _json(docmath / f"{subset}.json", [_docmath(subset, i, 10.0 * number + i) for i in range(2)])
    _jsonl(root / "frames" / "test.jsonl", [_frames(i) for i in range(2)])
    for config in ("2wikimqa", "hotpotqa", "musique"):
        _zip(
            root / "THUDM" / "LongBench" / "data.zip",
            f"data/{config}.jsonl",
            [_longbench(config, i) for i in range(2)],
        )
    _json(root / "LongBench-v2" / "data.json", [_longbench_v2(i) for i in range(3)])
    _parquet(
        root / "HuggingFaceH4/aime_2024/data/train-00000-of-00001.parquet",
        [_contest("problem", "033"), _contest("problem", "204")],
    )
    _jsonl(root / "aime25" / "aime2025-I.jsonl", [_contest("question", "70")])
    _jsonl(root / "aime25" / "aime2025-II.jsonl", [_contest("question", "336^\\circ")])
    _parquet(
        root / "amc23" / "data" / "test-00000-of-00001.parquet", [{**_contest("question", "27.0"), "id": 7}]
    )
    mmlu = root / "TIGER-Lab" / "MMLU-Pro" / "data"
    _parquet(
        mmlu / "validation-00000-of-00001.parquet",
        [_mmlu(i, "law", "A: It is (B).") for i in range(6)],
    )
    _parquet(mmlu / "test-00000-of-00001.parquet", [_mmlu(i, "law", "") for i in range(2)])
    _helmet(root / "helmet", long_words)
    _jsonl(root / "MATH-500" / "test.jsonl", [_math500(i) for i in range(2)])
    _parquet(root / "openai/gsm8k/main/test-0.parquet", [_gsm8k(i) for i in range(2)])
    _rag(root / "HELMET" / "data" / "kilt")
    _icl(root)
    for needles in (2, 4, 8):
        _parquet(root / "openai" / "mrcr" / f"{needles}needle" / "0.parquet", [_mrcr(needles)])
    return root


def _docmath(subset: str, index: int, truth: float) -> Row:
    return {
        "question_id": f"{subset}-{index}",
        "question": "What is the total, in million?",
        "paragraphs": ["Revenue | 2018 | 2017", f"Total | {truth} | 1.0"],
        "ground_truth": truth,
    }


def _frames(index: int) -> Row:
    pages = [
        {"title": "Nile", "text": "The Nile is a river."},
        {"title": "Congo", "text": "{question} is braced."},
    ]
    return {"Prompt": f"Which river is it, {index}?", "Answer": "Nile", "wiki_items": pages[: index + 1]}


def _longbench(config: str, index: int) -> Row:
    return {
        "input": "Where was the director born?",
        "context": "Passage 1:\nThe film was directed by Ada.\nPassage 2:\nAda was born in Rome.",
        "answers": ["Rome", "Rome, Italy"],
        "length": 20,
        "dataset": config,
        "_id": f"{config}{index:03d}",
    }


def _longbench_v2(index: int) -> Row:
    choices = {f"choice_{letter}": f"choice number {letter}" for letter in "ABCD"}
    return {
        "_id": f"v2-{index}",
        "domain": "Single-Document QA",
        "sub_domain": "Legal",
        "difficulty": "easy" if index == 0 else "hard",
        "length": "short",
        "question": "Which one is right?",
        "answer": "C",
        "context": "The third one is right.",
        **choices,
    }


def _contest(field: str, answer: str) -> Row:
    return {field: f"Find the integer that equals {answer}.", "answer": answer}


def _mmlu(index: int, category: str, worked: str) -> Row:
    return {
        "question_id": 100 + index,
        "question": "Which court?",
        "options": ["one", "two", "three", "N/A"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": worked,
        "category": category,
        "src": "ours",
    }


def _helmet(folder: Path, words: int) -> None:
    books = [
        {
            "id": i,
            "context": f"Chapter {i}. " + "rain fell " * (words // 2),
            "input": "",
            "answer": ["It rained."],
        }
        for i in range(4)
    ]
    _jsonl(folder / "longbook_sum_eng.jsonl", books)
    points = [{"id": i, "keypoints": ["It rained.", "Nobody left."]} for i in range(4)]
    _jsonl(folder / "infbench" / "longbook_sum_eng_keypoints.jsonl", points)
    cases = [
        {
            "id": f"case-{i}",
            "sources": ["the court met " * (words // 6), "the court left " * (words // 6)],
            "summary/short": "The court met." if i != 2 else None,
            "summary/long": "The court met and left.",
            "summary/short_keypoints": ["The court met."],
        }
        for i in range(5)
    ]
    _jsonl(folder / "multi_lexsum" / "multi_lexsum_val.jsonl", cases)


def _math500(index: int) -> Row:
    facts = {"solution": "", "subject": "Algebra", "level": 1 + index, "unique_id": f"test/{index}.json"}
    return {"problem": "What is half of 1?", "answer": "\\frac{1}{2}", **facts}


def _gsm8k(index: int) -> Row:
    return {"question": f"How many apples, {index}?", "answer": "1000 + 234 = <<1234>>1234\n#### 1,234"}


def _rag(folder: Path) -> None:
    """Long questions and short demonstrations; PopQA has a popular entity besides."""

    def row(index: int, sentences: int, views: int | None) -> Row:
        passage = {"title": f"Rivers {index}", "text": "The Nile is a river. " * sentences}
        answers = ["Nile", "the River Nile"]
        question = f"Which river is number {index}?"
        return {"question": question, "answers": answers, "ctxs": [passage], "s_pop": views}

    for name, files in FILES.items():
        for file, sentences in zip(files, (60, 1), strict=True):
            rows = [row(i, sentences, 10 if name == "popqa" else None) for i in (1, 2)]
            _jsonl(folder / file, [row(0, sentences, 10_000), *rows] if name == "popqa" else rows)


def _icl(root: Path) -> None:
    """One question and some examples a set, in the column that each has; two questions in both of TREC's."""
    trec = [{"text": f"Who is {i}?", "coarse_label": i % 2, "fine_label": i % 3} for i in range(12)]
    for split, rows in (("train", trec), ("test", trec[:2])):
        _parquet(root / "CogComp/trec/default" / f"{split}-0.parquet", rows)
    for folder, column, test in (
        ("PolyAI/banking77/data", "label", "test"),
        ("clinc/clinc_oos/plus", "intent", "validation"),
        ("xingkunliuxtracta/nlu_evaluation_data/default", "label", ""),
    ):
        for split in filter(None, ("train", test)):
            rows = [
                {"text": f"Card {i} of {split}", column: i % 4} for i in range(12 if split == "train" else 1)
            ]
            _parquet(root / folder / f"{split}-0.parquet", rows)


def _mrcr(needles: int) -> Row:
    prompt = [
        {"role": "user", "content": "Write a poem about rain."},
        {"role": "assistant", "content": "Rain falls."},
        {"role": "user", "content": "Prepend Zz9 to the 1st poem about rain."},
    ]
    return {
        "prompt": json.dumps(prompt),
        "answer": "Zz9Rain falls.",
        "random_string_to_prepend": "Zz9",
        "n_needles": needles,
        "desired_msg_index": 1,
        "total_messages": 3,
        "n_chars": 80,
    }


def _json(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def _jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _zip(path: Path, member: str, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "".join(json.dumps(row) + "\n" for row in rows))


def _parquet(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
