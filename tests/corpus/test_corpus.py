"""Corpora: every fault of a file is skipped and counted, clusters keep their limits, draws resume exactly."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.config import CorpusConfig, HeldOutConfig, SourceConfig
from spell_megatron.corpus import ClusterSampler, load_heldout
from spell_megatron.corpus.cleaning import clean, fingerprint, sketch
from spell_megatron.corpus.clustering import Filler, passages, similar
from spell_megatron.corpus.reading import Skipped, Text, read
from spell_megatron.corpus.sampler import permuted
from spell_megatron.corpus.store import ClusterStore
from spell_megatron.types import Cluster, SpellError

pytestmark = pytest.mark.unit


def words(text: str) -> int:
    return len(text.split())


def prose(seed: int, length: int) -> str:
    """Text without repetition: every word occurs once in the whole corpus."""
    return " ".join(f"w{seed}x{i}" for i in range(length))


def texts_of(path: Path, **options: object) -> tuple[list[Text], Skipped]:
    skipped = Skipped()
    return list(read(SourceConfig(path=str(path), **options), skipped)), skipped  # type: ignore[arg-type]


def sampler_of(
    path: Path, *, tokens: int = 100, documents: int = 20, seed: int = 0, **options: object
) -> ClusterSampler:
    source = SourceConfig(path=str(path), **options)  # type: ignore[arg-type]
    return ClusterSampler(
        CorpusConfig(sources=(source,), cluster_tokens=tokens, max_documents=documents), words, seed
    )


def whole_epoch(sampler: ClusterSampler) -> list[Cluster]:
    """Each cluster once."""
    clusters = {cluster.id: cluster for cluster, _ in sampler.draw(3 * sum(sampler.domains.values()))}
    return list(clusters.values())


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- reading


def test_a_folder_gives_its_texts_and_names_what_it_skips(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("Ein schöner Text", encoding="utf-8")
    (tmp_path / "a" / "two.md").write_text("# Two", encoding="utf-8")
    (tmp_path / "a" / "GPL-3.1").write_text("a licence, its version for an ending")
    with gzip.open(tmp_path / "zipped.txt.gz", "wt") as file:
        file.write("zipped text")
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0\1")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.md").write_text(" \n\n ")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"text " * 9999)[:60])
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    os.mkfifo(tmp_path / "pipe.txt")
    with caplog.at_level(logging.WARNING):
        texts, skipped = texts_of(tmp_path)
    assert {(text.name, text.cluster) for text in texts} == {
        ("a/GPL-3.1", "a"), ("a/one.txt", "a"), ("a/two.md", "a"), ("zipped.txt.gz", ""),
    }  # fmt: skip
    assert skipped.counts == {
        "not UTF-8": 1, "binary": 1, "empty": 2, "damaged": 1, "of another type": 1, "not a regular file": 1,
    }  # fmt: skip
    assert "latin.txt: not UTF-8 (byte 0xf6)" in caplog.text


def test_one_kind_of_fault_does_not_flood_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(50):
        (tmp_path / f"{number}.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        _, skipped = texts_of(tmp_path)
    assert skipped.counts["empty"] == 50
    assert len(caplog.records) < 6


def test_a_huge_text_is_read_in_parts_that_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spell_megatron.corpus.reading.files.PART", 101)
    text = "\n\n".join(f"Absatz {i} mit Umläuten äöü und dem Zeichen 𝄞." for i in range(60))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    texts, skipped = texts_of(tmp_path)
    assert "".join(part.text for part in texts) == text
    assert len(texts) > 10
    assert not skipped.counts


def test_json_lines_survive_every_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spell_megatron.corpus.reading.tables.ROW_BYTES", 4096)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + b'{"text": "first", "cluster": 7, "title": "T"}\n'
        b"\n"
        b'{"text": "torn\n'
        b"[1, 2]\n"
        b'{"text": "sch\xf6n"}\n'
        b'{"text": 12}\n'
        b'{"text": null}\n'
        b'{"other": "x"}\n' + b"[" * 4000 + b"\n"
        b'{"text": "' + b"x" * 9000 + b'"}\n'
        b'{"text": "last \\ud800"}\n'
    )
    texts, skipped = texts_of(path)
    assert [(text.text[:5], text.cluster, text.title) for text in texts] == [
        ("first", "7", "T"), ("last ", "rows.jsonl", ""),
    ]  # fmt: skip
    assert skipped.counts == {
        "not JSON": 2, "not a JSON object": 1, "not UTF-8": 1, "without text in 'text'": 1, "empty": 1,
        "without a column 'text'": 1, "longer than 0 MiB": 1,
    }  # fmt: skip


def test_a_missing_column_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"txt": "a", "n": 1}] * 3)
    with pytest.raises(
        SpellError, match=r"without a column 'text' \(did you mean text_field: txt\? columns: n, txt\)"
    ):
        sampler_of(tmp_path)


def test_rows_before_and_between_the_ones_with_a_text_cost_no_other(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": 0}, {"text": "first"}, {"id": 1}, {"content": "second"}, {"text": "third"},
    ]  # fmt: skip
    write_lines(tmp_path / "rows.jsonl", rows)
    texts, skipped = texts_of(tmp_path / "rows.jsonl")
    assert [text.text for text in texts] == ["first", "second", "third"]
    assert skipped.counts == {"without a column 'text'": 2}


def test_a_file_of_other_things_is_not_read_to_its_end(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"id": 1}] * 1500 + [{"text": "late"}])
    texts, skipped = texts_of(tmp_path / "rows.jsonl")
    assert not texts and skipped.counts == {"without a column 'text'": 1000}


@pytest.mark.parametrize("layout", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_the_layouts_of_published_corpora(tmp_path: Path, layout: str) -> None:
    def write(folder: Path, rows: list[dict[str, object]]) -> Path:
        folder.mkdir()
        path = folder / f"part-0.{layout}"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        match layout:
            case "jsonl":
                path.write_text(lines)
            case "jsonl.gz":
                path.write_bytes(gzip.compress(lines.encode()))
            case "json":
                path.write_text(json.dumps(rows))
            case "parquet":
                import pyarrow
                from pyarrow import parquet

                parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return folder

    fineweb = write(
        tmp_path / "fineweb", [{"content": f"page {i}", "score": 0.9, "source": "w"} for i in range(3)]
    )
    assert [text.text for text in texts_of(fineweb)[0]] == ["page 0", "page 1", "page 2"]

    rows = [{"question_id": f"q{i}", "question": "?", "paragraphs": [f"a{i}", f"| b{i} |"]} for i in range(2)]
    docmath = write(tmp_path / "docmath", rows)  # type: ignore[arg-type]
    assert [(t.cluster, t.text) for t in texts_of(docmath)[0]] == [
        ("q0", "a0\n\n| b0 |"),
        ("q1", "a1\n\n| b1 |"),
    ]


def test_damaged_parquet_does_not_stop_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    (tmp_path / "b.txt").write_text("usable")
    texts, skipped = texts_of(tmp_path)
    assert [text.text for text in texts] == ["usable"]
    assert skipped.counts == {"damaged": 1}


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpellError, match="neither a file, a folder nor a hub id"):
        sampler_of(tmp_path / "missing")

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("the network is unreachable")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", offline)
    with pytest.raises(SpellError, match="org/name cannot be listed: the network is unreachable"):
        ClusterSampler(CorpusConfig(sources=(SourceConfig(path="org/name"),)), words, 0)


def test_a_hub_data_set_is_read_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = write_lines(tmp_path / "x.jsonl", [{"text": "from the hub"}])
    names = ["README.md", "data/a.jsonl", "data/b.jsonl", "other/c.jsonl"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo, repo_type: names)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name, repo_type: str(local))
    texts = list(read(SourceConfig(path="org/name:data/*"), Skipped()))
    assert [(text.name, text.text) for text in texts] == [
        ("data/a.jsonl#1", "from the hub"), ("data/b.jsonl#1", "from the hub"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content", [{}, {"a.txt": b""}, {"a.txt": b"\0\1"}, {"a.bin": b"x", "b.txt": b"\xff"}]
)
def test_a_corpus_without_usable_text_says_what_was_skipped(
    tmp_path: Path, content: dict[str, bytes]
) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SpellError, match="has no usable text") as error:
        sampler_of(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert all(name in str(error.value) for name in content)


# ---- cleaning


@settings(deadline=None)
@given(st.text())
def test_cleaning_is_final_and_leaves_nothing_that_cannot_be_stored(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert not any(ord(c) < 32 and c not in "\n\t" for c in once)
    once.encode("utf-8")


def test_cleaning_takes_no_quadratic_time() -> None:
    assert clean(" " * 2_000_000 + "x" + "\n \n" * 500_000) == " " * 2_000_000 + "x"


@settings(deadline=None)
@given(st.text())
def test_case_and_white_space_do_not_make_a_new_text(text: str) -> None:
    assert fingerprint(f"  {text.lower()}\n") == fingerprint(text.lower())


def test_near_duplicates_share_a_band_and_other_texts_do_not() -> None:
    base = [f"word{i * i % 977}" for i in range(400)]
    edited = [*base[:200], "another", *base[201:]]
    other = [f"word{i * 31 % 991}" for i in range(400)]
    assert set(sketch(" ".join(base))) & set(sketch(" ".join(edited)))
    assert not set(sketch(" ".join(base))) & set(sketch(" ".join(other)))


def test_short_texts_that_differ_in_one_figure_are_both_kept(tmp_path: Path) -> None:
    for price in range(10):
        (tmp_path / f"{price}.txt").write_text("Prices of the shop. " * 8 + f"Bread costs {price} coins.")
    (tmp_path / "again.txt").write_text("prices of the shop. " * 8 + "Bread costs  3 COINS.\n")
    sampler = sampler_of(tmp_path, tokens=5000)
    assert sum(len(cluster.documents) for cluster in whole_epoch(sampler)) == 10


def test_a_chain_of_near_duplicates_does_not_end_with_its_first_text(tmp_path: Path) -> None:
    """Each version changes a few words of the one before: the last has nothing in common with the first."""
    draw, words = random.Random(1), [f"w{i}" for i in range(5000)]
    version, lines = draw.choices(words, k=400), []
    for _ in range(80):
        lines.append(json.dumps({"text": " ".join(version)}) + "\n")
        start = draw.randrange(388)
        version[start : start + 12] = draw.choices(words, k=12)
    (tmp_path / "versions.jsonl").write_text("".join(lines) + lines[0])
    facts = sampler_of(tmp_path, tokens=20_000).facts[tmp_path.name]
    assert facts["documents"] + facts["duplicates"] == len(lines) + 1
    assert 10 < facts["documents"] < 30


# ---- clusters


@settings(deadline=None)
@given(st.text(alphabet="ab .\n", max_size=400), st.integers(1, 80))
def test_passages_lose_nothing_and_keep_their_size(text: str, size: int) -> None:
    parts = passages(text, size)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(0 < len(part) <= size for part in parts)


def test_passages_end_with_paragraphs() -> None:
    paragraphs = [f"Paragraph {i}. " + "It goes on. " * 5 for i in range(20)]
    assert all(part.startswith("Paragraph") for part in passages("\n\n".join(paragraphs), 250))


Sizes = st.lists(st.integers(1, 50), max_size=60)


@settings(deadline=None)
@given(Sizes, st.integers(1, 8), st.integers(1, 8))
def test_filling_uses_every_document_once_within_the_limits(sizes: list[int], limit: int, bins: int) -> None:
    filler = Filler(100, limit, bins)
    clusters = [
        full for i, size in enumerate(sizes) if (full := filler.add(i, size)) is not None
    ] + filler.close()
    assert sorted(i for cluster in clusters for i in cluster) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in cluster) <= 100 and len(cluster) <= limit for cluster in clusters)


@settings(deadline=None)
@given(Sizes)
def test_similar_documents_are_used_once_within_the_limits(sizes: list[int]) -> None:
    block = [(i, size, f"topic{i % 3} word{i}") for i, size in enumerate(sizes)]
    clusters = list(similar(block, 100, 5))
    assert sorted(i for cluster in clusters for i in cluster) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in cluster) <= 100 and len(cluster) <= 5 for cluster in clusters)


def test_similarity_keeps_topics_apart(tmp_path: Path) -> None:
    topics = {
        "sea": "ship sail harbour wave anchor storm mast",
        "kitchen": "bread oven flour butter sugar spoon salt",
    }
    rows = [
        {
            "text": " ".join(f"{word} in {topic} story" for word in text.split()) + f" told by {topic}{i}",
            "title": topic,
        }
        for i in range(10)
        for topic, text in topics.items()
    ]
    write_lines(tmp_path / "mixed.jsonl", rows)  # type: ignore[arg-type]
    sampler = sampler_of(tmp_path, tokens=10_000, documents=5, group_by="similarity", deduplicate="exact")
    clusters = whole_epoch(sampler)
    assert len(clusters) == 4
    assert all(len({document.title for document in cluster.documents}) == 1 for cluster in clusters)


def test_similarity_reads_scripts_that_put_no_blank_between_words() -> None:
    topics = (
        "鱼 钓竿 河流 湖泊 渔网 鲈鱼 鲤鱼 水面",
        "贷款 利率 存款 银行 资本 股票 债券 市场",
        "病人 医生 药物 手术 医院 治疗 疾病 血压",
    )
    common, draw = "的 了 在 是 和 有 这 我们 他们 今天 昨天 一个 可以 因为", random.Random(0)
    about = [draw.randrange(len(topics)) for _ in range(30)]

    def clause(topic: int) -> str:
        return "".join(draw.choice(draw.choice((topics[topic], common)).split()) for _ in range(12))

    block = [(i, 1, "。".join(clause(topic) for _ in range(40))) for i, topic in enumerate(about)]
    clusters = list(similar(block, 5, 5))
    alone = sum(len({about[document] for document in cluster}) == 1 for cluster in clusters)
    assert alone >= len(clusters) - len(topics)


@pytest.mark.parametrize("group_by", ["given", "similarity", "random"])
def test_clusters_of_a_real_mixture(tmp_path: Path, group_by: str) -> None:
    """Long, middling and tiny texts, some alone in their folders: all is read, nothing is over the budget."""
    lengths = [5, 7, 30, 45, 80, 99, 100, 101, 250, 1000, 12, 3]
    for number, length in enumerate(lengths):
        folder = tmp_path / f"folder{number % 5}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(prose(number, length))
    clusters = whole_epoch(sampler_of(tmp_path, tokens=100, documents=6, group_by=group_by))
    assert all(sum(words(d.text) for d in cluster.documents) <= 100 for cluster in clusters)
    assert all(len(cluster.documents) <= 6 for cluster in clusters)
    assert sum(len(cluster.documents) < 2 for cluster in clusters) <= 1
    found = Counter(word for cluster in clusters for d in cluster.documents for word in d.text.split())
    assert found == Counter(word for n, length in enumerate(lengths) for word in prose(n, length).split())


def test_a_group_over_the_budget_is_divided_and_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside files that cannot be used at all, and one that can."""
    rows = [{"text": prose(i, 30), "cluster": "large" if i < 9 else "small"} for i in range(11)]
    write_lines(tmp_path / "rows.jsonl", rows)  # type: ignore[arg-type]
    write_lines(tmp_path / "columns.jsonl", [{"body": "no text"}])
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    with caplog.at_level(logging.INFO):
        clusters = whole_epoch(sampler_of(tmp_path, tokens=100))
    assert sorted(len(cluster.documents) for cluster in clusters) == [2, 3, 3, 3]
    assert "1 groups over the budget divided" in caplog.text
    for fault in ("not UTF-8", "empty", "without a column 'text'"):
        assert re.search(rf"skipped \(.*1 {fault}", caplog.text)


