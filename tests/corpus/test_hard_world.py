"""The hard world: one answer to every question, whatever stands beside it, and nothing shared between its halves."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from spell_megatron.corpus.hard import (
    FULL,
    HELD_OUT,
    LENGTHS,
    LINKS_ASKED,
    SMALL,
    TASKS,
    TRAIN,
    ask,
    cluster,
    grammar,
    plain,
    reach,
    truth,
    vocabulary,
    words,
)
from spell_megatron.corpus.hard.asking import Asked
from spell_megatron.corpus.hard.reading import Knowledge, read, solve
from spell_megatron.corpus.hard.world import half_of
from spell_megatron.corpus.static import StaticQuestions
from spell_megatron.corpus.worlds import WORLDS, recalled
from spell_megatron.selfplay.grading import rule_reward
from spell_megatron.selfplay.reading.texts import normalise
from spell_megatron.types import Cluster, Document, Question, SpellError

pytestmark = pytest.mark.unit

SMALL_WORLD = WORLDS["hard-small"]
SAID = dict.fromkeys(TASKS, "The correct answer is {v}.") | {"docmath_qa": "Therefore, the answer is {v}."}


@cache
def small(index: int) -> Cluster:
    return SMALL_WORLD.cluster(0, index)


STREET = Cluster(
    "street",
    "hard",
    tuple(
        Document(str(place), text)
        for place, text in enumerate(
            (
                "Nora Berg is a friend of Hugo Hale. The budget of Nora Berg is 4. Nora Berg lives in Oslo."
                " Nora Berg would like to live in Rome. Nora Berg kept a goat until last year."
                " The pet of Nora Berg is a hound.",
                "Hugo Hale has a budget of 11. The workplace of Hugo Hale is Acorn Books."
                " Key b1-b1-b1-b1 leads to key c2-c2-c2-c2.",
                "Acorn Books belongs to Nora Berg. At Acorn Books the price of bag is 12. Acorn Books sells cup for 3."
                " Key c2-c2-c2-c2 asks: What is the home of Nora Berg?",
                "This note is out of date. Nora Berg keeps a duck. Hugo Hale lives in Lima.",
                "Nora Holt lives in Kiel. Nora Holt has a budget of 9. Key d3-d3-d3-d3 leads to key d3-d3-d3-d3.",
            )
        )
    ),
)


_FRAGMENTS = (
    *(
        "Which has the lowest budget: ",
        "What is the sum of ",
        "What is the ",
        "the budget of ",
        "the friend of ",
    ),
    *(
        "Nora Berg",
        "Hugo Hale",
        ", ",
        " or ",
        " and ",
        "?",
        "/",
        "Key b1-b1-b1-b1 asks: ",
        " come to together?",
    ),
)


@pytest.mark.parametrize(
    ("text", "answer", "links", "documents"),
    [
        ("Where does Nora Berg live?", "Oslo", 1, 1),
        ("What is the residence of  Nora Holt?", "Kiel", 1, 1),
        ("What is the animal of Nora Berg?", "dog", 1, 1),
        ("What is the pet of the owner of Acorn Books?", "dog", 2, 2),
        ("What is the pet of the proprietor of the employer of Hugo Hale?", "dog", 3, 3),
        ("Where does the owner of the workplace of the friend of Nora Berg live?", "Oslo", 4, 3),
        ("What is the budget of Nora Berg?", "4", 1, 1),
        ("What is the price of cup at the workplace of Hugo Hale?", "3", 2, 2),
        (
            "What is the sum of the budget of Nora Berg, the budget of Nora Holt and the budget of Hugo Hale?",
            "24",
            1,
            3,
        ),
        (
            "What is the difference between the price of cup at Acorn Books and the price of bag at Acorn Books?",
            "9",
            1,
            1,
        ),
        (
            "By how much do the budget of Nora Holt and the budget of the friend of Nora Berg differ?",
            "2",
            2,
            3,
        ),
        ("Which has the highest budget: Nora Holt, Nora Berg or the friend of Nora Berg?", "Hugo Hale", 2, 3),
        ("Which has the lowest budget: Nora Holt or Nora Berg?", "Nora Berg", 1, 2),
        ("What is the answer to the question that key b1-b1-b1-b1 leads to?", "Oslo", 3, 3),
    ],
)
def test_what_is_asked_is_read_off_the_documents(text: str, answer: str, links: int, documents: int) -> None:
    question = Question("doc_general_qa", text, "")
    assert truth(STREET, question) == answer
    needed = reach(STREET, question)
    assert needed is not None
    assert (needed.links, needed.documents) == (links, documents)


@pytest.mark.parametrize(
    "text",
    [
        "Where does Hugo Hale live?",  # only the note that is out of date says
        "What does Greta Lang keep?",
        "What is the friend of Acorn Books?",
        "Which has the highest budget: Nora Berg or Nora Berg?",
        "What is the difference between the budget of Nora Berg?",
        "What is the sum of the budget of Nora Berg and the cup of Hugo Hale?",
        "What is the answer to the question that key d3-d3-d3-d3 leads to?",
        "Which has the lowest budget: Nora Holt or Key b1-b1-b1-b1 asks: the friend of Nora Berg?",
        "Why is the sky blue?",
        "",
    ],
)
def test_what_is_not_said_has_no_answer(text: str) -> None:
    assert truth(STREET, Question("doc_general_qa", text, "")) is None


@given(st.lists(st.sampled_from(_FRAGMENTS), max_size=6))
def test_whatever_a_model_asks_is_understood_or_not(fragments: list[str]) -> None:
    answer = truth(STREET, Question("doc_general_qa", "".join(fragments), ""))
    assert answer is None or isinstance(answer, str)


def test_a_key_that_asks_for_itself_ends() -> None:
    turning = "Key b1-b1-b1-b1 asks: What is the answer to the question that key b1-b1-b1-b1 leads to?"
    question = Question("doc_general_qa", turning.partition(": ")[2], "")
    assert truth(Cluster("", "", (Document("0", turning),)), question) is None


def test_plain_answers() -> None:
    assert [plain(text) for text in ("the city of Rome", " a hound.", "the hog", "Nora Berg", "(B)", "")] == [
        *("Rome", "dog", "pig", "Nora Berg", "B", "")
    ]


# --- documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "documents"), [("hard", (12, 24)), ("hard-small", (7, 9))])
def test_clusters_and_documents_keep_their_sizes(name: str, documents: tuple[int, int]) -> None:
    least, most = {"hard": FULL, "hard-small": SMALL}[name].tokens
    made = [WORLDS[name].cluster(0, index) for index in range(100 if name == "hard-small" else 15)]
    counts = {len(one.documents) for one in made}
    assert documents[0] <= min(counts) and max(counts) <= documents[1]
    texts = [document.text for one in made for document in one.documents]
    assert max(grammar.tokens(said) for text in texts for said in grammar.sentences(text)) <= (
        grammar.LONGEST_SENTENCE
    )
    lengths = [grammar.tokens(text) for text in texts]
    assert least <= min(lengths) and max(lengths) <= most
    assert min(lengths) < least + (most - least) / 4 and max(lengths) > most - (most - least) / 4


def test_keys_find_room_where_there_is_little() -> None:
    tight = replace(SMALL, tokens=(60, 130), chains=(3, 3), keys=(3, 3))
    for index in range(30):
        documents = cluster(f"w-0-0-{index}", "w", TRAIN, tight).documents
        assert len(Knowledge(documents).keys) == 9
        assert max(grammar.tokens(document.text) for document in documents) <= 130


def test_longer_documents_state_the_same_facts() -> None:
    once, four = (cluster("w-0-0-0", "w", TRAIN, replace(SMALL, times=times)) for times in (1, 4))
    assert Knowledge(once.documents).facts == Knowledge(four.documents).facts
    lengths = [grammar.tokens(document.text) for document in four.documents]
    assert 4 * SMALL.tokens[0] <= min(lengths) and max(lengths) <= 4 * SMALL.tokens[1]


def test_every_sentence_is_read_as_what_it_was_written_as() -> None:
    """Facts as their one relation, everything else as nothing: no distractor is a second answer."""
    slots = {"s": "Nora Berg", "i": "cup", "c": "Oslo", "d": "7", "k": "b1-c2-d3-f4", "n": "b1-c2-d3-f5"}
    relations = [*grammar.RELATIONS.values(), grammar.PRICE]
    for relation in relations:
        value = "Acorn Books" if relation.to else "12" if not relation.values else relation.values[0]
        for template in relation.facts:
            fact = read(template.format(**slots, v=value))
            assert fact and (fact.subject, fact.value) == ("Nora Berg", value)
            assert fact.relation in (relation.name, "price of cup")
        for template in relation.decoys:
            assert read(template.format(**slots, v=value)) is None
    for template in (*grammar.FILLERS, *grammar.SHOP_FILLERS, grammar.OUT_OF_DATE):
        assert read(template.format(**slots)) is None


def test_no_fact_is_stated_twice_and_distractors_abound() -> None:
    decoys = similar = outdated = facts = 0
    for index in range(40):
        documents = small(index).documents
        stated = [
            fact
            for document in documents
            if not document.text.startswith(grammar.OUT_OF_DATE)
            for sentence in grammar.sentences(document.text)
            if (fact := read(sentence, document.id))
        ]
        assert len({(fact.subject, fact.relation) for fact in stated}) == len(stated)
        facts += len(stated)
        decoys += sum(document.text.count("until last year") for document in documents)
        outdated += sum(document.text.startswith(grammar.OUT_OF_DATE) for document in documents)
        titles = list(dict.fromkeys(document.title for document in documents))
        names = Counter(word for title in titles for word in title.split())
        similar += any(count > 1 for count in names.values())
    assert decoys > facts / 10
    assert similar > 35
    assert 10 <= outdated <= 30


def test_what_is_outdated_differs_from_what_holds() -> None:
    for index in range(40):
        documents = small(index).documents
        holds = Knowledge(documents).facts
        for document in documents:
            if document.text.startswith(grammar.OUT_OF_DATE):
                told = [fact for one in grammar.sentences(document.text) if (fact := read(one))]
                assert told and all(holds[fact.subject, fact.relation].value != fact.value for fact in told)


def test_no_answer_contains_another_of_its_kind() -> None:
    """The rule of general questions looks for the reference within the answer."""
    forms = [(word, word) for relation in grammar.TRAITS for word in relation.values] + [
        *words.SYNONYMS.items()
    ]
    for relation in grammar.TRAITS:
        own = [(word, meant) for word, meant in forms if meant in relation.values]
        for one, meant in own:
            for other, same in own:
                assert one == other or meant == same or normalise(one) not in normalise(other), (one, other)
    firsts, seconds = (*words.NAMES, *words.SHOPS), (*words.SURNAMES, *words.TRADES)
    assert not [(a, b) for a in firsts for b in firsts if a != b and a.lower().endswith(b.lower())]
    assert not [(a, b) for a in seconds for b in seconds if a != b and a.startswith(b)]
    assert set(words.SYNONYMS.values()) <= {value for relation in grammar.TRAITS for value in relation.values}


# --- questions -----------------------------------------------------------------------------------


@given(
    index=st.integers(0, 10_000),
    task=st.sampled_from(TASKS),
    links=st.sampled_from(LINKS_ASKED),
    seed=st.integers(0, 2**32),
)
def test_every_question_has_the_one_answer_that_its_documents_give(
    index: int, task: str, links: int, seed: int
) -> None:
    made = small(index)
    derived = ask(made.documents, task, random.Random(seed), links=links)
    if derived is None:
        return
    question, needed = derived.question, derived.solution
    assert truth(made, question) == plain(question.answer)
    assert question.labels == {
        "kind": needed.kind,
        "links": str(links),
        "documents": str(needed.documents),
    }
    places = {fact.document for fact in needed.steps}
    alone = [document for document in made.documents if document.id in places]
    assert solve(Knowledge(alone), question.text) == needed, "its documents alone answer it"
    for place in places:
        rest = [document for document in made.documents if document.id != place]
        assert solve(Knowledge(rest), question.text) is None, "and none of them can be missing"


def test_a_question_can_be_asked_of_nearly_everything() -> None:
    """Few documents answer shallow questions; a whole cluster nearly always deep ones, of every task."""
    rng = random.Random(0)
    deep = 0
    for index in range(100):
        documents = small(index).documents
        current = [document for document in documents if not document.text.startswith(grammar.OUT_OF_DATE)]
        for task in TASKS:
            deep += ask(documents, task, rng, links=4) is not None
            assert ask(rng.sample(current, 3), task, rng) is not None
    assert deep > 290


@cache
def asked(task: str, count: int) -> list[tuple[Cluster, Asked]]:
    rng = random.Random(1)
    found = [(one, ask(one.documents, task, rng)) for one in map(small, range(count))]
    return [(one, derived) for one, derived in found if derived]


@pytest.mark.parametrize("task", TASKS)
def test_the_rule_grades_right_answers_wrong_where_the_reference_is_in_other_words(task: str) -> None:
    """The documents' own word, as an answer: a fifth of general questions but for keys, and none else."""
    missed: list[bool] = []
    for _, derived in asked(task, 300):
        question, solution = derived.question, derived.solution
        if task == "doc_general_qa":
            if solution.kind == "keys":
                assert question.answer == solution.value
            said = solution.value if solution.kind == "comparison" else solution.steps[-1].said
        else:
            said = question.answer
        missed.append(not rule_reward(task, SAID[task].format(v=f"({said})"), question))
        if missed[-1]:
            assert plain(question.answer) == solution.value and solution.kind != "keys"
    share = sum(missed) / len(missed)
    assert share == pytest.approx(0.2 * (5 / 6 if task == "doc_general_qa" else 0), abs=0.05)


