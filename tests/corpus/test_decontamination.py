"""Documents of a corpus that a benchmark asks about: left out, counted, listed; others stay."""

from __future__ import annotations

import io
import json
import random
import re
import unicodedata
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import pyarrow
import pyarrow.parquet
import pytest

from spell_megatron.base.terminal import Terminal
from spell_megatron.config import ConfigError, CorpusConfig, SourceConfig, load_config
from spell_megatron.corpus import ClusterSampler, survey
from spell_megatron.corpus.cleaning import fingerprint, sketch, split_words
from spell_megatron.corpus.decontamination import SHINGLE, Benchmarks
from spell_megatron.corpus.survey import meant
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit
QUESTION = "In which year did the older of the two bridges over the Nile open?"


def prose(seed: int, words: int = 400) -> list[str]:
    draw = random.Random(seed)
    return [f"word{draw.randrange(5000)}" for _ in range(words)]


def with_changes(words: list[str], every: int) -> list[str]:
    return [f"changed{i}" if i % every == every - 1 else word for i, word in enumerate(words)]


def jaccard(one: list[str], other: list[str]) -> float:
    first, second = ({tuple(t[i : i + SHINGLE]) for i in range(len(t) - SHINGLE + 1)} for t in (one, other))
    return len(first & second) / len(first | second)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> Path:
    """FRAMES' layout in JSON lines, LongBench's in Parquet, one folder for both."""
    root = tmp_path_factory.mktemp("benchmarks")
    (root / "frames").mkdir()
    pages = [{"title": f"Page {i}", "text": " ".join(prose(i))} for i in range(3)]
    row = {"Prompt": QUESTION, "Answer": "1907", "wiki_items": pages}
    (root / "frames" / "test.jsonl").write_text(json.dumps(row) + "\n")
    context = "\n".join(f"Passage {i}:\n{' '.join(prose(100 + i))}" for i in range(4))
    table = pyarrow.Table.from_pylist([{"input": "Who?", "context": context, "answers": ["A short one"]}])
    pyarrow.parquet.write_table(table, root / "musique.parquet")
    return root


@pytest.fixture(scope="module")
def index(benchmarks: Path) -> Benchmarks:
    return Benchmarks([str(benchmarks)])


def test_a_document_of_a_benchmark_is_found_however_it_is_set(index: Benchmarks):
    page = prose(1)
    found = index.match("\n".join(page).upper().replace("WORD1", "  word1"))
    assert (found.kind, found.place) == ("document", "frames/test.jsonl#1.wiki_items.1.text")
    assert found.similarity == pytest.approx(1.0)
    assert index.match(" ".join(prose(102))).place == "musique.parquet#1.context"
    assert index.match(" ".join(prose(7))) is None


def test_the_threshold_is_eight_tenths(index: Benchmarks):
    """Every n-th word changed; similarities by their definition, well on either side of the threshold."""
    page = prose(2)
    for every, expected in ((100, True), (70, True), (30, False), (12, False)):
        changed = with_changes(page, every)
        assert (jaccard(page, changed) > 0.8) is expected
        assert (index.match(" ".join(changed)) is not None) is expected, jaccard(page, changed)


def test_a_question_is_found_where_a_text_holds_it(index: Benchmarks):
    around = " ".join(prose(8, 60))
    asked = index.match(
        f"{around}\n**In which year** did the older of the two bridges\nover the NILE open? {around}"
    )
    assert (asked.kind, asked.place) == ("question", "frames/test.jsonl#1.Prompt")
    assert index.match(f"{around} In which year did the older of the two bridges open? {around}") is None
    assert index.match("A short one") is None  # an answer of three words stands in texts of every kind


BOILERPLATE = "Revenue of the segments (in thousands, except share and per share amounts)"


def test_what_stands_short_beside_a_question_is_none(tmp_path: Path):
    """Captions of tables, options, answers: texts that have nothing to do with the question hold them, too."""
    page = " ".join(prose(3, 60))
    row = {
        "question_id": "simplong-testmini-3",
        "question": QUESTION,
        "paragraphs": [BOILERPLATE, "2018 | 2017", page],
        "options": [str(number) for number in range(1, 11)],
        "answer": "It opened in the same year as the older of both, so they say.",
    }
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")
    index, around = Benchmarks([str(tmp_path)]), " ".join(prose(4, 90))
    for harmless in (BOILERPLATE, "1 2 3 4 5 6 7 8 9 10", row["answer"]):
        assert index.match(f"{around} {harmless} {around}") is None, harmless
    assert index.match(f"{around} {QUESTION} {around}").place == "asked.jsonl#1.question"
    assert index.match(f"{around} {page} {around}").place == "asked.jsonl#1.paragraphs.2"


