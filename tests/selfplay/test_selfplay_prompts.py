"""Prompts say what each role needs, and insert texts without reading them; cut documents fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selfplay_stage import TASKS, Characters

from spell_megatron.config import load_config
from spell_megatron.selfplay import prompts_of
from spell_megatron.selfplay.fitting import fit, water_level
from spell_megatron.selfplay.grading import rule_reward
from spell_megatron.selfplay.prompts import STYLES, Prompts, write_prompts
from spell_megatron.types import Document, Question, SpellError

pytestmark = pytest.mark.unit

DOCUMENTS = (Document("1", "Ada lived in Rome."), Document("2", "Rome has 12 hills.", "Rome"))
CHOICES = Question("doc_mc", "Which hill?", "B", {"A": "one", "B": "two", "C": "three", "D": "four"})


def question(task: str, text: str = "How many hills?") -> Question:
    return Question(task, text, "B", CHOICES.options) if task == "doc_mc" else Question(task, text, "12")


@pytest.mark.parametrize("style", ["full", "short"])
@pytest.mark.parametrize("task", TASKS)
def test_every_role_and_task_is_worded(style: str, task: str):
    prompts = Prompts(style)
    key = "C" if task == "doc_mc" else None
    first = prompts.questioner(task, DOCUMENTS, (), key)
    later = prompts.questioner(task, DOCUMENTS, (question(task, "An earlier one?"),), key)
    asked = prompts.responder(question(task), DOCUMENTS)
    for message in (first, later, asked):
        assert all(document.text in message for document in DOCUMENTS)
        assert message.index("<text>") < message.index("Ada") < message.index("</text>")
    assert "An earlier one?" in later
    assert "An earlier one?" not in first
    blind = prompts.responder(question(task), ())
    assert "Empty" in blind
    assert "Ada" not in blind
    assert "How many hills?" in blind
    judged = prompts.verifier(question(task), "thirteen")
    assert "thirteen" in judged
    assert "How many hills?" in judged
    assert "Ada" not in judged


@pytest.mark.parametrize("task", TASKS)
def test_full_prompts_state_the_format(task: str):
    prompts = Prompts("full")
    for history in ((), (question(task),)):
        message = prompts.questioner(task, DOCUMENTS, history, "C")
        assert '{"question":' in message
        assert ('"options"' in message) == (task == "doc_mc")
    sentence = "Therefore, the answer is (" if task == "docmath_qa" else "The correct answer is ("
    assert sentence in prompts.responder(question(task), DOCUMENTS)
    verifier = prompts.verifier(question(task), "x")
    assert "[[YES]]" in verifier
    assert "[[NO]]" in verifier
    assert "0.15 %" in verifier


def test_the_key_is_filled_in():
    message = Prompts("full").questioner("doc_mc", DOCUMENTS, (), "D")
    assert "under the letter D" in message
    assert '"answer": "D"' in message


def test_choices_stand_one_per_line_led_by_their_letters():
    message = Prompts("full").responder(CHOICES, DOCUMENTS)
    assert re.search(r"Which hill\?\s+\(A\) one\n\s*\(B\) two\n\s*\(C\) three\n\s*\(D\) four", message)


def test_short_choices_stand_one_per_line_before_their_letters():
    """The toy model looks a value up and reads on: it never learnt to read backwards."""
    message = Prompts("short").responder(CHOICES, DOCUMENTS)
    assert re.search(r"Which hill\?\n one is \(A\)\n two is \(B\)\n three is \(C\)\n four is \(D\)", message)


def test_documents_are_inserted_and_never_rendered():
    text = "{{ 7 * 6 }} {% for x in y %} {# #} <b>&amp;</b> </text> Question: done?"
    message = Prompts("full").responder(question("docmath_qa"), (Document("1", text, "{{ title }}"),))
    assert "{{ 7 * 6 }} {% for x in y %} {# #} <b>&amp;</b>" in message
    assert "{{ title }}" in message
    assert message.count("</text>") == 1


def test_an_unknown_style_names_the_known_ones():
    with pytest.raises(SpellError, match=r"full.*short"):
        Prompts("fancy")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    write_prompts(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("style", STYLES)
def test_the_shipped_prompts_are_written_for_editing_and_are_then_the_same(tmp_path: Path, style: str):
    write_prompts(tmp_path, style)
    own, shipped = Prompts(str(tmp_path)), Prompts(style)
    for task in TASKS:
        assert own.responder(question(task), DOCUMENTS) == shipped.responder(question(task), DOCUMENTS)
    (tmp_path / "_rules.j2").write_text("edited")
    with pytest.raises(SpellError, match="not empty"):
        write_prompts(tmp_path, style)
    assert (tmp_path / "_rules.j2").read_text() == "edited"


def test_prompts_of_ones_own_are_used(mine: Path):
    (mine / "verifier.j2").write_text("{{ question.text }}|{{ answer }}|{{ reference }}")
    for task in TASKS:
        (mine / f"verifier_{task}.j2").unlink()
    assert Prompts(str(mine)).verifier(question("docmath_qa"), "[[x") == "How many hills?|[ [x|12"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("responder_docmath_qa.j2", None, "none of the templates responder_docmath_qa.j2, responder.j2"),
        ("_rules.j2", None, "_rules.j2"),
        ("_rules.j2", "- one\n- {{ langauge }}", "_rules.j2, line 2: 'langauge' is undefined"),
        ("_rules.j2", "{{ langauge }}", "the variables here: documents, form, history, key, language, task"),
        ("verifier_doc_mc.j2", "a\n{% if %}", "verifier_doc_mc.j2, line 2"),
        ("verifier_doc_mc.j2", "{{ question.text }} {{ answer }}", "verifier's prompt of doc_mc leaves out"),
        ("verifier_doc_mc.j2", "{{ question.options['E'] }}", "verifier_doc_mc.j2, line 1"),
        ("responder_doc_mc.j2", "{{ question.text }}", "responder's prompt of doc_mc leaves out"),
        ("questioner_doc_mc_history.j2", "{{ documents[0].text }}", "leaves out"),
        ("questioner_doc_mc.j2", "{{ documents[0].text }}\n{{ 1 / 0 }}", "questioner_doc_mc.j2, line 2"),
        ("_question.j2", "{{ ''.__class__.__mro__ }}", "_question.j2, line 1"),
        ("_question.j2", b"\xff\xfe", "can't decode"),
    ],
)
def test_a_template_that_cannot_be_used_is_named_at_the_start(
    mine: Path, name: str, text: str | bytes | None, said: str
):
    if text is None:
        (mine / name).unlink()
    else:
        (mine / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpellError) as error:
        prompts_of(load_config("toy", [f"model.prompts={mine}"]))
    assert said in str(error.value)


def test_a_task_that_no_source_has_needs_no_template(mine: Path):
    for path in mine.glob("*docmath*"):
        path.unlink()
    overrides = [f"model.prompts={mine}", "corpus.sources=[{tasks: [doc_mc]}]"]
    assert prompts_of(load_config("toy", overrides)).responder(CHOICES, DOCUMENTS)
    with pytest.raises(SpellError, match="docmath_qa"):
        prompts_of(load_config("toy", overrides[:1]))


@pytest.mark.parametrize("form", ["sentence", "box", "tag"])
@pytest.mark.parametrize("task", TASKS)
def test_an_answer_in_the_form_that_was_asked_for_is_read(form: str, task: str):
    config = load_config("toy", ["model.prompts=full", f"model.answer_form={form}"])
    last = prompts_of(config).responder(question(task), DOCUMENTS).splitlines()[-1]
    given = re.search(r"(?:Therefore, the|The correct) answer is.*(?=\")|\\boxed.*|<answer>.*", last)
    assert given
    stated = given[0].replace("insert answer here", question(task).answer)
    assert rule_reward(task, f"Some thoughts.\n{stated}", question(task)) == 1.0
    assert rule_reward(task, last, question(task)) == 0.0, "an echo of the prompt is no answer"


@pytest.mark.parametrize(
    ("language", "said"), [("German", "Write in German"), ("", "the language of the documents")]
)
def test_the_language_is_asked_for(language: str, said: str):
    config = load_config("toy", ["model.prompts=full", f"model.language={language}"])
    assert said in prompts_of(config).questioner("docmath_qa", DOCUMENTS)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 200), max_size=8), st.integers(-50, 1500))
def test_water_level(lengths: list[int], budget: int):
    level = water_level(lengths, budget)
    assert sum(min(length, level) for length in lengths) <= max(budget, 0)
    if level < max(lengths, default=0) and budget >= 0:
        assert sum(min(length, level + 1) for length in lengths) > budget


def render(documents):
    return "Read: " + "\n".join(document.text for document in documents)


def test_a_prompt_that_fits_is_left_alone():
    fitted = fit(render, DOCUMENTS, Characters(), 1000)
    assert fitted is not None
    assert fitted.cut == 0
    assert Characters().decode(fitted.tokens) == render(DOCUMENTS)


def test_the_longest_documents_are_cut_first():
    documents = [Document("1", "short"), Document("2", "x" * 500), Document("3", "y" * 300)]
    fitted = fit(render, documents, Characters(), 300)
    assert fitted is not None
    assert len(fitted.tokens) <= 300
    text = Characters().decode(fitted.tokens)
    assert "short" in text
    assert text.count("x") == text.count("y") > 100
    assert fitted.cut == 800 - text.count("x") - text.count("y")


def test_a_question_that_leaves_no_room_has_no_prompt():
    assert fit(lambda _: "x" * 101, DOCUMENTS, Characters(), 100) is None
    assert fit(lambda _: "x" * 101, (), Characters(), 100) is None
