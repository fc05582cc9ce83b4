"""The toy world: endless, split cleanly, truthful, and written in the formats that the parsers read."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from spell_megatron.corpus.toy import (
    HELD_OUT,
    TASKS,
    TRAIN,
    heldout,
    plain,
    toy_cluster,
    toy_clusters,
    truth,
)
from spell_megatron.corpus.toy.world import ask
from spell_megatron.types import Cluster, Document, Question

pytestmark = pytest.mark.unit

STREET = Cluster(
    "street",
    "toy",
    (
        Document("1", "Nora visits Hugo. Nora lives in Rome. The savings of Nora are 4."),
        Document(
            "2", "The home of Hugo is Oslo. Hugo saves 11. The friend of Hugo is Nora. Hugo works as baker."
        ),
        Document("3", "Acorn sells axe for 3. At Acorn the price of bag is 12. The owner of Acorn is Hugo."),
    ),
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Where does Nora live?", "Rome"),
        ("What is the home of Hugo?", "Oslo"),
        ("What is the home of the friend of Nora?", "Oslo"),
        ("Where does the owner of Acorn live?", "Oslo"),
        ("What is the friend of the owner of Acorn?", "Nora"),
        ("Who does Acorn belong to?", "Hugo"),
        ("What is the sum of the savings of Nora and Hugo?", "15"),
        ("What is the difference of the savings of Nora and the friend of Nora?", "7"),
        ("How much more does Hugo save than Nora?", "7"),
        ("How much more does Nora save than Hugo?", None),
        ("How much do axe and bag cost together at Acorn?", "15"),
        ("How much more does bag cost than axe at Acorn?", "9"),
        ("What is the job of Nora?", None),
        ("What is the home of Greta?", None),
        ("What is the sum of the prices of axe and cup at Acorn?", None),
        ("What is the sum of the prices of axe and owner at Acorn?", None),
        ("What is the sum of the prices of savings and savings at Nora?", None),
        ("How much more does city cost than job at the friend of Nora?", None),
        ("Why is the sky blue?", None),
        ("", None),
    ],
)
def test_truth_is_read_off_the_documents(text: str, answer: str | None) -> None:
    assert truth(STREET, Question("doc_general_qa", text, "")) == answer


def test_truth_of_choices_is_the_one_letter_that_fits() -> None:
    def letter(*choices: str) -> str | None:
        options = dict(zip("ABCD", choices, strict=True))
        return truth(STREET, Question("doc_mc", "Where does Nora live?", "A", options))

    assert letter("Oslo", "Rome", "Lima", "Kiel") == "B"
    assert letter("Oslo", "Lyon", "Lima", "Kiel") is None
    assert letter("Oslo", "Rome", "the city of Rome", "Kiel") is None


def test_plain_answers() -> None:
    assert plain("the city of Rome") == "Rome"
    assert plain(" thirteen.") == "13"
    assert plain("(B)") == "B"
    assert plain("") == ""


def test_the_same_arguments_give_the_same_cluster_and_others_another() -> None:
    assert toy_cluster(3, 5) == toy_cluster(3, 5)
    different = [toy_cluster(3, 5), toy_cluster(3, 6), toy_cluster(4, 5), toy_cluster(3, 5, HELD_OUT)]
    assert len({cluster.documents[0].text for cluster in different}) == 4
    first, second, *_ = (cluster for _, cluster in zip(range(2), toy_clusters(3), strict=False))
    assert (first, second) == (toy_cluster(3, 0), toy_cluster(3, 1))


def test_clusters_have_six_to_eight_documents() -> None:
    sizes = Counter(len(toy_cluster(0, index).documents) for index in range(200))
    assert set(sizes) == {6, 7, 8}


@pytest.mark.long
def test_training_and_held_out_share_no_document() -> None:
    train = {document.text for index in range(2000) for document in toy_cluster(0, index, TRAIN).documents}
    held = {document.text for index in range(2000) for document in toy_cluster(0, index, HELD_OUT).documents}
    assert not train & held
    assert len(train) > 12_000, "documents repeat: the world is too small"


def test_held_out_questions_are_balanced_and_true() -> None:
    pairs = heldout(300, seed=7)
    assert Counter(question.task for _, question in pairs) == dict.fromkeys(TASKS, 100)
    assert all(truth(cluster, question) == question.answer for cluster, question in pairs)
    assert len({cluster.id for cluster, _ in pairs}) == 300
    assert pairs == heldout(300, seed=7)


def test_held_out_keys_are_spread() -> None:
    keys = Counter(question.answer for _, question in heldout(600, seed=1) if question.options)
    assert set(keys) == set("ABCD")
    assert min(keys.values()) > 25


def test_every_task_can_be_asked_about_any_three_documents() -> None:
    rng = random.Random(0)
    for index in range(300):
        documents = rng.sample(toy_cluster(0, index).documents, 3)
        for task in TASKS:
            assert ask(documents, task, rng) is not None


def test_a_key_is_put_where_it_was_asked_for() -> None:
    rng = random.Random(0)
    for letter in "ABCD":
        derived = ask(STREET.documents, "doc_mc", rng, key=letter)
        assert derived is not None
        assert derived.question.answer == letter
        assert derived.question.options[letter] == derived.result