def test_kinds_and_links_all_occur() -> None:
    kinds = {task: Counter(derived.solution.kind for _, derived in asked(task, 300)) for task in TASKS}
    assert set(kinds["doc_general_qa"]) == {"value", "comparison", "keys"}
    assert set(kinds["docmath_qa"]) == {"value", "sum"}
    assert set(kinds["doc_mc"]) == {"value", "comparison"}
    links = Counter(derived.solution.links for task in TASKS for _, derived in asked(task, 300))
    assert set(links) == set(LINKS_ASKED) and min(links.values()) > 0.15 * links.total()


def test_choices_are_four_different_things_and_the_key_stands_where_it_was_asked_for() -> None:
    rng = random.Random(0)
    for letter in "ABCD":
        for index in range(20):
            derived = ask(small(index).documents, "doc_mc", rng, key=letter)
            assert derived and derived.question.answer == letter
            assert len({plain(choice) for choice in derived.question.options.values()}) == 4


def test_the_vocabulary_is_small_and_complete() -> None:
    known = set(vocabulary())
    assert len(known) < 2_000
    texts = [document.text for index in range(60) for document in small(index).documents]
    for task in TASKS:
        for _, derived in asked(task, 300):
            texts += [derived.question.text, derived.question.answer, *derived.question.options.values()]
    assert not {token for text in texts for token in grammar.split(text)} - known


