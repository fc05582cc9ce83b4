"""The seed model's birth and lessons: what is wired, and what the batches say."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import HARD_SEED, TOY_SEED

from spell_megatron.corpus.toy import DEMONSTRATIONS
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.tools.warmup import make_seed_model
from spell_megatron.tools.warmup.lessons import ANSWER_WEIGHT, PROMPT_WEIGHT, Lesson, Lessons, message
from spell_megatron.tools.warmup.recipes import PRACTICE, RECIPES
from spell_megatron.tools.warmup.untaught import Shape, untaught
from spell_megatron.types import Group, SpellError, TrainBatch
from tokenizer.chat import ChatTokenizer

pytestmark = pytest.mark.unit

SHIPPED = TOY_SEED
LESSON = replace(PRACTICE[-1], steps=3)


@pytest.fixture(scope="module")
def codec() -> ChatTokenizer:
    return ChatTokenizer.load(SHIPPED)


def sequences(groups: tuple[Group, ...]) -> list[tuple[list[int], list[float]]]:
    """Every example as it is read: tokens, and a weight for each (None of the shared prompt's count)."""
    return [
        ([*group.prompt, *sample.tokens], [0.0] * len(group.prompt) + [*sample.weights])
        for group in groups
        for sample in group.samples
    ]


@pytest.mark.parametrize("shape", [recipe.shape for _, recipe in RECIPES.values()], ids=RECIPES)
def test_wired_heads_of_the_first_layer_look_as_far_back_as_they_should(shape: Shape) -> None:
    model = untaught(700, 3, 128, seed=0, shape=shape)
    model.set_attn_implementation("eager")
    ids = torch.randint(10, 700, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model(ids, output_attentions=True).attentions[0][0]
    places = torch.arange(10, 100)
    for head, back in enumerate(shape.back):
        hits = first[head, 10:].argmax(-1) == places - back
        assert hits.float().mean() > 0.9, f"head {head} does not look {back} back"


def test_the_same_seed_is_born_the_same_and_fits_the_vocabulary() -> None:
    one, two, other = (
        untaught(700, 3, 128, 0, Shape()),
        untaught(700, 3, 128, 0, Shape()),
        untaught(700, 3, 128, 1, Shape()),
    )
    weights = [model.model.embed_tokens.weight for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].shape[0] % 64 == 0
    assert weights[0].shape[0] >= 700


def test_batches_are_full_and_reproducible(codec: ChatTokenizer) -> None:
    batches = list(Lessons(codec, DEMONSTRATIONS, 4).batches(LESSON, 2048))
    assert len(batches) == 3
    assert batches == list(Lessons(codec, DEMONSTRATIONS, 4).batches(LESSON, 2048))
    assert batches != list(Lessons(codec, DEMONSTRATIONS, 5).batches(LESSON, 2048))
    for batch in batches:
        size = sum(len(group.prompt) + group.response_tokens for group in batch.groups)
        assert 2048 <= size < 4096


def test_every_exchange_is_there_with_its_weights(codec: ChatTokenizer) -> None:
    batch: TrainBatch = next(Lessons(codec, DEMONSTRATIONS, 4).batches(LESSON, 20_000))
    found = {tuple(tokens): weights for tokens, weights in sequences(batch.groups)}
    prompts = Prompts("short")
    for exchange in itertools.chain(
        *(DEMONSTRATIONS.transcripts(4, i, habits=LESSON.habits, mix=LESSON.mix) for i in range(5))
    ):
        prompt = codec.prompt(message(prompts, exchange))
        reply = [*codec.encode(exchange.reply), codec.eos_ids[0]]
        weights = found[(*prompt, *reply)]
        assert max(weights[: len(prompt)]) <= PROMPT_WEIGHT
        assert min(weights[len(prompt) :]) == 1.0
        answer = -2 if exchange.role == "verifier" else -3
        assert weights[answer] == ANSWER_WEIGHT


def test_documents_are_computed_once_for_all_their_exchanges(codec: ChatTokenizer) -> None:
    batch = next(Lessons(codec, DEMONSTRATIONS, 4).batches(LESSON, 4096))
    shared = sum(len(group.prompt) + group.response_tokens for group in batch.groups)
    alone = sum(len(tokens) for tokens, _ in sequences(batch.groups))
    assert shared < 0.5 * alone


@pytest.fixture(scope="module")
def codecs(codec: ChatTokenizer) -> dict[str, ChatTokenizer]:
    """The tokenizer of each world that has lessons."""
    return {"toy": codec, "hard-small": ChatTokenizer.load(HARD_SEED)}


@pytest.mark.parametrize(
    ("world", "lesson"),
    [(world, one) for world, (_, recipe) in RECIPES.items() for term in recipe.terms for one in term.lessons],
    ids=lambda part: getattr(part, "name", part),
)
def test_every_lesson_teaches_something_that_can_be_known(codecs, world: str, lesson: Lesson) -> None:
    lessons = Lessons(codecs[world], RECIPES[world][0], 4)
    batch = next(lessons.batches(replace(lesson, steps=1), 2048))
    for group in batch.groups:
        assert group.prompt
        assert any(weight >= 1 for sample in group.samples for weight in sample.weights)
        assert all(len(sample.tokens) == len(sample.weights) for sample in group.samples)


@pytest.mark.parametrize("terms", [0, 99])
def test_terms_that_there_are_not_are_named(tmp_path: Path, terms: int) -> None:
    with pytest.raises(SpellError, match=f"has 1 to {len(RECIPES['toy'][1].terms)} terms, not {terms}"):
        make_seed_model(tmp_path / "seed", terms=terms)


def test_a_world_without_lessons_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpellError, match="did you mean 'hard-small'"):
        make_seed_model(tmp_path / "seed", world="hard-smal")
