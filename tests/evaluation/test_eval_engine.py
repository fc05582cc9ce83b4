"""Every benchmark from its files to the table, through one real vLLM server with the toy model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from eval_samples import write_samples
from places import TOY_SEED

from eval import Settings, evaluate, list_benchmarks, read_report
from spell_megatron.base.terminal import Terminal

pytestmark = pytest.mark.engine
MODEL = TOY_SEED
SAMPLES = 2
LIMIT = 4
WINDOW = 440  # tokens; the fixed wording of the longest prompt has to fit in the toy tokenizer


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def report(out):
    data = write_samples(out / "data", long_words=900)
    evaluation = evaluate(
        [*list_benchmarks(), "toy"],
        models=[MODEL],
        data=data,
        out=out,
        max_input=[WINDOW],
        settings=Settings(samples=SAMPLES, max_tokens=48, concurrency=8, limit=LIMIT),
        console=Terminal(file=io.StringIO()),
    )
    [report] = evaluation.reports
    return report


def test_every_benchmark_has_its_row(report):
    assert [result.benchmark for result in report.results] == [*list_benchmarks(), "toy"]
    for result in report.results:
        assert result.complete, (result.label, result.problems, result.counts)
        assert 0 <= result.mean.low <= result.mean.value <= result.mean.high <= 1
        assert len(result.best_of) == SAMPLES
    assert set(report.averages["Avg of four"]) == set(report.averages["mean of six"]) == {str(WINDOW)}


def test_the_toy_model_answers_toy_questions(report):
    toy = report.results[-1]
    assert toy.counts["answered"] == LIMIT * SAMPLES
    assert toy.counts["no answer found"] <= LIMIT * SAMPLES / 2


def test_long_prompts_were_cut_to_the_limit(report, out):
    journals = list(out.glob("*/journal.jsonl"))
    records = [json.loads(line) for line in journals[0].read_text(encoding="utf-8").splitlines()]
    long = [record for record in records if "sent" in record and "@" in record["benchmark"]]
    assert max(record["sent"] for record in long) == WINDOW < max(record["input"] for record in long)


def test_tables(report, out):
    [path] = out.glob("*/report.json")
    assert read_report(path) == report
    table = path.with_name("report.md").read_text(encoding="utf-8")
    for result in report.results:
        assert f"## {result.label}" in table
    assert "rule only, no judge" in table
    assert "ROUGE-L sum (no HELMET figure)" in table
    assert path.with_name("report.png").stat().st_size > 1000
