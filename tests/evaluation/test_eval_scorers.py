"""Scorers against vectors that the benchmarks' own scorers computed."""

import asyncio
import json
import math
import os
import random
import signal
from itertools import combinations

import pytest
from places import ROOT, VECTORS

from eval import extract
from eval.benchmark import Completion, Grade, Item, Unreadable, fill, final_answer
from eval.benchmarks import helmet
from eval.benchmarks.docmath import DocMath, official_equal
from eval.benchmarks.helmet import Helmet, answer_after, judge_f1, last_json, rouge_l_sum
from eval.benchmarks.hotpotqa import HotpotQA
from eval.benchmarks.longbench_v2 import LongBenchV2
from eval.benchmarks.mmlu_pro import MmluPro, example, extract_letter
from eval.benchmarks.mrcr import Mrcr, bin_index
from eval.benchmarks.reading import covers_words, longbench_f1
from eval.judge import bracketed_verdict, official_verdict
from eval.prompting import middle_cut
from eval.scoring import isolated
from eval.squad import normalise
from eval.statistics import figure, paired, pass_at_k, pass_at_k_bootstrap
from spell_megatron.selfplay.grading import extract_answer

pytestmark = pytest.mark.unit


def vectors(name: str) -> list[dict]:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def item(*references: str, **facts) -> Item:
    return Item("1", (), "Who?", references, facts=facts)


def answered(text: str, finish: str = "stop") -> str | None:
    return final_answer(Completion(text, finish, 1))


@pytest.mark.parametrize("row", vectors("benchmarks/docmath_spell"), ids=lambda row: row["note"][:40])
def test_docmath(row):
    grade = DocMath().grade(item(row["reference"]), answered(row["prediction"]), "spell")
    assert (grade.score, grade.prediction) == (row["score"], row["parsed"])


@pytest.mark.parametrize("row", vectors("benchmarks/docmath_official"), ids=lambda row: row["note"])
def test_docmath_official(row):
    assert official_equal(row["prediction"], row["reference"]) == bool(row["score"])


@pytest.mark.parametrize("mode", ["spell", "strict"])
@pytest.mark.parametrize("answer", [None, "", "I have no idea."])
def test_an_answer_that_is_none_counts_in_every_figure(answer, mode):
    """Left out, it would raise the mean of the others: the more a model is cut off, the better it would look."""
    assert DocMath().grade(item("35"), answer, mode).metrics == {"official": 0.0}
    assert DocMath().grade(item("0"), answer, mode).metrics == {"official": 1.0}, "the data set's own reading"
    read = HotpotQA().grade(item("Oslo"), answer, mode).metrics
    assert read == dict.fromkeys(("exact_match", "f1", "f1_any"), 0.0)


def test_a_summary_that_is_none_counts_in_every_figure():
    assert Helmet().grade(item("a summary"), None, "spell").metrics == {"rouge_l_sum": 0.0}


@pytest.mark.parametrize(("answer", "score"), [("1e306", 0.0), ("-1e306", 0.0), ("1e305", 1.0)])
def test_docmath_reads_the_largest_numbers(answer, score):
    """A thousand times 1e306 is no number."""
    grade = DocMath().grade(item("1e305"), f"\\boxed{{{answer}}}", "spell")
    assert grade.score == score
    assert official_equal("0", "1e306") is False


@pytest.mark.parametrize("row", vectors("benchmarks/docqa_spell"), ids=lambda row: row["note"][:40])
def test_reading(row):
    answer = answered(row["prediction"])
    grade = HotpotQA().grade(item(row["reference"]), answer, "spell")
    assert (grade.score, grade.prediction) == (row["score"], row["parsed"])
    if answer is not None:
        assert grade.metrics["exact_match"] == row["em"]
        assert grade.metrics["f1"] == pytest.approx(row["f1"])


@pytest.mark.parametrize(
    ("name", "find"),
    [("math_extract", extract.number), ("qa_extract", extract.phrase), ("mc_extract", extract.letter)],
)
def test_extraction(name, find):
    for row in vectors(name):
        text = answered(row["response"])
        assert (None if text is None else find(text)) == row["answer"], row["response"]