def test_rows_of_one_cluster_are_found_wherever_they_stand(tmp_path: Path) -> None:
    rows = [{"text": prose(i, 5), "cluster": f"c{i % 10}"} for i in range(40)]
    write_lines(tmp_path / "rows.jsonl", rows)  # type: ignore[arg-type]
    clusters = whole_epoch(sampler_of(tmp_path))
    numbers = [sorted(int(d.id.partition("#")[2]) - 1 for d in cluster.documents) for cluster in clusters]
    assert sorted(numbers) == [[i, i + 10, i + 20, i + 30] for i in range(10)]


def test_documents_that_are_alone_join_others_that_are(tmp_path: Path) -> None:
    rows = [{"text": prose(i, 5), "cluster": f"c{i}"} for i in range(41)]
    write_lines(tmp_path / "rows.jsonl", rows)  # type: ignore[arg-type]
    clusters = whole_epoch(sampler_of(tmp_path))
    assert sorted(len(cluster.documents) for cluster in clusters) == [1, 20, 20]


def test_one_long_text_alone_makes_clusters_of_passages(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(prose(i, 40) for i in range(30)))
    clusters = whole_epoch(sampler_of(path, tokens=400))
    assert len(clusters) >= 3
    assert all(len(cluster.documents) > 2 for cluster in clusters)