def test_sentences_of_a_list_are_a_document_together(tmp_path: Path):
    """HotpotQA's own layout."""
    sentences = [" ".join(prose(seed, 20)) for seed in range(4)]
    row = {"question": QUESTION, "context": {"title": ["Nile"], "sentences": [sentences]}}
    (tmp_path / "asked.json").write_text(json.dumps([row]))
    index = Benchmarks([str(tmp_path)])
    assert index.match(" ".join(sentences)).place == "asked.json#1.context.sentences.0.*"
    assert index.match(f"{' '.join(prose(8))} {sentences[1]}") is None


LONG_QUESTION = "Which of the two bridges over the Nile did the older of the engineers build?"


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"Prompt": QUESTION}, True),
        ({"problem_statement": QUESTION, "solution": LONG_QUESTION}, True),
        ({"originalQuestion": QUESTION, "question 2": LONG_QUESTION}, True),
        ({"prompt": [{"role": "user", "content": QUESTION}], "note": LONG_QUESTION}, True),
        ({"question_id": "a 1", "turns": [QUESTION, LONG_QUESTION]}, True),  # the id of a question is none
        ({"text": QUESTION, "label": "place"}, True),
        ({"input": "", "text": QUESTION}, True),
        ({"question_en": QUESTION, "prompt": "Answer it."}, True),
        ({"question_id": "an id", "text": QUESTION}, True),
        ({"question_no": "12", "text": QUESTION}, True),
        ({"question": "Who?", "text": QUESTION}, False),
        ({"query": LONG_QUESTION, "question_type": QUESTION}, False),
        ({"label": "place", "labels": QUESTION.split()}, False),  # names in a list are no sentence
        ({"question": "1 + 2 + 3 + 4 + 5 + 6 + 7 = x"}, False),
    ],
)
def test_questions_are_told_by_their_column_where_there_is_one(tmp_path: Path, row: dict, found: bool):
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")
    index, around = Benchmarks([str(tmp_path)]), " ".join(prose(8, 60))
    asked = QUESTION if "=" not in str(row) else str(row["question"])
    assert (index.match(f"{around} {asked} {around}") is not None) is found


NUMBERS = [
    ("What is the value of 2^3 − 1^3 + 4^3 − 3^3 + 6^3 − 5^3 + 18^3 − 17^3?", True),
    ("Let f(x)=2x²+3x−7. Find f(−4).", True),
    ("Compute: 1 − 2 + 3 − 4 + 5 − 6 + 99 − 100", True),
    ("1 2 3 4 5 6 7 8 9 10", False),
    ("1 + 2 + 3 + 4 + 5 + 6 + 7 = x", False),
]


@pytest.mark.parametrize(("asked", "found"), NUMBERS)
def test_a_question_may_be_mostly_numbers(tmp_path: Path, asked: str, found: bool):
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": asked}) + "\n")
    index, around = Benchmarks([str(tmp_path)]), " ".join(prose(8, 60))
    assert (index.match(f"{around} {asked} {around}") is not None) is found


@pytest.mark.parametrize("times", [10, 11])
def test_what_many_rows_ask_alike_is_no_question(tmp_path: Path, times: int):
    """An instruction; HELMET has each question six times."""
    rows = [{"instruction": LONG_QUESTION, "input": f"Text {i}"} for i in range(times)]
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = Benchmarks([str(tmp_path)])
    assert (index.match(f"{LONG_QUESTION} {' '.join(prose(8, 60))}") is not None) is (times == 10)