def test_reading_strict_matches_words_and_every_gold_answer():
    assert not covers_words("I do not know", ("no",))
    assert covers_words("in Paris, France", ("London", "paris"))
    assert HotpotQA().grade(item("None"), "I cannot tell", "strict").score == 0


def test_longbench_f1():
    for row in vectors("benchmarks/longbench_qa_f1"):
        assert longbench_f1(row["prediction"], row["reference"]) == pytest.approx(row["score"]), row["note"]
        assert normalise(row["prediction"]) == row["normalised_prediction"]
    for row in vectors("benchmarks/longbench_normalise"):
        assert normalise(row["prediction"]) == row["normalised"]
    [row] = vectors("benchmarks/longbench_aggregate")
    pairs = zip(row["prediction"], row["reference"], strict=True)
    best = [max(longbench_f1(prediction, gold) for gold in golds) for prediction, golds in pairs]
    assert round(100 * sum(best) / len(best), 2) == row["score"]


@pytest.mark.parametrize("row", vectors("benchmarks/longbench_v2"), ids=lambda row: row["note"][:40])
def test_longbench_v2(row):
    grade = LongBenchV2().grade(item(row["reference"]), answered(row["prediction"]), "spell")
    assert (grade.score, grade.prediction) == (row["score"], row["parsed"])


def test_strict_reads_answers_as_training_does():
    grade = LongBenchV2().grade(item("B"), "The answer is Because", "spell")
    assert (grade.score, grade.prediction) == (1, "B")
    assert LongBenchV2().grade(item("B"), "The answer is Because", "strict").prediction is None
    assert LongBenchV2().grade(item("B"), "The correct answer is option **b**.", "strict").score == 1
    assert DocMath().grade(item("12345"), "The answer is (12 345).", "spell").score == 0
    assert DocMath().grade(item("12345"), "The answer is (12 345).", "strict").score == 1
    grade = HotpotQA().grade(
        item("Rome", "Paris"), "The correct answer is (Paris), as the answer is in it.", "strict"
    )
    assert (grade.score, grade.prediction) == (1, "Paris")


