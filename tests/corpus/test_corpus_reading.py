"""Documents as people have them: what is read of every type, what is left alone and why, and in how much memory."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from pyarrow import ipc, parquet
from typer.testing import CliRunner

from spell_megatron.config import CorpusConfig, SourceConfig
from spell_megatron.corpus import ClusterSampler
from spell_megatron.corpus.cleaning import clean
from spell_megatron.corpus.reading import Skipped, Text, opened, read, tables
from spell_megatron.corpus.reading.text import plain
from spell_megatron.tools.cli import app

pytestmark = pytest.mark.unit

ROWS = [{"text": f"row {i}: schön", "cluster": f"c{i % 2}", "n": i} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def texts_of(path: Path, **options: str) -> tuple[list[Text], Skipped]:
    skipped = Skipped()
    return list(read(SourceConfig(path=str(path), **options), skipped)), skipped  # type: ignore[arg-type]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.output_stream(sink, compression="zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("array.jsonl", json.dumps(ROWS).encode()),
        ("rows.json", LINES),
        ("array.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
        ("spread.json", b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS)),
        (
            "rows.csv",
            b"text,cluster\n" + b"".join(f'"{r["text"]}",{r["cluster"]}\n'.encode() for r in ROWS),
        ),
        ("rows.tsv", b"cluster\ttext\n" + b"".join(f"{r['cluster']}\t{r['text']}\n".encode() for r in ROWS)),
    ],
)
def test_rows_of_every_type_however_compressed(
    tmp_path: Path, name: str, content: bytes, packed: str
) -> None:
    (tmp_path / f"{name}{packed}").write_bytes(PACKERS[packed](content))
    texts, skipped = texts_of(tmp_path)
    assert [(text.text, text.cluster) for text in texts] == [(row["text"], row["cluster"]) for row in ROWS]
    assert not skipped.counts


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    """As `datasets.Dataset.save_to_disk` writes it: Arrow streams, and JSON about them."""
    table = pyarrow.Table.from_pylist(ROWS)
    folder = tmp_path / "train"
    folder.mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (folder / "dataset_info.json").write_text('{"features": {}}')
    with ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    with ipc.new_file(folder / "file.arrow", table.schema) as file:
        file.write_table(table)
    texts, skipped = texts_of(tmp_path)
    assert [text.text for text in texts] == 2 * [row["text"] for row in ROWS]
    assert skipped.counts == {"kept by a tool": 3}


def test_pages_give_their_text_without_what_surrounds_it(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        "<?xml version='1.0' encoding='UTF-8'?><html><head><title>Rates &amp; fees</title><style>p {x}</style></head>"
        "<body><nav>Home | About</nav><header>Bank</header><h1>Rates</h1><p>The rate is <b>4.5</b>&nbsp;%.</p>"
        "<table><tr><th>year</th><th>fee</th></tr><tr><td>2024</td><td>12</td></tr></table>"
        "<script>alert(1)</script><footer>Imprint</footer></body></html>",
        encoding="utf-8",
    )
    (tmp_path / "old.htm").write_bytes(
        "<html><head><meta charset='iso-8859-1'></head><body>schöne Grüße</body></html>".encode("latin-1")
    )
    (tmp_path / "empty.html").write_text("<html><body><nav>only this</nav></body></html>")
    (tmp_path / "deep.html").write_text("<div>" * 100_000)
    (old, page), skipped = texts_of(tmp_path)
    assert page.title == "Rates & fees"
    assert page.text.split() == ["Rates", "The", "rate", "is", "4.5", "%.", "year", "fee", "2024", "12"]
    assert old.text.strip() == "schöne Grüße"
    assert skipped.counts == {"empty": 2}


def test_a_page_of_ten_thousand_scripts_is_read_in_one_piece(tmp_path: Path) -> None:
    """Without them each text would be copied into what stands before it: for hours, on a page of 32 MiB."""
    words = [f"word{number}" for number in range(10_000)]
    page = "".join(f"<script>x</script>{word} <b hidden>y</b>" for word in words)
    (tmp_path / "page.html").write_text(f"<html><body><p>{page}</p></body></html>")
    texts, _ = texts_of(tmp_path)
    assert " ".join(text.text for text in texts).split() == words


def test_what_is_no_document_is_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("a secret")
    root = tmp_path / "root"
    for name in (
        ".git/config",
        ".gitattributes",
        ".DS_Store",
        "sub/.ipynb_checkpoints/a.md",
        "node_modules/x/readme.md",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("nothing that anybody wrote to be read")
    (root / "big.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    (root / "kept.txt").write_text("kept")
    (root / "link.txt").symlink_to("kept.txt")
    (root / "leaves.txt").symlink_to(outside)
    (root / "up").symlink_to(tmp_path)
    texts, skipped = texts_of(root)
    assert [text.name for text in texts] == ["kept.txt", "link.txt"]
    assert skipped.counts == {
        "hidden": 4,
        "kept by a tool": 1,
        "a pointer to a file that was not fetched": 1,
        "links that leave the folder": 1,
        "links to folders": 1,
    }


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "123"
    blobs = tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_bytes(LINES)
    (snapshot / "rows.jsonl").symlink_to("../../blobs/f00")
    texts, skipped = texts_of(snapshot)
    assert len(texts) == len(ROWS) and not skipped.counts


@pytest.mark.long
@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["bomb.txt", "bomb.jsonl", "bomb.json", "bomb.csv", "bomb.html"])
def test_what_unfolds_beyond_measure_is_left_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packed: str
) -> None:
    monkeypatch.setattr(opened, "FREE", 1 << 20)
    monkeypatch.setattr(opened, "RATIO", 2)
    start = {"bomb.json": b"[1,", "bomb.csv": b"text\n"}.get(name, b"")
    row = b'{"text": "again"}' + (b"," if name == "bomb.json" else b"\n")
    (tmp_path / f"{name}{packed}").write_bytes(PACKERS[packed](start + row * 300_000))
    (tmp_path / "kept.txt").write_text("kept")
    texts, skipped = texts_of(tmp_path)
    assert skipped.counts["unfolding beyond measure"] == 1
    assert sum(len(text.text) for text in texts) <= 1 << 20
    assert texts[-1].text == "kept"


def test_damage_in_the_middle_of_compressed_data(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = "\n".join(f"{draw.random()}" for _ in range(20_000)).encode()
    for packed in (".gz", ".bz2", ".xz", ".zst"):
        data = bytearray(PACKERS[packed](whole))
        data[len(data) // 2 :] = data[len(data) // 2 : -100]
        (tmp_path / f"torn.txt{packed}").write_bytes(data)
    _, skipped = texts_of(tmp_path)
    assert skipped.counts.total() == 4
    assert skipped.counts.keys() <= {"damaged", "unreadable"}


NAMES = [
    b"caf\xe9.txt",
    "naïve\u2028name.txt".encode(),
    b"new\nline.txt",
    b"esc\x1b[31m.txt",
    b"n" * 250 + b".txt",
]


def test_no_name_ends_the_corpus(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(f"text number {number}".encode())
    rows = [
        {"text": f"text of row {n}", "title": f"half \ud800 {n}", "cluster": key}
        for n, key in enumerate(["a\ud800", "a\ud801", "b\x00c", 7, ["x"], {"y": 1}, "line\nbreak"])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampler = ClusterSampler(
        CorpusConfig(sources=(SourceConfig(path=str(tmp_path)),), cluster_tokens=50),
        lambda text: len(text.split()),
        0,
    )
    documents = {
        document.text: document
        for cluster, _ in sampler.draw(3 * sampler.domains[tmp_path.name])
        for document in cluster.documents
    }
    assert len(documents) == len(NAMES) + len(rows)
    for document in documents.values():
        for shown in (document.id, document.title):
            shown.encode("utf-8")
            assert shown.isprintable() and len(shown) <= 420


@settings(deadline=None)
@given(st.text(st.characters()), st.text(st.characters()))
def test_names_that_differ_stay_apart_and_are_one_printable_line(one: str, other: str) -> None:
    for name in (one, other):
        assert "\n" not in plain(name) and "\x1b" not in plain(name)
        plain(name).encode("utf-8")
    surrogates = [f"{a}\ud800" for a in (one, other)]
    if one.strip() != other.strip() and max(map(len, surrogates)) < 100 and (one + other).isprintable():
        assert plain(surrogates[0]) != plain(surrogates[1])


@pytest.mark.parametrize(
    "mark", ["\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
)
def test_whatever_ends_a_line_keeps_words_apart(mark: str) -> None:
    assert clean(f"one{mark}two") == "one\ntwo"
    assert clean(f"one{mark}\n{mark}two") in ("one\n\ntwo", "one\n\ntwo\n")


def test_a_text_in_utf_16(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Grüße aus Köln\n", encoding="utf-16")
    (tmp_path / "bom.txt").write_text("\ufeffwith a mark\n", encoding="utf-8")
    (bom, notes), _ = texts_of(tmp_path)
    assert notes.text == "Grüße aus Köln\n" and bom.text == "with a mark\n"


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    (tmp_path / "semicolons.csv").write_bytes(
        '\ufefftitle;text\r\nA;"two\r\nlines; and a ""quote"""\r\nB;short\r\nC;too;many\r\nD\r\n'.encode()
    )
    texts, skipped = texts_of(tmp_path)
    assert [(t.title, t.text) for t in texts] == [("A", 'two\r\nlines; and a "quote"'), ("B", "short")]
    assert skipped.counts == {"with more fields than the header": 1, "empty": 1}


