"""Loaders over samples in each public set's own layout, and what becomes of broken rows."""

import asyncio
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_samples import write_samples

from eval import list_benchmarks
from eval.benchmark import Unjudged
from eval.benchmarks import find, helmet, helmet_rag
from eval.benchmarks.helmet_icl import balanced
from eval.benchmarks.mrcr import o200k
from eval.data import Data, Source, pin
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit
EXPECTED = {
    "docmath": 8,
    "frames": 2,
    "2wikimqa": 2,
    "hotpotqa": 2,
    "musique": 2,
    "longbench-v2": 3,
    "aime24": 2,
    "aime25": 2,
    "amc23": 1,
    "mmlu-pro": 2,
    "helmet": 6,
    "mrcr": 3,
    "math500": 2,
    "gsm8k": 2,
    "helmet-rag": 8,
    "helmet-icl": 7,
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data"))


def load(name: str, root: Path, alone: bool = False):
    [benchmark] = find([name])
    data = Data(root, alone=alone)
    return benchmark, benchmark.load(data), data.bad


def test_names_in_order():
    assert list_benchmarks() == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_official_layout(name, samples):
    benchmark, items, bad = load(name, samples)
    assert len(items) == EXPECTED[name]
    assert len({item.id for item in items}) == len(items)
    assert bad.total() == (1 if name == "helmet" else 0)  # a case without a short summary is not part of it
    for item in items:
        assert item.messages
        assert item.references
        assert all(item.references)
        assert item.messages[-1]["role"] == "user"
        assert benchmark.grade(item, None, "spell").prediction is None
        assert benchmark.grade(item, "", "strict").score <= 1


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("docmath", "Therefore, the answer is (0.0)."),
        ("frames", "The correct answer is Nile."),
        ("hotpotqa", "The correct answer is Rome."),
        ("longbench-v2", "The correct answer is (C)."),
        ("aime24", "Thus \\boxed{33}"),
        ("aime25", "Thus \\boxed{70}"),
        ("amc23", "Thus \\boxed{27}"),
        ("mmlu-pro", "so the answer is (B)."),
        ("helmet", "Summary: It rained."),
        ("mrcr", "\nZz9Rain falls."),
        ("math500", "Thus \\boxed{\\frac{1}{2}}"),
        ("gsm8k", "Thus \\boxed{1234}"),
        ("helmet-rag", "It is\nAnswer: the Nile"),
    ],
)
def test_right_answers_score_one(name, answer, samples):
    benchmark, items, _ = load(name, samples)
    assert benchmark.grade(items[0], answer, "spell").score == 1
    assert benchmark.grade(items[0], answer, "strict").score == 1
    assert benchmark.grade(items[0], "Something else altogether", "spell").score < 1


def test_prompts(samples):
    content = load("docmath", samples)[1][0].messages[0]["content"]
    assert "<text>\nRevenue | 2018 | 2017\nTotal | 0.0 | 1.0\n</text>" in content
    assert content.endswith('"Therefore, the answer is (insert answer here)".')
    content = load("frames", samples)[1][1].messages[0]["content"]
    assert "Nile\nThe Nile is a river.\nCongo\n{question} is braced." in content
    content = load("longbench-v2", samples)[1][0].messages[0]["content"]
    assert "(D) choice number D" in content
    assert content.endswith('"The correct answer is (insert answer here)".')
    content = load("mmlu-pro", samples)[1][0].messages[0]["content"]
    assert content.count("Question:") == 6
    assert "N/A" not in content
    assert content.endswith("C. three\nAnswer: Let's think step by step.\n\n")
    conversation = load("mrcr", samples)[1][0].messages
    assert [message["role"] for message in conversation] == ["user", "assistant", "user"]


def test_helmet_selects_long_contexts_in_a_fixed_order(samples):
    benchmark, items, _ = load("helmet", samples)
    official, paper = benchmark.terms("official"), benchmark.terms("paper")
    assert benchmark.select(items, lambda text: 100, official) == []
    chosen = benchmark.select(items, lambda text: helmet.SHORTEST, official)
    assert {item.labels["task"] for item in chosen} == {"books", "cases"}
    assert chosen == benchmark.select(items, lambda text: helmet.SHORTEST, official)
    assert chosen == benchmark.select(items, lambda text: 100, paper)
    books = [item for item in items if item.labels["task"] == "books"]
    assert all(item.messages[0]["content"].count("[story text]") == helmet.SHOTS for item in books)
    assert books[0].facts == {"points": ["It rained.", "Nobody left."], "expert": "It rained."}