def test_a_row_that_asks_twice_counts_once(tmp_path: Path):
    """As a question and as a prompt, of six places of the gold passage."""
    (tmp_path / "b#1").mkdir()
    rows = [{"question": LONG_QUESTION, "prompt": LONG_QUESTION, "text": f"Text {i}"} for i in range(6)]
    (tmp_path / "b#1" / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Benchmarks([str(tmp_path)]).match(f"{LONG_QUESTION} {' '.join(prose(8, 60))}") is not None


@pytest.mark.parametrize(
    ("length", "times", "found"), [(29, 1, False), (30, 1, True), (53, 10, True), (53, 11, False)]
)
def test_an_introduction_is_found_word_by_word(tmp_path: Path, length: int, times: int, found: bool):
    """Gold paragraphs of multi-hop sets: texts of their own, or passages of one."""
    gold, passage, around = (
        " ".join(prose(seed, size)) for seed, size in ((1, length), (2, length), (8, 90))
    )
    context = f"Passage 1:\nA title\n{passage}\nPassage 2:\nAnother\nAnd few words."
    row = {"question": QUESTION, "paragraph": gold, "context": context}
    (tmp_path / "asked.jsonl").write_text((json.dumps(row) + "\n") * times)
    index = Benchmarks([str(tmp_path)])
    for text in (gold, passage):
        assert (index.match(f"{around} {text} {around}") is not None) is found


def test_a_passage_is_found_without_its_title(tmp_path: Path):
    passages = [f"Passage {i}:\nThe {i}th article's title\n{' '.join(prose(i, 80))}" for i in (1, 2)]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"input": "Who?", "context": "\n".join(passages)}))
    index, around = Benchmarks([str(tmp_path)]), " ".join(prose(8, 60))
    for seed in (1, 2):
        assert index.match(f"{around} {' '.join(prose(seed, 80))} {around}").place == "asked.jsonl#1.context"


def softened(text: str) -> str:
    """With a hyphen in every word that shows only where a line is broken."""
    return re.sub(r"(\w{2})(\w)", "\\1\u00ad\\2", text)


def widened(text: str) -> str:
    return "".join(chr(ord(sign) + 0xFEE0) if "!" <= sign <= "~" else sign for sign in text)


@pytest.mark.parametrize("spelling", [softened, widened, partial(unicodedata.normalize, "NFD")])
def test_a_text_is_found_however_its_characters_are_written(tmp_path: Path, spelling):
    question = "Où le préfet a-t-il signé le décret créé à l'été 1998 près de la frontière ?"
    page = [f"été{i}" for i in random.Random(9).choices(range(5000), k=400)]
    row = {"question": question, "page": " ".join(page)}
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")
    index, written = Benchmarks([str(tmp_path)]), spelling(question)
    assert written != question
    assert index.match(f"Avant. {written} Après.").place == "asked.jsonl#1.question"
    assert index.match(spelling(" ".join(page))).place == "asked.jsonl#1.page"
    assert set(sketch(" ".join(page))) == set(sketch(spelling(" ".join(page))))
    assert fingerprint(question) == fingerprint(written)


@pytest.mark.parametrize("length", [20, 60, 150, 390])
def test_a_long_question_is_found_within_a_longer_page(tmp_path: Path, length: int):
    """A problem of a contest, word by word, and its solution behind it."""
    problem = " ".join(prose(1, length))
    (tmp_path / "contest.jsonl").write_text(json.dumps({"problem": problem, "answer": "204"}) + "\n")
    index = Benchmarks([str(tmp_path)])
    around = " ".join(prose(2, 300))
    assert index.match(f"{around}\n{problem}\nSolution. {around}").place == "contest.jsonl#1.problem"
    assert index.match(f"{around} {' '.join(prose(1, length)[:-3])} {around}") is None


CHINESE = "根据文档中的年度报告计算这家公司去年的净利润总额与前年相比增长了多少百分点"


def test_a_script_without_blanks_has_words_too(tmp_path: Path):
    (tmp_path / "questions.jsonl").write_text(
        json.dumps({"question": CHINESE, "hint": "根据文档中的年度报告"}) + "\n"
    )
    index = Benchmarks([str(tmp_path)])
    around = "这是一篇关于别的事情的文章。" * 20
    assert index.match(f"{around}{CHINESE}？{around}").place == "questions.jsonl#1.question"
    assert index.match(f"{around}根据文档中的年度报告{around}") is None  # ten characters are about five words
    page = [chr(0x4E00 + (7 * i * i + i) % 5000) for i in range(600)]
    changed = [*page[:300], "一", *page[301:]]
    assert set(sketch("".join(page))) & set(sketch("".join(changed)))
    assert not set(sketch("".join(page))) & set(sketch("".join(page[::-1])))