def table() -> list[list[str]]:
    """The rows of docs/evaluation.md that show where the reader and the scorers differ."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = text.partition("## Training's reader and the scorers")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return rows[2:]


@pytest.mark.parametrize(("kind", "text", "read", "scored", "why"), table())
def test_the_table_of_differences_is_true(kind: str, text: str, read: str, scored: str, why: str):
    task, official = {
        "number": ("docmath_qa", extract.number),
        "letter": ("doc_mc", extract.letter),
        "words": ("doc_general_qa", extract.phrase),
    }[kind]
    text = text.strip("`").replace("\\n", "\n")
    shown = [None if cell == "none" else cell.strip("`") for cell in (read, scored)]
    assert [extract_answer(task, text), official(text)] == shown
    assert why


def _contest(row):
    from eval.benchmarks.aime24 import Aime24

    return Aime24().grade(item(row["reference"]), row["prediction"], "spell").score


@pytest.mark.parametrize("name", ["aime_math_verify", "amc_math_verify"])
def test_contest(name):
    for row in vectors(f"benchmarks/{name}"):
        assert _contest(row) == row["score"], row


def test_a_right_answer_is_right_on_a_machine_that_is_suspended(monkeypatch):
    """As if it were so the moment after an alarm was set."""
    monkeypatch.setattr(signal, "alarm", lambda seconds: seconds and os.kill(os.getpid(), signal.SIGALRM))
    assert _contest({"reference": "\\frac{3}{7}", "prediction": "\\boxed{\\frac{9}{21}}"}) == 1


def test_contest_reads_degrees_and_float_gold():
    assert _contest({"reference": "336^\\circ", "prediction": "\\boxed{336}"}) == 1
    assert _contest({"reference": "27.0", "prediction": "so \\boxed{27}"}) == 1
    assert _contest({"reference": "033", "prediction": "\\boxed{33}"}) == 1


def test_mmlu_pro():
    for row in vectors("benchmarks/mmlu_pro_extract"):
        assert extract_letter(row["prediction"]) == row["extracted"], row
    for row in vectors("benchmarks/mmlu_pro_format"):
        fields = row["prediction"]
        assert example(fields["question"], fields["options"], fields["cot_content"]) == row["formatted"]


def test_mmlu_pro_counts_the_expected_guess():
    grade = MmluPro().grade(Item("1", (), "?", ("A",), facts={"options": 4}), "no idea", "spell")
    assert (grade.score, grade.metrics["no_letter"]) == (0.25, 1.0)


def test_mmlu_pro_extraction_is_linear():
    extract_letter("Answer " * 200_000)


def test_helmet():
    for row in vectors("benchmarks/helmet_judge_f1"):
        p = row["prediction"]
        supported, sentences = p["precision_found"], p["sentence_count"]
        f1 = judge_f1(p["fluency"], p["recall_found"], p["num_keypoints"], supported, sentences)
        assert f1 == pytest.approx(row["score"])
    for row in vectors("benchmarks/helmet_parse_json"):
        assert last_json(row["prediction"]) == row["parsed"]
    for row in vectors("benchmarks/helmet_rouge"):
        golds = row["reference"] if isinstance(row["reference"], list) else [row["reference"]]
        line = answer_after("summary:", row["prediction"])
        assert line == row["parsed"]
        best = max(rouge_l_sum(text, golds) for text in (row["prediction"], line))
        assert best == pytest.approx(row["score"])


@pytest.mark.parametrize(
    ("output", "read"),
    [
        ("label: label: 12", "12"),
        ("Label:label:  12\nlabel: 3", "12"),
        ("label:\nlabel: 3", ""),
        ("label: a label: 3", "a label: 3"),
        ("12\n3", "12"),
    ],
)
def test_a_mark_may_be_said_twice(output, read):
    """Chat models repeat the one that ends the prompt of HELMET's authors."""
    assert answer_after("label:", output) == read


@pytest.mark.parametrize(
    ("mode", "said", "score"),
    [
        ("spell", "The answers agree: YES", 1.0),
        ("strict", "The answers agree: YES", None),
        ("strict", "They do NOT differ. [[YES]]", 1.0),
        ("strict", "They agree. [[NO]]", 0.0),
        ("spell", "hm", None),
    ],
)
def test_a_reply_without_the_reading_that_counts_is_no_verdict(mode, said, score):
    async def ask(prompt, parse):
        if (parsed := parse(said)) is None:
            raise Unreadable("asked again, in vain")
        return parsed

    async def judge():
        return (await HotpotQA().judge(item("Rome"), Grade(0.0, "Roma", "Roma"), ask, mode)).score

    if score is None:
        with pytest.raises(Unreadable):
            asyncio.run(judge())
    else:
        assert asyncio.run(judge()) == score


def test_mrcr():
    for row in vectors("benchmarks/mrcr"):
        question = item(row["reference"], prefix=row["random_string_to_prepend"])
        grade = Mrcr().grade(question, row["prediction"], "spell")
        assert grade.score == pytest.approx(row["score"]), row["note"]


def test_mrcr_bins_are_those_of_the_card():
    """evalscope's vectors close bins on the left; the card closes them on the right. They agree elsewhere."""
    for row in vectors("benchmarks/mrcr_bins"):
        tokens = row["prediction"]
        if tokens not in (65_536, 524_288) and tokens <= 1_048_576:
            assert bin_index(tokens) == row["score"]
    assert [bin_index(n) for n in (8192, 8193, 16384, 16385, 524_288)] == [0, 1, 1, 2, 6]


def test_judge_verdict():
    for row in vectors("benchmarks/judge_verdict"):
        assert official_verdict(row["prediction"]) == bool(row["score"])
    assert bracketed_verdict("first [[NO]], on reflection [[YES]]") is True
    assert bracketed_verdict("It does NOT differ. [[YES]]") is True
    assert bracketed_verdict("perhaps") is None