def test_mrcr_bins_by_tokens(samples):
    benchmark, items, _ = load("mrcr", samples)
    placed = benchmark.place(items[0], lambda text: 6_000)
    if o200k() is None:
        assert placed.labels["model's tokens"] == "16K-32K"
    else:
        assert placed.labels["o200k tokens"] == "4K-8K"


def test_a_set_may_be_the_data_folder_itself_but_only_for_one_benchmark(samples):
    folder = samples / "aime25"
    assert len(load("aime25", folder, alone=True)[1]) == 2
    with pytest.raises(SpellError, match=r"math-ai/aime25"):
        load("aime25", folder, alone=False)


def test_broken_rows_are_counted(tmp_path):
    good = {"_id": "a", "input": "Who?", "context": "Text.", "answers": ["Ada"]}
    rows = [
        json.dumps(good),
        "{not json",
        json.dumps([1]),
        json.dumps({**good, "answers": []}),
        json.dumps({**good, "answers": "Ada"}),
        json.dumps({**good, "input": None}),
        json.dumps({**good, "context": "  "}),
    ]
    folder = tmp_path / "LongBench"
    folder.mkdir()
    (folder / "musique.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    _, items, bad = load("musique", tmp_path)
    assert [item.id for item in items] == ["a"]
    assert bad == {"not JSON": 1, "not an object": 1, "no answers": 2, "no input": 1, "no context": 1}


@pytest.mark.parametrize(
    ("name", "folder", "row", "reason"),
    [
        (
            "docmath",
            "docmath/complong-testmini.jsonl",
            {"question": "?", "paragraphs": ["x"], "ground_truth": True},
            "ground_truth",
        ),
        ("frames", "frames/test.jsonl", {"Prompt": "?", "Answer": "x", "wiki_links": []}, "page texts"),
        ("longbench-v2", "longbench-v2/rows.jsonl", {"answer": "E"}, "A-D"),
        (
            "mrcr",
            "mrcr/2needle.jsonl",
            {"prompt": "[1]", "answer": "x", "random_string_to_prepend": "x"},
            "messages",
        ),
        ("aime24", "aime24/rows.jsonl", {"problem": "?"}, "no answer"),
    ],
)
def test_wrong_fields_are_named(name, folder, row, reason, tmp_path):
    path = tmp_path / folder
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    [benchmark] = find([name])
    data = Data(tmp_path)
    if name == "docmath":
        for subset in ("compshort", "simplong", "simpshort"):
            (path.parent / f"{subset}-testmini.jsonl").write_text("", encoding="utf-8")
    assert benchmark.load(data) == []
    [(found, count)] = data.bad.items()
    assert count == 1
    assert reason in found


def test_missing_data_says_where_it_looked(tmp_path):
    with pytest.raises(SpellError, match=re.escape(str(tmp_path / "math-ai/amc23"))):
        load("amc23", tmp_path)
    with pytest.raises(SpellError, match="does not exist"):
        load("amc23", tmp_path / "nowhere")


def test_unknown_benchmark_names_the_nearest():
    with pytest.raises(SpellError, match="did you mean docmath"):
        find(["docmaths"])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_pinned_files_must_not_change(samples, tmp_path, whole, alone):
    """Whether a data set was pinned or the folder of all of them."""
    folder = shutil.copytree(samples / "aime25", tmp_path / "aime25")
    pinned = pin(tmp_path if whole else folder)
    assert {Path(name).name for name in pinned} == {"aime2025-I.jsonl", "aime2025-II.jsonl"}
    assert len(load("aime25", tmp_path)[1]) == 2
    (folder / "aime2025-I.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(SpellError, match="manifest"):
        find(["aime25"])[0].load(Data(tmp_path, alone=alone))


def test_a_manifest_is_no_data(samples, tmp_path):
    """Though the files of FRAMES are any that end in .json."""
    folder = shutil.copytree(samples / "frames", tmp_path / "frames")
    before = len(load("frames", tmp_path)[1])
    pin(folder)
    assert len(load("frames", tmp_path)[1]) == before


def test_examples_of_labels_are_balanced_and_numbered_anew(samples):
    rows = [(f"text {i}", label) for i, label in enumerate("aaaaaabbbc")]
    shown = balanced(rows, 7)
    for first in (0, 3):  # a rare label has its example in every round
        assert sorted(label for _, label in shown[first : first + 3]) == ["a", "b", "c"]
    assert len(shown) == 7 and len(set(shown[:6])) == 5
    many = balanced([("x", "rare"), *((f"y{i}", "common") for i in range(50))], 20)
    assert Counter(label for _, label in many) == {"rare": 10, "common": 10}
    assert len(set(many)) == 11  # nothing else comes twice
    assert balanced([], 5) == []
    _, items, _ = load("helmet-icl", samples)
    one, other = (item for item in items if item.labels["set"] == "trec_fine")
    for item in (one, other):
        text = item.question
        examples = dict(re.findall(r"(Who is \d+\?)\nlabel: (\d+)", item.context))
        assert examples[text] == item.references[0]  # the sample's questions are among its examples
        assert len(set(examples.values())) == 3
        assert not item.messages[0]["content"].rstrip().endswith("label:")


def test_rare_entities_alone_are_asked_about(samples):
    _, items, _ = load("helmet-rag", samples)
    assert [item.question for item in items if item.labels["set"] == "popqa"] == [
        "Which river is number 1?",
        "Which river is number 2?",
    ]


def test_every_place_of_the_gold_passage_is_asked_about(tmp_path, monkeypatch):
    """HELMET draws questions, and asks all rows of each. PopQA's have an id: one question may be about two entities."""

    def row(name: str, number: int, depth: int) -> dict:
        passages = [{"title": "", "text": f"passage {place}"} for place in range(3)]
        passages.insert(depth, {"title": "gold", "text": f"gold of {number}"})
        fields = {"question": f"Who is {number}?", "answers": ["x"], "ctxs": passages, "s_pop": 10}
        return {**fields, **({"id": number, "question": "Who?"} if name == "popqa" else {})}

    (tmp_path / "helmet").mkdir()
    for name, files in helmet_rag.FILES.items():
        for file, count in zip(files, (5, 9), strict=True):
            rows = [row(name, number, depth) for number in range(count) for depth in range(3)]
            lines = "".join(json.dumps(one) + "\n" for one in rows)
            (tmp_path / "helmet" / file).write_text(lines, encoding="utf-8")
    monkeypatch.setattr(helmet_rag, "ROWS", 4)
    benchmark, items, _ = load("helmet-rag", tmp_path)
    chosen = benchmark.select(items, len, benchmark.terms("paper"))
    for name in helmet_rag.FILES:
        of_set = [item for item in chosen if item.labels["set"] == name]
        questions = sorted({item.id.split("-")[1] for item in of_set})
        assert len(questions) == 4
        assert [item.id for item in of_set] == [
            f"{name}-{n}-{depth}" for n in questions for depth in range(3)
        ]
        for item in of_set:
            _, number, depth = item.id.split("-")
            assert f"gold of {number}" in item.context.split("\n\n")[int(depth)]
            shown = item.messages[0]["content"].partition(item.context)[0]
            assert len(set(re.findall(r"gold of \d", shown)) - {f"gold of {number}"}) == helmet.SHOTS
            other = next(one for one in of_set if one.id == f"{name}-{number}-0")
            assert shown == other.messages[0]["content"].partition(other.context)[0]


HELD = Source("x/y", ("*.parquet",), "y")


def _text(value: bytes) -> pa.Array:
    """A text column of one value, whatever its bytes are."""
    return pa.Array.from_buffers(pa.string(), 1, pa.array([value]).buffers())


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([2**62], pa.timestamp("us")), "a value that Python cannot hold"),
        (pa.array([2**62], pa.duration("s")), "a value that Python cannot hold"),
        (pa.array([1], pa.time64("ns")), "a value that Python cannot hold"),
        (_text(b"\xff"), "not UTF-8"),
    ],
)
def test_a_value_that_cannot_be_read_is_one_rows_fault(tmp_path, column, reason):
    rows = pa.table({"a": pa.chunked_array([pa.nulls(2, column.type), column, pa.nulls(1, column.type)])})
    pq.write_table(rows, tmp_path / "rows.parquet", write_statistics=False)
    data = Data(tmp_path)
    assert list(data.rows(HELD)) == [{"a": None}] * 3
    assert data.bad == {reason: 1}