def test_csv_begins_where_something_stands(tmp_path: Path) -> None:
    (tmp_path / "late.csv").write_bytes(b"\r\n \r\n\ntitle,text\r\nA,one\r\n")
    (tmp_path / "blank.csv").write_bytes(b"\n\n")
    texts, skipped = texts_of(tmp_path)
    assert [(t.title, t.text) for t in texts] == [("A", "one")]
    assert skipped.counts == {"empty": 1}


def test_a_row_of_csv_that_cannot_be_decoded_is_lost_alone(tmp_path: Path) -> None:
    rows = ["title,text", 'A,"one\nand more"', "B,caf\xe9", "C,three", "D\xff,four"]
    (tmp_path / "mixed.csv").write_bytes("\n".join(rows).encode("latin-1"))
    texts, skipped = texts_of(tmp_path)
    assert [t.text for t in texts] == ["one\nand more", "three"]
    assert skipped.counts == {"not UTF-8": 2}
    assert skipped.first == {"not UTF-8": "mixed.csv line 4: not UTF-8"}


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_a_quotation_mark_that_is_never_closed_makes_no_text_of_the_rows_after_it(
    tmp_path: Path, suffix: str, mark: str
) -> None:
    rows = ["title,text", "A,one", 'B,"two', "C,three", "D,four"]
    (tmp_path / f"open.{suffix}").write_text("\n".join(rows).replace(",", mark))
    texts, skipped = texts_of(tmp_path)
    assert [t.text for t in texts] == ["one"]
    assert "a quotation mark in line 3 is never closed" in skipped.first["damaged"]


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_csv_as_excel_writes_unicode(tmp_path: Path, order: str) -> None:
    """Of the third, a half of a character is all that is left; Gurmukhi has the byte of a line's end in each letter."""
    content = "\ufefftitle\ttext\r\nA\tGrüße 😀\r\nB\tਅਆ\r\nC\thalf \ud83d\r\nD\tfour\r\n"
    (tmp_path / "unicode.csv").write_bytes(content.encode(order, "surrogatepass"))
    texts, skipped = texts_of(tmp_path)
    assert [(t.title, t.text) for t in texts] == [("A", "Grüße 😀"), ("B", "ਅਆ"), ("D", "four")]
    assert skipped.first == {"not UTF-8": "unicode.csv line 4: not UTF-8"}