def test_an_archive_among_the_benchmarks_is_no_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "README.md").write_text("How to use it, in some words, with a script besides.")
    (tmp_path / "load.py").write_text("pass")
    Benchmarks([str(tmp_path)])
    assert "left out and not compared" in " ".join(caplog.messages)
    (tmp_path / "data.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(SpellError, match=r"data\.tar\.gz is an archive.*unpack"):
        Benchmarks([str(tmp_path)])
    (tmp_path / "data.tar.gz").unlink()
    with ZipFile(tmp_path / "data.zip", "w") as packed:
        packed.writestr("data/asked.jsonl", json.dumps({"question": QUESTION}))
    with pytest.raises(SpellError, match=r"data\.zip is an archive.*unpack"):
        Benchmarks([str(tmp_path)])
    with ZipFile(tmp_path / "data.zip") as packed:
        packed.extractall(tmp_path)
    assert (
        Benchmarks([str(tmp_path)]).match(f"{QUESTION} It was 1907.").place == "data/asked.jsonl#1.question"
    )


def test_a_corpus_without_what_the_benchmarks_ask_about(benchmarks: Path, tmp_path: Path):
    source = tmp_path / "web.jsonl"
    texts = [
        *(" ".join(prose(seed)) for seed in (50, 0, 51, 101, 52)),
        f"{' '.join(prose(53, 50))} {QUESTION}",
    ]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = CorpusConfig(
        sources=(SourceConfig(path=str(source), domain="web"),), benchmarks=(str(benchmarks),)
    )
    sampler = ClusterSampler(corpus, lambda text: len(text.split()), 0, tmp_path / "prepared")
    [(cluster, _)] = sampler.draw(1)
    assert [document.id for document in cluster.documents] == ["web.jsonl#1", "web.jsonl#3", "web.jsonl#5"]
    skipped = {"in the benchmark frames/test.jsonl": 2, "in the benchmark musique.parquet": 1}
    assert sampler.facts["web"]["skipped"] == skipped
    [dropped] = (tmp_path / "prepared").glob("web-*.dropped.jsonl")
    rows = [json.loads(line) for line in dropped.read_text().splitlines()]
    assert [(row["text"], row["kind"]) for row in rows] == [
        ("web.jsonl#2", "document"),
        ("web.jsonl#4", "document"),
        ("web.jsonl#6", "question"),
    ]
    again = ClusterSampler(corpus, lambda text: len(text.split()), 0, tmp_path / "prepared")
    assert again.draw(1)[0][0] == cluster
    without = CorpusConfig(sources=corpus.sources)
    assert (
        ClusterSampler(without, lambda text: len(text.split()), 0, tmp_path / "prepared").facts["web"][
            "documents"
        ]
        == 6
    )


def test_the_command_reports_what_it_would_leave_out(benchmarks: Path, tmp_path: Path):
    source = tmp_path / "web.jsonl"
    texts = [" ".join(prose(seed)) for seed in (50, 0, 51)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = meant(str(source), ["domain=web", f"corpus.benchmarks=[{benchmarks}]"]).corpus
    found = survey(corpus, lambda text: len(text.split()))
    facts = found.to_dict()["sources"]["web"]
    assert facts["skipped"] == {"in the benchmark frames/test.jsonl": 1}
    assert "frames/test.jsonl#1.wiki_items.0.text" in facts["examples"]["in the benchmark frames/test.jsonl"]
    terminal = Terminal(file=io.StringIO(), width=200)
    terminal.print(found.shown())
    assert "in the benchmark frames/test.jsonl" in terminal.file.getvalue()


def test_benchmarks_that_hold_nothing_are_an_error(tmp_path: Path):
    with pytest.raises(SpellError, match=r"corpus\.benchmarks"):
        Benchmarks([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"did you mean 'corpus\.benchmarks'"):
        load_config("paper-16k", ["corpus.benchmark=x"])


def test_marks_upon_marks_are_cut() -> None:
    """Sorting them would take the square of their number, and a few of them are enough for any language."""
    [word] = split_words("a" + "\u0301\u0316" * 200_000)
    assert len(word) < 40
    assert split_words("Vie\u0323\u0302t") == split_words("Việt")