def test_truncation():
    for row in vectors("benchmarks/truncation"):
        assert middle_cut(row["prediction"], row["reference"]) == row["truncated"]
    assert middle_cut(range(10), 5) == [0, 1, 7, 8, 9]


@pytest.mark.parametrize(
    ("text", "finish", "prefilled", "answer"),
    [
        ("a</think>b</think>c", "stop", False, "c"),
        ("<think>a", "stop", False, None),
        ("done</think>x <think> again", "stop", False, None),
        ("reasoning that was cut", "length", True, None),
        ("reasoning that was cut", "length", False, "reasoning that was cut"),
        ("no tags at all", "stop", True, "no tags at all"),
    ],
)
def test_final_answer(text, finish, prefilled, answer):
    assert final_answer(Completion(text, finish, 1), prefilled) == answer


def test_fill_does_not_fill_twice():
    assert fill("{context}|{question}", context="{question}", question="{context}") == "{question}|{context}"


def test_pass_at_k_vectors():
    for row in vectors("benchmarks/passk"):
        scores, k = row["prediction"], row["reference"]
        assert pass_at_k(scores, k) == pytest.approx(row["unbiased_pass_at_k"])
        assert pass_at_k_bootstrap(scores, k) == pytest.approx(row["expected_with_replacement"])
        assert pass_at_k_bootstrap(scores, k) == pytest.approx(row["score"], abs=0.05)


def test_pass_at_k_equals_brute_force():
    chance = random.Random(1)
    for n in range(1, 8):
        for scores in ([float(chance.random() < 0.4) for _ in range(n)], [chance.random() for _ in range(n)]):
            for k in range(1, n + 1):
                draws = [max(draw) for draw in combinations(scores, k)]
                assert pass_at_k(scores, k) == pytest.approx(sum(draws) / len(draws))
    with pytest.raises(ValueError):
        pass_at_k([1.0], 2)


def test_bootstrap_expectation_equals_simulation():
    chance, scores = random.Random(2), [0.0, 0.0, 0.3, 1.0, 0.7]
    draws = [max(chance.choices(scores, k=3)) for _ in range(40_000)]
    assert pass_at_k_bootstrap(scores, 3) == pytest.approx(sum(draws) / len(draws), abs=0.01)


def test_intervals_cover_the_truth():
    """Of intervals over 150 questions with unequal difficulty, about 95 % hold the true mean."""
    chance, hits, runs = random.Random(3), 0, 150
    for _ in range(runs):
        means = []
        for _ in range(150):
            difficulty = chance.betavariate(1, 1)
            means.append(sum(chance.random() < difficulty for _ in range(4)) / 4)
        interval = figure(means)
        hits += interval.low <= 0.5 <= interval.high
    assert 0.89 <= hits / runs <= 0.99


def test_strata_weigh_the_same():
    values, strata = [1.0] * 9 + [0.0], ["a"] * 9 + ["b"]
    assert figure(values, strata).value == 0.5
    assert figure(values).value == pytest.approx(0.9)
    assert math.isnan(figure([]).value)


def test_paired_difference_is_sharper_than_two_intervals():
    chance = random.Random(4)
    before = [chance.random() for _ in range(200)]
    after = [min(1.0, score + 0.05) for score in before]
    gain = paired(before, after)
    assert gain.difference.low > 0.03
    assert figure(before).high > figure(after).low
    assert gain.better == sum(score < 1 for score in before)
    assert gain.worse == 0


@pytest.mark.long
def test_a_scorer_that_takes_too_much_is_ended_and_the_others_go_on():
    tasks = [(0, 1), (600, 1), (0, 8 << 30), (0, 3)]
    assert list(isolated("work_to_bound:take", tasks, seconds=0.5)) == [1, None, None, 3]


@pytest.mark.parametrize(("said", "read"), [(0, (0.0,)), (1, (1.0,)), (5, None), (-1, None), (True, None)])
def test_a_fluency_is_none_or_one(said, read):
    """A judge that is used to five points would multiply a score by them."""
    assert helmet._reader("fluency", most=1)(json.dumps({"fluency": said})) == read