# --- halves --------------------------------------------------------------------------------------


def named(made: Cluster) -> set[str]:
    reading = Knowledge(made.documents)
    return {*reading.subjects, *reading.keys}


def test_the_halves_share_no_subject_no_key_and_so_no_question() -> None:
    train = [cluster(f"w-0-0-{index}", "w", TRAIN, SMALL) for index in range(120)]
    held = [cluster(f"w-0-1-{index}", "w", HELD_OUT, SMALL) for index in range(120)]
    for half, clusters in ((TRAIN, train), (HELD_OUT, held)):
        assert all(half_of(name) == half for one in clusters for name in named(one))
    assert not {d.text for c in train for d in c.documents} & {d.text for c in held for d in c.documents}
    mentioned = re.compile(rf"{grammar.SUBJECT}|{grammar.KEY}")
    for _, question in SMALL_WORLD.heldout(60, 3):
        names = [name.removeprefix("What ") for name in mentioned.findall(question.text)]
        assert names and all(half_of(name) == HELD_OUT for name in names)


def test_held_out_questions_are_balanced_true_and_graded_by_the_rule() -> None:
    pairs = SMALL_WORLD.heldout(72, seed=7)
    assert Counter((q.task, q.labels["links"], q.labels["length"]) for _, q in pairs) == dict.fromkeys(
        ((task, str(links), f"{times}x") for task in TASKS for links in LINKS_ASKED for times in LENGTHS), 2
    )
    for made, question in [*pairs, *WORLDS["hard"].heldout(6, seed=7)]:
        answer = truth(made, question)
        assert answer is not None and answer == plain(question.answer)
        assert rule_reward(question.task, SAID[question.task].format(v=f"({question.answer})"), question)
    assert len({made.id for made, _ in pairs}) == 72
    assert pairs[:10] == SMALL_WORLD.heldout(10, seed=7)
    for place in range(0, 72, len(LENGTHS)):
        assert len({question.text for _, question in pairs[place : place + len(LENGTHS)]}) == 1
    lengths = [sum(grammar.tokens(document.text) for document in made.documents) for made, _ in pairs]
    assert sum(lengths[2::3]) == pytest.approx(4 * sum(lengths[0::3]), rel=0.15)