def test_a_row_of_csv_beyond_the_bound_is_skipped_or_ends_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that goes on over lines has no end that could be told without reading it."""
    monkeypatch.setattr(tables, "ROW_BYTES", 1 << 20)
    size, long = 1 << 20, "x" * (1 << 20)
    just = "A," + "y" * (size - 3)
    (tmp_path / "a.csv").write_text(f"title,text\n{just}\nB,{long}\nC,{long * 3}\r\nD,four\nE,{long}")
    (tmp_path / "b.csv").write_text(f'title,text\nA,one\nB,"two\n{long}"\nC,three\n')
    lines = "\n".join(["z" * 999] * 1_100)
    (tmp_path / "c.csv").write_text(f'title,text\nA,one\nB,"{lines}"\nC,three\n')
    texts, skipped = texts_of(tmp_path)
    assert [(t.name, t.title) for t in texts] == [
        ("a.csv#1", "A"),
        ("a.csv#2", "D"),
        ("b.csv#1", "A"),
        ("c.csv#1", "A"),
    ]
    assert skipped.counts == {"longer than 1 MiB": 3, "damaged": 2}
    assert skipped.first == {
        "longer than 1 MiB": "a.csv line 3: longer than 1 MiB",
        "damaged": "b.csv: damaged (a row of more than 1 MiB; what follows is not read)",
    }


@pytest.fixture
def cell_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of the corpus' cells, while another reader of the process has none."""
    monkeypatch.setattr(tables, "_CELL_BYTES", 1000)
    before = csv.field_size_limit(sys.maxsize)
    yield 1000
    csv.field_size_limit(before)


