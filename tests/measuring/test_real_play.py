"""What a real model is taught before it plays, and what it is examined by."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from places import TOY_SEED

from benchmarks import real_play
from spell_megatron.config import HeldOutConfig, load_config
from spell_megatron.corpus import load_heldout
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.grading import rule_reward
from spell_megatron.tools.warmup.lessons import PROMPT_WEIGHT
from spell_megatron.types import Cluster, Document, Question
from tokenizer.chat import ChatTokenizer

pytestmark = pytest.mark.unit

HERE = Path(real_play.__file__).parent


def test_the_recipe_is_sound() -> None:
    config = load_config(str(HERE / "real_play.yaml"))
    assert config.model.prompts == "full", "a real model is told what to do"


def test_held_out_answers_stand_in_their_documents() -> None:
    questions = load_heldout(HeldOutConfig(path=str(HERE / "reading.jsonl"), questions=100))
    assert len(questions) == 48
    for cluster, question in questions:
        assert question.answer.lower() in " ".join(document.text for document in cluster.documents).lower()
        assert rule_reward(question.task, f"The correct answer is {question.answer}.", question) == 1.0


def test_form_is_shown_for_one_task_alone_and_every_token_of_a_reply_counts_alike() -> None:
    lesson = real_play.FORM.terms[0].lessons[0]
    exchanges = [
        real_play.SHOWN.transcripts(0, index, habits=lesson.habits, scale=lesson.scale, mix=lesson.mix)
        for index in range(8)
    ]
    assert {exchange.task for exchange in itertools.chain(*exchanges)} == {real_play.TASK}
    batch = next(real_play.lessons(ChatTokenizer.load(TOY_SEED)).batches(lesson, 4096))
    weights = {weight for group in batch.groups for sample in group.samples for weight in sample.weights}
    assert weights == {PROMPT_WEIGHT, 1.0}


def test_valid_quoted_and_kept_questions_are_counted_among_all() -> None:
    cluster = Cluster("c", "prose", (Document("1", "Ilse was the first director."), Document("2", "Tarn.")))
    asked = 'Ilse was the first director. {"question": "Who was the first director?", "answer": "Ilse"}'

    def episode(outcome: str, valid: bool = True, documents: tuple[int, ...] = (0,)) -> Episode:
        question = Question(real_play.TASK, "Who was the first director?", "Ilse") if valid else None
        given = {"documents": documents, "asked_text": asked, "question": question, "outcome": outcome}
        return Episode(1, 0, 0, "c", "prose", real_play.TASK, 2, **given)

    episodes = [
        episode("kept"),
        episode("zero_variance", documents=(1,)),
        *[episode("bad_format", False)] * 2,
    ]
    found = real_play.shares(episodes, [(cluster, real_play.TASK)])
    assert found == {"asked": 4, "valid": 0.5, "quoted": 0.25, "kept": 0.25, "reward": 0.0}