# --- as a source ---------------------------------------------------------------------------------


def test_another_process_makes_the_same() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'megatron', 'transformers'): sys.modules[name] = None\n"
        "from spell_megatron.corpus.worlds import WORLDS\n"
        "world = WORLDS['hard-small']\n"
        "sys.stdout.write(repr((world.cluster(3, 5), world.heldout(12, 1))))\n"
    )
    root = ROOT
    made = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert made.stdout == repr((SMALL_WORLD.cluster(3, 5), SMALL_WORLD.heldout(12, 1)))


def test_a_cluster_is_found_again_by_its_id() -> None:
    for name, world in WORLDS.items():
        made = world.cluster(4, 2)
        assert made.id.startswith(name)
        assert recalled(made.id) == (world, made)
    with pytest.raises(SpellError, match="no cluster of a generated world"):
        recalled("reports/2024-3-0-1")


class Drawn:
    """A sampler of given clusters."""

    def __init__(self, *pairs: tuple[Cluster, str]) -> None:
        self._pairs = pairs

    def draw(self, n: int) -> list[tuple[Cluster, str]]:
        return list(self._pairs[:n])

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, state: dict[str, object]) -> None:
        pass


@pytest.mark.parametrize("name", WORLDS)
def test_static_questions_are_true_and_come_again(name: str) -> None:
    world = WORLDS[name]
    pairs = [(replace(world.cluster(0, index), domain="mine"), TASKS[index % 3]) for index in range(12)]
    drawn = StaticQuestions(Drawn(*pairs)).draw(12)
    assert drawn == StaticQuestions(Drawn(*pairs)).draw(12)
    for made, question in drawn:
        assert world.truth(made, question) == world.plain(question.answer)


def test_static_questions_refuse_what_no_world_made() -> None:
    with pytest.raises(SpellError, match=r"generated worlds alone \(toy, hard, hard-small\)"):
        StaticQuestions(Drawn((STREET, TASKS[0]))).draw(1)