@pytest.mark.parametrize("header", [False, True])
def test_a_cell_of_csv_beyond_the_bound_ends_its_file(tmp_path: Path, cell_limit: int, header: bool) -> None:
    long = "x" * (cell_limit + 1)
    rows = f"{long},text\nA,one\n" if header else f"title,text\nA,one\nB,{long}\nC,three\n"
    (tmp_path / "a.csv").write_text(rows)
    (tmp_path / "b.csv").write_text("title,text\nD,four\n")
    texts, skipped = texts_of(tmp_path)
    assert [text.title for text in texts] == (["D"] if header else ["A", "D"])
    assert skipped.counts == {"damaged": 1}


def test_a_line_of_csv_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROW_BYTES", 1 << 20)
    (tmp_path / "a.csv").write_bytes(b"text\none\n" + b"x" * (30 << 20) + b"\ntwo\n")
    tracemalloc.start()
    try:
        texts, _ = texts_of(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [text.text for text in texts] == ["one", "two"]
    assert peak < 12 << 20


@pytest.mark.long
def test_what_cannot_be_opened_stops_nothing_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "shut").mkdir()
    (tmp_path / "wide.txt").write_text("four bytes each", encoding="utf-32")
    (tmp_path / "whole.txt").write_text("whole")
    listed = os.scandir

    def shut(folder: str) -> Any:
        if str(folder).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", shut)  # no mode shuts a folder to root
    skipped = Skipped()
    assert [text.text for text in read(SourceConfig(path=str(tmp_path)), skipped)] == ["whole"]
    assert skipped.counts == {"not a regular file": 2, "unreadable": 1, "binary": 1}
    assert skipped.first["unreadable"] == "shut: unreadable (Permission denied)"