def test_estimated_lengths_never_break_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the first texts lengths are estimated; here the estimate is far too low."""
    monkeypatch.setattr("spell_megatron.corpus.store.COUNTED", 2)
    rows = [{"text": "longwordwithmanycharacters" * 10}, {"text": "anotherlongwordwithmanycharacters" * 10}]
    rows += [{"text": " ".join(f"{i}{c}" for c in "abcdefghijklmnop")} for i in range(100)]
    write_lines(tmp_path / "rows.jsonl", rows)  # type: ignore[arg-type]
    clusters = whole_epoch(sampler_of(tmp_path, tokens=50))
    assert max(sum(words(d.text) for d in cluster.documents) for cluster in clusters) <= 50


def test_an_interrupted_preparation_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")

    def interrupted(text: str) -> int:
        raise KeyboardInterrupt

    corpus, folder = (
        CorpusConfig(sources=(SourceConfig(path=str(tmp_path / "a.txt")),)),
        tmp_path / "prepared",
    )
    with pytest.raises(KeyboardInterrupt):
        ClusterSampler(corpus, interrupted, 0, folder)
    assert list(folder.iterdir()) == []
    ClusterSampler(corpus, words, 0, folder)


def test_a_prepared_corpus_is_used_again_even_when_its_source_has_gone(tmp_path: Path) -> None:
    source, folder = tmp_path / "a.txt", tmp_path / "prepared"
    source.write_text(prose(1, 300))
    corpus = CorpusConfig(sources=(SourceConfig(path=str(source)),), cluster_tokens=100)
    before = ClusterSampler(corpus, words, 0, folder).draw(9)
    source.write_text("changed")
    assert ClusterSampler(corpus, words, 0, folder).draw(9) == before


def test_a_damaged_or_unwritable_preparation_is_one_clear_error(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"no database")
    with pytest.raises(SpellError, match="cannot be read"):
        ClusterStore(damaged, "x")
    sqlite3.connect(tmp_path / "other.sqlite").close()
    with pytest.raises(SpellError, match="cannot be read"):
        ClusterStore(tmp_path / "other.sqlite", "x")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(SpellError, match="cannot write the prepared corpus"):
        ClusterSampler(
            CorpusConfig(sources=(SourceConfig(path=str(tmp_path / "a.txt")),)), words, 0, tmp_path / "a.txt"
        )


def test_a_prepared_corpus_is_read_without_locks(tmp_path: Path) -> None:
    """Some file servers have none."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text("a few words of some length " * 9)
    corpus = CorpusConfig(sources=(SourceConfig(path=str(texts)),))
    ClusterSampler(corpus, words, 3, tmp_path / "its #1 corpus?")
    (path,) = (tmp_path / "its #1 corpus?").glob("*.sqlite")
    with closing(sqlite3.connect(path)) as other:
        other.execute("begin exclusive")
        assert ClusterStore(path, "x")[0].documents


