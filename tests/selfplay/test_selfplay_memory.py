"""The ring of the history memory, and the curriculum that it leads."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selfplay_stage import Engine, selfplay
from selfplay_stage import settings as stage_settings

from spell_megatron.config import CorpusConfig, load_config
from spell_megatron.corpus import ClusterSampler
from spell_megatron.selfplay.curriculum import choose_documents, remembered_documents
from spell_megatron.selfplay.memory import Memory, Remembered
from spell_megatron.selfplay.seeds import random_of, seed_of
from spell_megatron.selfplay.tasks import TASKS
from spell_megatron.types import Question, SpellError

pytestmark = pytest.mark.unit


def question(text: str, answer: str = "12") -> Question:
    return Question("docmath_qa", text, answer)


def test_the_ring_forgets_the_oldest():
    memory = Memory(3)
    for number in range(5):
        assert memory.store("docmath_qa", "c", (number,), question(f"q{number}"))
    assert [entry.question.text for entry in memory.recall("docmath_qa", "c")] == ["q2", "q3", "q4"]
    assert memory.recall("doc_mc", "c") == memory.recall("docmath_qa", "d") == ()


def test_an_exact_repeat_is_not_stored():
    memory = Memory(3)
    assert memory.store("docmath_qa", "c", (1,), question("q"))
    assert not memory.store("docmath_qa", "c", (2,), question(" q", "13"))
    assert memory.store("docmath_qa", "c", (1,), question("another q"))
    assert memory.store("docmath_qa", "other", (1,), question("q"))
    assert len(memory) == 3
    assert memory.rings == 2


def test_a_memory_of_nothing_stays_empty():
    memory = Memory(0)
    assert not memory.store("docmath_qa", "c", (1,), question("q"))
    assert len(memory) == 0
    assert memory.state() == []


def test_a_damaged_state_says_so():
    with pytest.raises(SpellError, match="history memory"):
        Memory(3).restore([{"task": "docmath_qa", "cluster": "c", "questions": [{"documents": [1]}]}])


entries = st.tuples(
    st.sampled_from(["docmath_qa", "doc_mc"]),
    st.sampled_from("abc"),
    st.lists(st.integers(0, 9), max_size=5),
    st.text(max_size=3),
)


@pytest.mark.long
@settings(max_examples=200)
@given(st.integers(0, 4), st.lists(entries, max_size=40))
def test_no_ring_is_ever_too_long_and_the_state_is_all_of_it(size: int, stored: list):
    memory, again = Memory(size), Memory(size)
    for task, cluster, documents, text in stored:
        memory.store(task, cluster, documents, question(text))
        ring = memory.recall(task, cluster)
        assert len(ring) <= size
        texts = [entry.question.text.strip() for entry in ring]
        assert len(set(texts)) == len(texts)
    again.restore(json.loads(json.dumps(memory.state())))
    assert again.state() == memory.state()
    assert len(again) == len(memory)
    for task, cluster, _, _ in stored:
        assert again.recall(task, cluster) == memory.recall(task, cluster)


def remembered(*documents: int) -> Remembered:
    return Remembered(documents, question("q"))


def test_without_a_history_the_questioner_reads_fresh_documents_in_order():
    for seed in range(50):
        chosen = choose_documents(20, (), 5, random.Random(seed))
        assert len(set(chosen)) == 5
        assert list(chosen) == sorted(chosen)
    assert choose_documents(3, (), 5, random.Random(0)) == (0, 1, 2)


def test_the_context_grows_with_every_remembered_question_up_to_the_cluster():
    history: list[Remembered] = []
    sizes = []
    for number in range(5):
        chosen = choose_documents(12, history, 3, random.Random(number))
        assert {index for entry in history for index in entry.documents} <= set(chosen)
        history.append(Remembered(chosen, question(str(number))))
        sizes.append(len(chosen))
    assert sizes == [3, 6, 9, 12, 12]


@pytest.mark.parametrize(
    ("form", "kept", "sizes"),
    [
        ("release", [2, 4, 6, 8, 10], [2, 4, 6, 8, 10]),  # each entry holds all before it
        ("paper", [2, 2, 2, 2, 2], [2, 4, 6, 8, 8]),  # at most (L + 1) m = 4 x 2
    ],
)
def test_what_is_remembered_makes_the_context_grow_for_good_or_as_far_as_the_ring(
    form: Any, kept: list[int], sizes: list[int]
):
    """By hand: a cluster of 40 documents, m = 2 fresh ones, L = 3."""
    memory, contexts, entries = Memory(3), [], []
    for number in range(5):
        history = memory.recall("docmath_qa", "c")
        read = choose_documents(40, history, 2, random.Random(number))
        entry = remembered_documents(read, history, form)
        memory.store("docmath_qa", "c", entry, question(str(number)))
        contexts.append(len(read))
        entries.append(len(entry))
    assert (entries, contexts) == (kept, sizes)


@settings(max_examples=200)
@given(
    st.integers(1, 30),
    st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=3),
    st.integers(1, 8),
    st.integers(0, 99),
)
def test_the_curriculum(available: int, history: list[list[int]], fresh: int, seed: int):
    entries = [remembered(*documents) for documents in history]
    chosen = choose_documents(available, entries, fresh, random.Random(seed))
    known = {index for documents in history for index in documents if index < available}
    assert list(chosen) == sorted(set(chosen))
    assert known <= set(chosen) <= set(range(available))
    assert len(chosen) == len(known) + min(fresh, available - len(known))
    assert chosen == choose_documents(available, entries, fresh, random.Random(seed))


@pytest.mark.long
def test_a_run_of_the_papers_recipe_meets_each_pair_as_often_as_the_paper(tmp_path: Path):
    """Its keys at a 60th of its size, over 70 steps: 2 kept of 8 questions a round, 35 of 50 clusters for each task."""
    recipe, part, sources = load_config("paper-16k"), 60, []
    for source in recipe.corpus.sources:
        file = tmp_path / f"{source.domain}.jsonl"
        texts = [(n, f"Fact {i} of {source.domain} {n}.") for n in range(50) for i in range(3)]
        file.write_text("\n".join(json.dumps({"text": text, "cluster": n}) for n, text in texts))
        capped = replace(source, path=str(file), clusters=source.clusters // part)
        sources.append(replace(capped, group_by="given", deduplicate="exact"))
    chosen = replace(
        recipe.selfplay,
        questions=recipe.selfplay.questions // part,
        round_questions=recipe.selfplay.round_questions // part,
        **{"sampling": stage_settings().sampling, "group_size": 4, "judge": False},
    )
    clusters = ClusterSampler(CorpusConfig(sources=tuple(sources)), len, 0)
    room = selfplay(chosen, clusters=clusters, generator=Engine(delay=0))
    episodes = [e for step in range(70) for e in asyncio.run(room.play(step)).episodes]
    met = Counter((e.cluster, e.task) for e in episodes)
    assert len(met) == 3 * 35
    assert set(met.values()) <= {5, 6, 7, 8}, "the paper: 5 to 8 times"
    third = len(episodes) // 3
    hits = [sum(bool(e.history) for e in episodes[place:][:third]) for place in (0, third, 2 * third)]
    assert hits[0] < hits[1] < hits[2]


def test_keys_are_balanced():
    counts = Counter(TASKS["doc_mc"].key(random_of(1, "step", number)) for number in range(4000))
    assert set(counts) == set("ABCD")
    assert min(counts.values()) > 880


def test_seeds_depend_on_every_part_of_the_name_and_on_nothing_else():
    names = {(a, b, role) for a in range(20) for b in range(20) for role in ("questioner", "responder")}
    seeds = {seed_of(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(1, 23) != seed_of(12, 3)
    assert seed_of(0, 1, 2, "responder") == seed_of(0, 1, 2, "responder")