def test_a_survey_shows_what_a_run_would_read(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(" ".join(f"w{number}x{i}" for i in range(400)))
    (tmp_path / "again.txt").write_text((tmp_path / "1.txt").read_text())
    (tmp_path / "[red] bad.csv").write_text("a,b\n1,2\n")
    command = [
        "corpus",
        str(tmp_path),
        "group_by=random",
        "corpus.cluster_tokens=2000",
        "--samples",
        "2",
        "--json",
    ]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    found = json.loads(done.stdout.splitlines()[-1])
    (facts,) = found["sources"].values()
    assert facts["documents"] == 30 and facts["duplicates"] == 1
    assert facts["skipped"] == {"without a column 'text'": 1}
    assert 1 <= facts["lengths"]["documents"][0] <= facts["lengths"]["documents"][-1] <= 20
    assert facts["lengths"]["tokens"][-1] <= 2000
    assert len(found["samples"]) == 2 and all(cluster["documents"] for cluster in found["samples"])
    assert "[red] bad.csv" in done.stderr


def test_a_mistyped_key_of_a_source_is_answered_with_the_nearest() -> None:
    done = CliRunner().invoke(app, ["corpus", "/somewhere", "group_bi=random"])
    assert done.exit_code == 2 and "did you mean 'group_by'" in done.stderr


CHILD = """
import sys
from pathlib import Path
from typing import Any
from spell_megatron.config import CorpusConfig, SourceConfig
from spell_megatron.corpus import ClusterSampler
from spell_megatron.corpus.reading import files, pages, tables  # what reading imports counts as the base
import pyarrow.parquet, pyarrow.ipc, inscriptis

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10

longest = 0
def count(text):
    global longest
    longest = max(longest, len(text))
    return len(text) // 4

before = peak()
sampler = ClusterSampler(CorpusConfig(sources=(SourceConfig(path=sys.argv[1]),)), count, 0, Path(sys.argv[2]))
sys.stdout.write(f"{peak() - before} {longest} {len(sampler.draw(20))}")
"""


@pytest.fixture(scope="module")
def long_text() -> str:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(5000)]
    return " ".join(" ".join(draw.sample(words, 1000)) for _ in range(7_200))


def measured(source: Path, prepared: Path, memory: int | None = None) -> tuple[int, int, int]:
    """Memory in MiB that a corpus took, the longest text that was counted, and the clusters that were drawn; within
    `memory` bytes of address space."""
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (memory, memory)) if memory else None
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(prepared)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    mib, longest, drawn = map(int, done.stdout.split())
    return mib, longest, drawn


@pytest.mark.long
@pytest.mark.parametrize("kind", ["jsonl", "json.gz", "parquet"])
def test_a_text_of_fifty_megabytes_takes_little_memory(tmp_path: Path, long_text: str, kind: str) -> None:
    assert len(long_text) > 50e6
    path = tmp_path / "in" / f"long.{kind}"
    path.parent.mkdir()
    row = json.dumps({"text": long_text}).encode()
    match kind:
        case "jsonl":
            path.write_bytes(row + b"\n")
        case "json.gz":
            path.write_bytes(gzip.compress(b"[" + row + b"]", 1))
        case "parquet":
            parquet.write_table(pyarrow.table({"text": [long_text]}), path)
    mib, longest, drawn = measured(path.parent, tmp_path / "out")
    assert drawn == 20
    assert longest <= 1 << 15, "a tokenizer takes a hundred times what it is given"
    assert mib <= 300


_OBJECTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=9) | st.sampled_from(['"', "\\", '\\"]}', "[{,"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


def nested(depth: int) -> bytes:
    return b"[" * depth


def objects(depth: int) -> bytes:
    return b'[{"text": "sound"}, ' + b'{"a": ' * depth


def page(cell: int, rows: int) -> bytes:
    row = "<tr><!-- remark --><td>short</td><td>cell</td></tr>"
    return f"<html><body><table><tr><td>{'x' * cell}</td></tr>{row * rows}</table></body></html>".encode()


def tall(lines: int) -> bytes:
    return f"<html><body><table><tr><td>{'<br>' * lines}</td><td>{'x' * lines}</td></tr></table></body></html>".encode()


def lists(depth: int, items: int) -> bytes:
    return f"<html><body>{'<ul><li>' * depth}{'<p>item</p>' * items}</body></html>".encode()


def shared(rows: int, text: str) -> pyarrow.Table:
    return pyarrow.table({"text": [text] * rows, "question": [f"{i}?" for i in range(rows)]})


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["nested", "objects", "page", "tall", "lists", "parquet", "nested parquet", "arrow"]
)
def test_a_small_file_takes_little_memory(tmp_path: Path, kind: str) -> None:
    """What a few kilobytes can be made to unfold to: brackets, columns as wide as one cell, a value of all rows."""
    folder, text = tmp_path / "in", "Nora lives in Ypres. " * 40_000
    folder.mkdir()
    (folder / "sound.txt").write_text("A text that is read whatever lies beside it. " * 20)
    match kind:
        case "nested":
            (folder / "deep.json").write_bytes(nested(100_000))
        case "objects":
            (folder / "deep.jsonl").write_bytes(objects(100_000))
        case "page":
            (folder / "wide.html").write_bytes(page(100_000, 10_000))
        case "tall":
            (folder / "tall.html").write_bytes(tall(30_000))
        case "lists":
            (folder / "lists.html").write_bytes(lists(120, 60_000))
        case "parquet":
            parquet.write_table(shared(600, text), folder / "shared.parquet")
        case "nested parquet":
            table = pyarrow.table({"text": [[text, text]] * 300})
            parquet.write_table(table, folder / "shared.parquet")
        case "arrow":
            table = shared(600, text)
            encoded = table.set_column(0, "text", table["text"].dictionary_encode())
            with pyarrow.ipc.new_stream(folder / "shared.arrow", encoded.schema) as stream:
                stream.write_table(encoded)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2 << 20
    mib, _, drawn = measured(folder, tmp_path / "out", 6 << 30)
    assert drawn == 20
    assert mib <= 300


@pytest.mark.long
def test_different_texts_of_one_row_group_take_little_memory(tmp_path: Path) -> None:
    """Nothing is kept of the rows before."""
    folder, draw = tmp_path / "in", random.Random(0)
    folder.mkdir()
    texts = [draw.randbytes(1_000).hex() for _ in range(50_000)]
    parquet.write_table(pyarrow.table({"text": texts}), folder / "texts.parquet", row_group_size=len(texts))
    assert measured(folder, tmp_path / "out")[0] <= 150


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_row_of_an_array_is_lost_alone(tmp_path: Path, name: str) -> None:
    """An id of 64 bits without a sign, as hashes are; what Python writes and JSON has not; a number without end."""
    rows = (
        *('{"text": "one", "id": 18446744073709551615}', '{"text": "two", "x": 1e999, "y": NaN}', "{broken}"),
        *(
            '{"x": ' + "9" * 5_000 + "}",
            '{"text": "three ]}, \\"[{"}',
            '{"deep": ' + "[" * 5_000 + "]" * 5_000 + "}",
        ),
        *("17", '{"text": "four"}'),
    )
    (tmp_path / name).write_text(f"[{', '.join(rows)}]")
    found, skipped = texts_of(tmp_path)
    assert [text.text for text in found] == ["one", "two", 'three ]}, "[{', "four"]
    assert skipped.counts == {"not JSON": 3, "not a JSON object": 1}


@settings(deadline=None)
@given(st.lists(_OBJECTS, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
def test_values_are_told_apart_wherever_blocks_end(
    values: list[Any], indent: int | None, in_array: bool, size: int
) -> None:
    texts = [json.dumps(value, indent=indent, ensure_ascii=False) for value in values]
    written = f"[{','.join(texts)}]" if in_array else "\n".join(texts)

    class Small(io.BytesIO):
        """Gives a few bytes at a time, as a compressed file may."""

        def read(self, _: int | None = -1) -> bytes:
            return super().read(size)

    skipped = Skipped()
    assert list(tables._items(Small(written.encode()), "x", skipped)) == values  # type: ignore[arg-type]
    assert not skipped.counts


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("content", "texts", "counts"),
    [
        ('[{"text": "a"}, {"text": "b"}]\n[{"text": "c"}, {"text": "d"}]', "abcd", {}),
        ('\ufeff[{"text": "a"}]\n\ufeff[{"text": "b"}]', "ab", {}),
        ('[{"text": "a"}, {"text": "b"]}, {"text": "c"}, {"text": "d"}]', "acd", {"not JSON": 2}),
        ('[{"text": "a"}] and so on', "a", {"not JSON": 1}),
        ('["a"]\n{"text": "b"}\n{"text": "c"}', "bc", {"not a JSON object": 1}),
    ],
)
def test_what_stands_behind_an_array_is_read_or_counted(
    tmp_path: Path, name: str, content: str, texts: str, counts: dict[str, int]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    found, skipped = texts_of(tmp_path)
    assert "".join(text.text for text in found) == texts
    assert skipped.counts == counts


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([0, 2**62, 1], pyarrow.timestamp("us")),
        pyarrow.array([0, 2**62, 1], pyarrow.duration("s")),
        pyarrow.array([b"x", b"\xff", b"z"], pyarrow.binary()).view(pyarrow.string()),
    ],
    ids=lambda column: str(column.type),
)
def test_a_row_with_a_value_that_python_cannot_hold_is_lost_alone(
    tmp_path: Path, kind: str, column: pyarrow.Array
) -> None:
    table = pyarrow.table({"text": ["one", "two", "three"], "cluster": column})
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "rows.parquet")
    else:
        with ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
            stream.write_table(table)
    for options in ({}, {"text_field": "*"}):
        found, skipped = texts_of(tmp_path, **options)
        assert [text.text for text in found if len(text.text) > 1] == ["one", "three"]
        assert skipped.counts == {"with a value that cannot be read": 1}
        assert f"rows.{kind} row 2: " in skipped.first["with a value that cannot be read"]