# ---- sampling


@settings(deadline=None)
@given(st.integers(1, 700), st.text(max_size=5))
def test_a_permutation_meets_every_number_once(size: int, key: str) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_differ_and_mix() -> None:
    orders = {tuple(permuted(i, 50, f"{key}") for i in range(50)) for key in range(20)}
    assert len(orders) == 20
    firsts = Counter(permuted(0, 10, f"{key}") for key in range(2000))
    assert all(120 < firsts[i] < 290 for i in range(10))


@pytest.fixture
def two_sources(tmp_path: Path) -> CorpusConfig:
    """`news` of 7 clusters for two tasks, `reports` of 3 clusters for one."""
    write_lines(tmp_path / "news.jsonl", [{"text": prose(i, 9), "cluster": i // 2} for i in range(14)])
    write_lines(tmp_path / "reports.jsonl", [{"text": prose(99 + i, 9), "cluster": i // 2} for i in range(6)])
    return CorpusConfig(
        sources=(
            SourceConfig(path=str(tmp_path / "news.jsonl"), weight=3, tasks=("doc_general_qa", "doc_mc")),
            SourceConfig(path=str(tmp_path / "reports.jsonl"), weight=1, tasks=("docmath_qa",)),
        )
    )


def test_an_epoch_brings_every_cluster_with_every_task_once(two_sources: CorpusConfig) -> None:
    sampler = ClusterSampler(two_sources, words, 0)
    assert sampler.domains == {"news": 7, "reports": 3}
    drawn = [(cluster, task) for cluster, task in sampler.draw(400) if cluster.domain == "news"]
    assert all(cluster.id.startswith("news-") for cluster, _ in drawn)
    draws = [(int(cluster.id.partition("/")[2]), task) for cluster, task in drawn]
    for start in (0, 14, 28):
        epoch = draws[start : start + 14]
        assert set(epoch) == {(i, task) for i in range(7) for task in ("doc_general_qa", "doc_mc")}
    assert draws[:14] != draws[14:28]


def test_a_cluster_has_a_name_of_its_own_however_its_corpus_is_prepared(tmp_path: Path) -> None:
    """Memory and journals know clusters by name: the third of ten is another one where others are grouped."""
    write_lines(tmp_path / "docs.jsonl", [{"text": prose(i, 9), "cluster": i // 3} for i in range(30)])
    source = SourceConfig(path=str(tmp_path / "docs.jsonl"))

    def clusters(folder: str, source: SourceConfig = source, **limits: int) -> dict[str, tuple[str, ...]]:
        corpus = CorpusConfig(sources=(source,), **limits)  # type: ignore[arg-type]
        sampler = ClusterSampler(corpus, words, 0, tmp_path / folder)
        drawn = (cluster for cluster, _ in sampler.draw(3 * sampler.domains["docs"]))
        return {cluster.id: tuple(document.text for document in cluster.documents) for cluster in drawn}

    first = clusters("a")
    assert clusters("b") == first, "prepared again of the same texts it is the same"
    others = [
        clusters("a", max_documents=2),
        clusters("a", cluster_tokens=20),
        clusters("a", replace(source, group_by="random")),
    ]
    write_lines(tmp_path / "docs.jsonl", [{"text": prose(i + 1, 9), "cluster": i // 3} for i in range(30)])
    for other in (*others, clusters("c")):
        assert not first.keys() & other.keys()


def test_a_source_that_is_capped_comes_again_and_again(tmp_path: Path) -> None:
    """The paper's proportions, a tenth of its size: 215 sets of documents a task, 48 draws a step, 70 steps."""
    for name, tasks in (("finance", 1), ("web", 2)):
        rows = [{"text": prose(1000 * tasks + i, 30), "cluster": i} for i in range(900)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    common = {"path": str(tmp_path / "finance.jsonl"), "tasks": ("docmath_qa",)}
    web = {"path": str(tmp_path / "web.jsonl"), "tasks": ("doc_general_qa", "doc_mc"), "weight": 2.0}

    def sampler(seed: int, **cap: int) -> ClusterSampler:
        sources = (SourceConfig(**common, **cap), SourceConfig(**web, **cap))  # type: ignore[arg-type]
        limits = {"cluster_tokens": 40, "max_documents": 1}
        return ClusterSampler(CorpusConfig(sources=sources, **limits), words, seed)  # type: ignore[arg-type]

    capped = sampler(0, clusters=215)
    met = Counter((cluster.id, task) for cluster, task in capped.draw(70 * 48))
    assert len(met) == 3 * 215
    assert set(met.values()) == {5, 6}, "the paper: 5 to 8 times"
    assert capped.domains == {"finance": 215, "web": 215}
    assert capped.visits == pytest.approx(capped.expected_visits(70 * 48), abs=0.01)
    assert all(5 < times < 6 for times in capped.visits.values())
    assert set(met) != set(Counter((c.id, t) for c, t in sampler(1, clusters=215).draw(645))), "by the seed"
    assert max(Counter((c.id, t) for c, t in sampler(0).draw(1000)).values()) == 1


def test_sources_take_turns_by_weight_and_tasks_are_balanced(two_sources: CorpusConfig) -> None:
    drawn = ClusterSampler(two_sources, words, 0).draw(40)
    assert Counter(cluster.domain for cluster, _ in drawn) == {"news": 30, "reports": 10}
    assert Counter(task for _, task in drawn) == {"doc_general_qa": 15, "doc_mc": 15, "docmath_qa": 10}
    for start in range(0, 40, 4):
        assert Counter(cluster.domain for cluster, _ in drawn[start : start + 4])["reports"] == 1


@pytest.mark.parametrize("done", [0, 1, 13, 14, 57])
def test_a_restored_sampler_goes_on_to_the_very_draw(two_sources: CorpusConfig, done: int) -> None:
    whole = ClusterSampler(two_sources, words, 5)
    whole.draw(done)
    state = json.loads(json.dumps(whole.state()))
    resumed = ClusterSampler(two_sources, words, 5)
    resumed.restore(state)
    assert resumed.draw(60) == whole.draw(60)


def test_another_seed_is_another_order(two_sources: CorpusConfig) -> None:
    assert ClusterSampler(two_sources, words, 1).draw(20) != ClusterSampler(two_sources, words, 2).draw(20)


def test_a_source_that_changed_starts_an_epoch(
    two_sources: CorpusConfig, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = ClusterSampler(two_sources, words, 0)
    sampler.draw(33)
    state = sampler.state()
    state["news"]["length"] += 2
    del state["reports"]
    sampler.restore(state)
    assert (sampler.state()["news"]["epoch"], sampler.state()["news"]["position"]) == (1, 0)
    assert sampler.state()["reports"]["position"] == 0
    assert "changed its size" in caplog.text
    assert "is new to this run" in caplog.text


def test_equal_names_of_domains_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "docs").mkdir(parents=True)
    sources = tuple(SourceConfig(path=str(tmp_path / folder / "docs")) for folder in ("a", "b"))
    with pytest.raises(SpellError, match="several corpus sources are called 'docs'"):
        ClusterSampler(CorpusConfig(sources=sources), words, 0)


def test_the_toy_world_is_a_source_like_any_other() -> None:
    corpus = CorpusConfig(sources=(SourceConfig(path="toy"),), toy_clusters=50)
    drawn = ClusterSampler(corpus, words, 3).draw(150)
    assert len({(cluster.documents, task) for cluster, task in drawn}) == 150
    assert {cluster.domain for cluster, _ in drawn} == {"toy"}
    assert ClusterSampler(corpus, words, 3).draw(150) == drawn


def test_the_hard_world_is_one_too() -> None:
    corpus = CorpusConfig(sources=(SourceConfig(path="hard-small", domain="mine"),), toy_clusters=9)
    drawn = ClusterSampler(corpus, words, 3).draw(27)
    assert len({(cluster.documents, task) for cluster, task in drawn}) == 27
    assert {cluster.domain for cluster, _ in drawn} == {"mine"}
    assert len(load_heldout(HeldOutConfig(path="hard-small", questions=5))) == 5


def test_held_out_questions_of_a_file_may_have_labels(tmp_path: Path) -> None:
    path = tmp_path / "held.jsonl"
    row = {"task": "doc_general_qa", "question": "Who?", "answer": "Nora", "documents": ["Nora did."]}
    path.write_text(
        "".join(json.dumps(row | more) + "\n" for more in ({}, {"labels": {"links": 3}}, {"labels": 3}))
    )
    read = load_heldout(HeldOutConfig(path=str(path), questions=2))
    assert [question.labels for _, question in read] == [{}, {"links": "3"}]
    with pytest.raises(SpellError, match=r"line 3 is no held-out question.*labels"):
        load_heldout(HeldOutConfig(path=str(path), questions=3))
    path.write_text("[" * 200_000)
    with pytest.raises(SpellError, match="line 1 is no held-out question"):
        load_heldout(HeldOutConfig(path=str(path), questions=3))


def test_held_out_questions_are_read_as_json_lines_are_written(tmp_path: Path) -> None:
    """A mark of the byte order, empty lines, and breaks within a text that end no line of JSON."""
    path = tmp_path / "held.jsonl"
    row = {
        "task": "docmath_qa",
        "question": "How\u2028many\u0085?",
        "answer": 3,
        "documents": ["Two\u2028and one."],
    }
    line = json.dumps(row, ensure_ascii=False)
    path.write_text(f"\ufeff{line}\r\n\n{line}\n", encoding="utf-8", newline="")
    read = load_heldout(HeldOutConfig(path=str(path), questions=9))
    assert [(question.text, question.answer) for _, question in read] == [("How\u2028many\u0085?", "3")] * 2
    assert [cluster.documents[0].text for cluster, _ in read] == ["Two\u2028and one."] * 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"documents": "Nora did it."}, "documents is str"),
        ({"documents": [{"title": "A", "text": "Nora did it."}]}, "a document is dict"),
        ({"documents": []}, "documents is empty"),
        ({"answer": None}, "answer is NoneType"),
        ({"answer": " "}, "answer is empty"),
        ({"question": 5.5, "task": None}, "task is NoneType"),
        ({"question": "Who \ud83d?"}, "question has half a character"),
        ({"documents": ["Nora \ude00 did it."]}, "a document has half a character"),
        ({"labels": {"\ud83d": "x"}}, "a name in labels has half a character"),
        ({"task": "doc_mc"}, "no letter of options"),
        ({"task": "doc_mc", "options": {"A": "x", "B": "y"}, "answer": "C"}, "no letter of options"),
        ({"task": "my_tasks:SIX", "options": {"E": "x", "F": "y"}, "answer": "A"}, "no letter of options"),
    ],
)
def test_a_held_out_question_of_another_shape_is_refused(tmp_path: Path, values: dict, said: str) -> None:
    path = tmp_path / "held.jsonl"
    row = {"task": "doc_general_qa", "question": "Who?", "answer": "Nora", "documents": ["Nora did."]}
    path.write_text("\n" + json.dumps(row | values))
    with pytest.raises(SpellError, match=f"line 2 is no held-out question .*{said}"):
        load_heldout(HeldOutConfig(path=str(path), questions=3))
