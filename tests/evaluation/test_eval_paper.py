"""Our figures beside the paper's: its tables as data, its averages, and the two protocols."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from eval.averages import average, averages
from eval.benchmark import Item
from eval.benchmarks import find, list_benchmarks
from eval.beside import beside
from eval.comparison import compare
from eval.paper import find_model, models, tables
from eval.report import Report, read_report
from eval.results import summarise
from eval.runner import BenchmarkPlan
from eval.scoring import ScoredAnswer
from spell_megatron.tools.cli import app
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit
LIMIT = 16_384


def result(name: str, scores, limit: int | None = LIMIT, labels=None):
    """A result of one sample a question."""
    [benchmark] = find([name])
    labels = labels or [{}] * len(scores)
    items = [Item(str(i), (), "?", ("x",), label) for i, label in enumerate(labels)]
    samples = [
        ScoredAnswer(str(i), 0, label, score, score, "x", "stop", 1, False)
        for i, (score, label) in enumerate(zip(scores, labels, strict=True))
    ]
    return summarise(BenchmarkPlan(benchmark, benchmark.terms("paper"), limit, items), samples, 1, (), "")


def test_bounds_are_bounds_of_the_headline():
    """By hand: set a has 1 of 2 right and one missing, b 1 of 1. Micro bounds would be 2/3 and 1."""
    [benchmark] = find(["helmet-rag"])
    labels = [{"set": "a"}, {"set": "a"}, {"set": "b"}, {"set": "b"}]
    items = [Item(str(i), (), "?", ("x",), label) for i, label in enumerate(labels)]
    samples = [ScoredAnswer(i, 0, labels[int(i)], 1.0, 1.0, "x", "stop", 1, False) for i in ("0", "2")]
    plan = BenchmarkPlan(benchmark, benchmark.terms("paper"), LIMIT, items)
    found = summarise(plan, samples, 1, ("3",), "")
    assert found.bounds == (0.75, 1.0)
    assert found.counts["asked"] == 3


def test_items_of_one_group_are_one_question():
    [benchmark] = find(["helmet-rag"])
    items = [
        Item(f"q-{i}-{d}", (), "?", ("x",), {"set": "a"}, group=f"q-{i}") for i in (0, 1) for d in (0, 1)
    ]
    scores = dict(zip((item.id for item in items), (1.0, 0.0, 1.0, 1.0), strict=True))
    samples = [ScoredAnswer(i, 0, {"set": "a"}, s, s, "x", "stop", 1, False) for i, s in scores.items()]
    found = summarise(BenchmarkPlan(benchmark, benchmark.terms("paper"), LIMIT, items), samples, 1, (), "")
    assert found.questions == {"q-0": 0.5, "q-1": 1.0}
    assert (found.mean.value, found.mean.questions, found.bounds) == (0.75, 2, (0.75, 0.75))
    assert (found.best_of[1], found.best_of_bootstrap[1], found.counts["questions"]) == (0.75, 0.75, 2)
    assert found.complete
    fewer = summarise(
        BenchmarkPlan(benchmark, benchmark.terms("paper"), LIMIT, items), samples[:3], 1, ("q-1-1",), ""
    )
    assert (fewer.mean.value, fewer.bounds, fewer.best_of[1]) == (0.75, (0.75, 0.75), 0.75)


SIX = [
    result("docmath", [1.0, 0.0]),
    result("frames", [1.0, 1.0, 0.0, 0.0, 0.0]),
    result("2wikimqa", [1.0]),
    result("hotpotqa", [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]),
    result("musique", [0.5, 0.5, 0.5]),
    result("longbench-v2", [0.0, 0.0, 0.0, 1.0]),
]


def report(results, protocol="paper", model="runs/qwen2.5_7b-instruct/hf") -> Report:
    return Report(model, {"protocol": protocol}, results, averages(results))


def test_the_papers_rows_average_to_what_it_prints():
    """A figure that was copied wrongly shows in the average of its row, which the paper rounds to one or two places."""
    checked = 0
    for table in tables():
        for by_limit in table.models.values():
            for rows in by_limit.values():
                for *columns, mean in rows.values():
                    assert len(columns) == len(table.columns)
                    if None not in columns:
                        assert sum(columns) / len(columns) == pytest.approx(mean, abs=0.0501)
                        checked += 1
    assert checked == 38 + 6 + 4  # tables 1, 7, 8: not all of their columns are recorded
    assert len(models()) == 12
    parts = {part.partition("/")[0] for table in tables() for of in table.columns.values() for part in of}
    assert parts == set(list_benchmarks())


def test_the_average_of_four_is_not_the_mean_of_six():
    """By hand: LB-MQA = (1 + 1/8 + 1/2) / 3 = 13/24, which is one of four columns, and three of six."""
    found = averages(SIX)
    assert found["Avg of four"]["16384"].value == pytest.approx((1 / 2 + 2 / 5 + 13 / 24 + 1 / 4) / 4)
    assert found["mean of six"]["16384"].value == pytest.approx(
        (1 / 2 + 2 / 5 + 1 + 1 / 8 + 1 / 2 + 1 / 4) / 6
    )
    four = found["Avg of four"]["16384"]
    assert four.low < four.value < four.high
    assert four.questions == 23
    assert averages(SIX[1:]) == {}


def test_averages_of_subsets_and_of_sets_within_a_set():
    """Table 8 by hand: MRCR 1/2, 1/4, 0; RAG mean of its sets (1 + 0) / 2; ICL 1; summaries (1/2 + 0) / 2."""
    needles = [{"needles": n} for n in ("2", "2", "4", "4", "4", "4", "8")]
    measured = [
        result("mrcr", [1, 0, 1, 0, 0, 0, 0], labels=needles),
        result("helmet-rag", [1, 0, 0, 0], labels=[{"set": "nq"}, *[{"set": "popqa"}] * 3]),
        result("helmet-icl", [1], labels=[{"set": "nlu"}]),
        result("helmet", [0.5, 0, 0], labels=[{"task": "books"}, *[{"task": "cases"}] * 2]),
    ]
    table = tables()[2]
    wanted = [1 / 2, 1 / 4, 0, 1 / 2, 1, 1 / 4]
    for column, value in zip(table.columns.items(), wanted, strict=True):
        assert average(measured, dict([column]), LIMIT).value == pytest.approx(value)
    assert averages(measured)["Avg of Table 8"]["16384"].value == pytest.approx(sum(wanted) / 6)
    assert average(measured, {"x": ("mrcr/needles=16",)}, LIMIT) is None


def test_a_checkpoint_beside_the_papers_row():
    found = beside(report([*SIX, result("aime24", [1.0, 0.0], None)]), "Qwen2.5-7B-Instruct")
    [part] = found.parts  # the paper's table 7 has base models alone
    assert (part.table.name, part.max_input) == ("Table 1", LIMIT)
    assert dict(part.paper)["SPELL"] == (45.8, 46.7, 63.1, 33.2, 47.2)
    by_hand = [
        50 - 45.8,
        40 - 46.7,
        100 * 13 / 24 - 63.1,
        25 - 33.2,
        100 * (0.5 + 0.4 + 13 / 24 + 0.25) / 4 - 47.2,
    ]
    assert part.gains == pytest.approx(by_hand)
    text = found.markdown()
    assert "protocol paper" in text
    assert "| RLVR, paper | – | – | – | – | 45.9 |" in text
    assert "| ours − SPELL | +4.2 | -6.7 | -8.9 | -8.2 | -4.9 |" in text
    assert "DocMath-Eval @ 16384: rule only, no judge" in text
    json.dumps(found.to_json(), allow_nan=False)


def unjudged(name: str, scores, missing: int):
    """A result without a verdict for some of its samples, the last ones."""
    [benchmark] = find([name])
    items = [Item(str(i), (), "?", ("x",)) for i in range(len(scores))]
    known = [None if i >= len(scores) - missing else score for i, score in enumerate(scores)]
    samples = [
        ScoredAnswer(str(i), 0, {}, 0.0, score, "x", "stop", 1, False) for i, score in enumerate(known)
    ]
    return summarise(BenchmarkPlan(benchmark, benchmark.terms("paper"), LIMIT, items), samples, 1, (), "")


def test_what_rests_on_a_part_of_the_questions_says_so_everywhere():
    """A judge that failed for some: the mean of the others is right where the rule was."""
    whole = report(SIX)
    partly = report([unjudged("docmath", [1.0, 0.0, 0.0], 1), *SIX[1:]])
    both = partly.averages["Avg of four"]["16384"], partly.averages["mean of six"]["16384"]
    assert [mean.complete for mean in both] == [False, False]
    assert all(mean.complete for of in whole.averages.values() for mean in of.values())
    averages_of_it = [line for line in partly.markdown().splitlines() if line.startswith(("| Avg", "| mean"))]
    assert [line.count("(incomplete)") for line in averages_of_it] == [1, 1]
    found = beside(partly, "Qwen2.5-7B-Instruct")
    ours, gains = found.markdown().splitlines()[-4:-2]
    for row in (ours, gains):
        cells = row.split(" | ")
        assert ["(incomplete)" in cell for cell in cells] == [False, True, False, False, False, True]
    assert [mean["complete"] for mean in found.to_json()["tables"][0]["ours"]] == [False, *[True] * 3, False]
    for reports, marks in (([whole, partly], [False, True, True]), ([partly, whole], [True, False, True])):
        compared = compare(reports)
        rows = [line for line in compared.markdown().splitlines() if "@" in line]
        marked = [["(incomplete)" in cell for cell in row.strip("| ").split(" | ")[1:]] for row in rows]
        assert marked == [marks, *[[False] * 3] * 5]
    assert "(incomplete)" not in whole.markdown() + beside(whole, "Qwen2.5-7B-Instruct").markdown()


def test_an_incomplete_figure_stays_so_in_its_file(tmp_path):
    partly = report([unjudged("docmath", [1.0, 0.0, 0.0], 1), *SIX[1:]])
    partly.write(tmp_path)
    assert read_report(tmp_path) == partly
    assert not read_report(tmp_path).averages["Avg of four"]["16384"].complete


def without_complete(value):
    """As earlier versions wrote it."""
    if isinstance(value, dict):
        return {name: without_complete(part) for name, part in value.items() if name != "complete"}
    return [without_complete(part) for part in value] if isinstance(value, list) else value


def test_a_report_that_does_not_say_what_is_complete_is_told_by_its_counts(tmp_path):
    partly = report([unjudged("docmath", [1.0, 0.0, 0.0], 1), *SIX[1:]])
    (tmp_path / "report.json").write_text(json.dumps(without_complete(partly.to_json())))
    read = read_report(tmp_path)
    assert [found.mean.complete for found in read.results] == [False, *[True] * 5]
    assert read == partly


def test_heads_of_tables_name_what_differs_from_the_protocol():
    usual = {"protocol": "paper", "mode": "spell"}
    other = {
        "protocol": "paper",
        "mode": "strict",
        "thinking": True,
        "limit": 20,
        "samples": 2,
        "temperature": 1.0,
        "max_tokens": 99,
    }
    asked = (
        "protocol paper, mode strict, thinking, at most 20 questions of each, samples 2, temperature 1.0,"
        " output tokens 99"
    )
    for settings, head in ((usual, "protocol paper, mode spell"), (other, asked)):
        one = Report("runs/qwen2.5-7b/hf", settings, SIX, averages(SIX))
        heads = [line for line in one.markdown().splitlines() if line.startswith("| protocol")]
        assert [line.split(" | ")[0] for line in heads] == [f"| {head}"] * 2
        details = [line for line in one.markdown().splitlines() if line.startswith("## ")]
        assert len(details) == 6 and all(line.endswith(f" ({head})") for line in details)
        assert beside(one, "Qwen2.5-7B").markdown().splitlines()[0].endswith(f"(arXiv 2509.23863v4), {head}")
        assert compare([one, one]).markdown().startswith(f"| {head} |")


def test_a_part_of_a_table_has_no_average():
    [part] = beside(report(SIX[:1]), "Qwen2.5-14B").parts
    assert [mean is not None for mean in part.ours] == [True, False, False, False, False]
    assert part.gains == [pytest.approx(50 - 57.6), None, None, None, None]
    base = beside(report([result("aime24", [1.0], None)]), "Qwen2.5-32B")
    assert (base.parts[0].table.name, base.parts[0].gains[0]) == ("Table 7", pytest.approx(100 - 15.83))


def test_what_does_not_compare_is_refused():
    with pytest.raises(SpellError, match="--protocol paper"):
        beside(report(SIX, "official"), "Qwen2.5-7B")
    with pytest.raises(SpellError, match=r"Table 1: docmath frames .* at 16384|16384 and 100000"):
        beside(report([result("docmath", [1.0], 8192)]), "Qwen2.5-7B")
    with pytest.raises(SpellError, match="official, paper"):
        compare([report(SIX), report(SIX, "official")])


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("out/qwen2.5-7b-instruct-spell/hf", "Qwen2.5-7B-Instruct"),
        ("/models/Qwen2.5-7B", "Qwen2.5-7B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct"),
        ("Qwen3_30B_A3B_Thinking_2507", "Qwen3-30B-A3B-Thinking-2507"),
    ],
)
def test_models_are_known_by_their_names(name, model):
    assert find_model(name) == model


def test_an_unknown_model_is_told_what_to_say():
    with pytest.raises(SpellError, match=r"paper:Qwen2\.5-7B"):
        find_model("Qwen2.5-72B")
    refused = CliRunner().invoke(
        app, ["eval", "docmath", "--endpoint", "http://127.0.0.1:9", "--compare", "release"]
    )
    assert refused.exit_code == 1
    assert "paper:MODEL" in refused.output


def test_output_limits_follow_the_protocol_and_the_kind_of_model():
    """The paper: 4K, reasoning models 20K. MMLU-Pro's and HELMET's authors: greedy, and a length for each task."""
    for benchmark in find():
        paper = benchmark.terms("paper")
        assert (paper.output(None, False), paper.output(None, True), paper.greedy) == (4_096, 20_000, False)
    greedy = {benchmark.name for benchmark in find() if benchmark.terms("official").greedy}
    assert greedy == {"mmlu-pro", "helmet", "helmet-rag", "helmet-icl"}
    [helmet, mrcr] = (benchmark.terms("official") for benchmark in find(["helmet", "mrcr"]))
    case = Item("a", (), "?", ("x",), max_tokens=400)
    assert (helmet.output(case, False), helmet.output(case, True), helmet.output(None, False)) == (
        400,
        20_000,
        1_200,
    )
    assert (helmet.shortest, mrcr.cut) == (65_536, "skip")


@pytest.mark.long
def test_tables_name_the_protocol(tmp_path):
    for protocol in ("paper", "official"):
        one = report(SIX, protocol)
        one.write(tmp_path)
        assert read_report(tmp_path) == one
        tables_of_it = [
            line for line in one.markdown().splitlines() if line.startswith(("| protocol", "## "))
        ]
        assert len(tables_of_it) == 8
        assert all(f"protocol {protocol}" in line for line in tables_of_it)
        assert f"protocol {protocol}" in compare([one, one]).markdown()