def test_a_damaged_parquet_file_is_named(tmp_path):
    chance, path = random.Random(0), tmp_path / "rows.parquet"
    texts = ["".join(chance.choices("abcdef", k=50)) for _ in range(2000)]
    pq.write_table(pa.table({"q": texts}), path, compression="snappy", use_dictionary=False)
    whole = path.read_bytes()
    for damaged in (whole[:200] + b"\xff" * 200 + whole[400:], whole[:50], b""):
        path.write_bytes(damaged)
        with pytest.raises(SpellError, match=r"rows\.parquet cannot be read"):
            list(Data(tmp_path).rows(HELD))


def test_a_damaged_archive_is_named(tmp_path):
    chance, (folder, path) = random.Random(0), (tmp_path / "LongBench", tmp_path / "LongBench" / "data.zip")
    folder.mkdir()
    row = {"input": "Who?", "answers": ["Ada"]}
    rows = [{**row, "context": "".join(chance.choices("abcdef", k=50))} for _ in range(200)]
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        archive.writestr("data/musique.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    whole = path.read_bytes()
    assert len(load("musique", tmp_path)[1]) == 200
    middle = len(whole) // 2
    for damaged in (
        whole[:middle] + b"\xff" * 99 + whole[middle + 99 :],  # the compressed data
        b"XXXX" + whole[4:],  # the member's own header
        whole.replace(b"\x08\x00", b"\x63\x00"),  # the kind of compression
        whole[:middle],
    ):
        path.write_bytes(damaged)
        with pytest.raises(SpellError, match=r"data\.zip cannot be read .*download it again"):
            load("musique", tmp_path)


def test_key_points_that_are_not_what_was_pinned_are_no_missing_ones(samples, tmp_path):
    folder = shutil.copytree(samples / "helmet", tmp_path / "helmet")
    path = folder / "infbench" / "longbook_sum_eng_keypoints.jsonl"
    assert Data(tmp_path).has(helmet.BOOK_POINTS)
    pin(folder)
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(SpellError, match="manifest"):
        load("helmet", tmp_path)
    path.unlink()
    assert not Data(tmp_path).has(helmet.BOOK_POINTS)


def test_a_case_without_key_points_is_a_question_that_cannot_be_judged(samples, tmp_path):
    folder = shutil.copytree(samples / "helmet", tmp_path / "helmet")
    path = folder / "multi_lexsum" / "multi_lexsum_val.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[0]["summary/short_keypoints"] = rows[0]["summary/long"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    benchmark, items, _ = load("helmet", tmp_path)
    first, second = (item for item in items if item.labels["task"] == "cases")
    assert first.facts == {"points": [], "expert": ""}
    assert second.facts["points"] == ["The court met."]
    grade = benchmark.grade(first, "Summary: The court met.", "spell")
    with pytest.raises(Unjudged, match="no key points"):
        asyncio.run(benchmark.judge(first, grade, None, "spell"))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ('[{"role": "user", "content": "half \\ud83d"}]', "not UTF-8"),
        ('[{"role": "\\udc00", "content": "half"}]', "not UTF-8"),
        ("[" * 200_000, "prompt is not JSON"),
    ],
)
def test_the_json_within_a_row_is_checked_too(tmp_path, prompt, reason):
    (tmp_path / "mrcr").mkdir()
    row = {"prompt": prompt, "answer": "z", "random_string_to_prepend": "p", "n_needles": 2}
    (tmp_path / "mrcr" / "2needle.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    _, items, bad = load("mrcr", tmp_path)
    assert (items, bad) == ([], {reason: 1})


ROW = {"wiki_items": [{"title": "T", "text": "body"}], "Prompt": "Q?", "Answer": "Café"}
LINE = json.dumps(ROW, ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "data", "items", "bad"),
    [
        ("test.jsonl", f"\ufeff{LINE}\n{LINE}".encode(), 2, {}),
        ("a.json", f"\ufeff[{LINE}, {LINE}]".encode(), 2, {}),
        ("test.jsonl", LINE.encode("cp1252") + b"\n" + LINE.encode(), 1, {"not UTF-8": 1}),
        ("a.json", b'{"data": [' + LINE.encode("cp1252") + b"]}", 0, {"not UTF-8": 1}),
        ("test.jsonl", LINE.replace("Q?", "\\ud800").encode(), 0, {"not UTF-8": 1}),
        ("test.jsonl", b"[" * 200_000 + b"\n" + LINE.encode(), 1, {"not JSON": 1}),
    ],
)
def test_odd_bytes_never_become_a_wrong_question(tmp_path, name, data, items, bad):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / name).write_bytes(data)
    _, loaded, counted = load("frames", tmp_path)
    assert (len(loaded), counted) == (items, bad)


@pytest.mark.parametrize("data", [b"null", b'{"data": null}', b'"text"', b"[" * 200_000])
def test_a_file_without_rows_is_named(tmp_path, data):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "a.json").write_bytes(data)
    with pytest.raises(SpellError, match=r"a\.json"):
        load("frames", tmp_path)