def test_a_file_that_ends_within_a_value_is_said_to(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"text": "one"}, {"text": "tw')
    (text,), skipped = texts_of(tmp_path)
    assert text.text == "one"
    assert "ends within a value" in skipped.first["not JSON"]


@pytest.mark.parametrize("attribute", ["hidden", "role='banner'"])
def test_a_page_that_is_furniture_as_a_whole_ends_nothing(tmp_path: Path, attribute: str) -> None:
    (tmp_path / "a.html").write_text(f"<html {attribute}><body><p>Words of a page.</p></body></html>")
    (tmp_path / "b.txt").write_text("Words of a text.")
    found, _ = texts_of(tmp_path)
    assert [text.text.strip() for text in found] == ["Words of a page.", "Words of a text."]


def test_a_page_within_a_form_and_one_with_an_empty_main_part_have_their_text(tmp_path: Path) -> None:
    blank = "\n" + " " * 400  # of its markup, which weighs nothing
    asked = f"<form action='/find'>{blank}<label>Find it</label>{blank}<input></form>"
    (tmp_path / "form.html").write_text(
        f"<title>News</title><nav>Home</nav><form id='aspnetForm'><div>{'Words of a page. ' * 9}</div></form>{asked}"
    )
    (tmp_path / "main.html").write_text(f"<main> </main>{asked}<p>{'Words of a page. ' * 9}</p>")
    found, skipped = texts_of(tmp_path)
    assert [" ".join(text.text.split()) for text in found] == [" ".join(["Words of a page."] * 9)] * 2
    assert not skipped.counts


def test_tables_of_an_ordinary_page_are_laid_out(tmp_path: Path) -> None:
    """A remark in a row, a table within a cell, and a cell of many lines beside many rows."""
    inner = "<table><tr><!-- a --><td>Oslo</td><td>12</td></tr><tr><td>Ypres</td><td>7</td></tr></table>"
    long = "".join(f"<p>line {i}</p>" for i in range(4_000))
    rows = "".join(f"<tr><td>name {i}</td><td>{i}</td></tr>" for i in range(200))
    (tmp_path / "a.html").write_text(f"<table><tr><td>{inner}</td><td>{long}</td></tr>{rows}</table>")
    (text,), _ = texts_of(tmp_path)
    lines = text.text.splitlines()
    assert any(line.split()[:2] == ["Oslo", "12"] for line in lines)
    assert any(line.split() == ["name", "150", "150"] for line in lines)


def test_a_table_without_end_keeps_its_words(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(page(20_000, 2_000))
    (text,), _ = texts_of(tmp_path)
    assert text.text.count("short") == text.text.count("cell") == 2_000
    assert len(text.text) < 200_000


def test_a_cell_without_an_end_is_no_burden(tmp_path: Path) -> None:
    (tmp_path / "open.csv").write_bytes(b'text\nfine\n"never closed' + b" and on" * 3_000_000)
    (text,), skipped = texts_of(tmp_path)
    assert text.text == "fine"
    assert skipped.counts == {"damaged": 1}
    assert "what follows is not read" in skipped.first["damaged"]
