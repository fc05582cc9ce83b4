"""A seed model from nothing: tokenizer, untaught weights, lessons through the learner."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from transformers import GenerationConfig

from spell_megatron.base.outputs import new_folder
from spell_megatron.config import LayoutConfig, OptimizerConfig, PolicyConfig
from spell_megatron.config.explaining import nearest
from spell_megatron.corpus.demonstrations import Demonstrations
from spell_megatron.corpus.toy import HABITS
from spell_megatron.policy.learner import Learner, Update
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.tools.warmup.lessons import Lessons, message
from spell_megatron.tools.warmup.recipes import RECIPES, Recipe, Term
from spell_megatron.tools.warmup.untaught import untaught
from spell_megatron.types import SpellError, TrainBatch
from tokenizer.chat import ChatTokenizer
from tokenizer.convert import save
from tokenizer.train import train

_TOKENIZER_CLUSTERS = 400
_REPORT_EVERY = 50
_log = logging.getLogger(__name__)


def make_seed_model(
    folder: Path,
    seed: int = 0,
    world: str = "toy",
    terms: int | None = None,
    *,
    report: Callable[[str], None] = _log.info,
) -> Path:
    """Make a world's seed model in `folder`, a complete Hugging Face model with `provenance.json`; returns it.

    It leaves school after the first `terms` terms, if given. Raises SpellError where the folder is not empty and no
    earlier model of ours, no world is called so, or there are not so many terms. `report` is told how far it is, as
    text. About twenty minutes on two CPU cores for the toy world, fifty for the hard one.
    """
    if world not in RECIPES:
        raise SpellError(f"no seed model of the world {world!r}{nearest(world, RECIPES)}")
    shown, recipe = RECIPES[world]
    if terms is not None:
        if not 0 < terms <= len(recipe.terms):
            raise SpellError(f"the seed model of {world} has 1 to {len(recipe.terms)} terms, not {terms}")
        recipe = replace(recipe, terms=recipe.terms[:terms])
    with new_folder(folder, "model") as made, TemporaryDirectory() as scratch:
        model = Path(scratch) / "untaught"
        _begin(model, seed, shown, recipe)
        taught = teach(model, made, Lessons(ChatTokenizer.load(model), shown, seed), recipe, seed, report)
        provenance = {
            "command": f"spell-megatron seed-model OUT --world {world} --seed {seed}"
            + (f" --terms {terms}" if terms else ""),
            "seed": seed,
            "lessons_sha256": taught,
            "recipe": asdict(recipe),
        }
        (made / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    return folder


def teach(
    model: Path,
    out: Path,
    lessons: Lessons,
    recipe: Recipe,
    seed: int = 0,
    report: Callable[[str], None] = _log.info,
) -> str:
    """Give `model` the recipe's lessons, term by term, and write it into the folder `out`.

    Returns the SHA-256 of what was taught.
    """
    digest = hashlib.sha256()
    ranks = start_world(LayoutConfig(), seed=seed, timeout_seconds=600)
    try:
        with TemporaryDirectory() as scratch:
            for number, term in enumerate(recipe.terms, start=1):
                learner = Learner(_policy(term, recipe), model, ranks)
                _teach(learner, lessons, term, recipe, digest, report)
                last = number == len(recipe.terms)
                model = out if last else Path(scratch) / f"term-{number}"
                learner.save_hf(model)
    finally:
        stop_world()
    return digest.hexdigest()


def _policy(term: Term, recipe: Recipe) -> PolicyConfig:
    optimizer = OptimizerConfig(
        lr=term.lr,
        warmup_steps=min(100, term.steps // 4),
        decay_steps=term.decay_steps,
        min_lr=term.lr / 30,
        betas=(0.9, 0.95),
        weight_decay=0.05,
    )
    return PolicyConfig(dtype="float32", stream_tokens=2 * recipe.tokens, optimizer=optimizer)


def _begin(folder: Path, seed: int, shown: Demonstrations, recipe: Recipe) -> None:
    """Tokenizer files and untaught weights."""
    save(_train_tokenizer(seed, shown, recipe.vocabulary), recipe.positions, folder)
    codec = ChatTokenizer.load(folder)
    untaught(codec.vocab_size, codec.eos_ids[0], recipe.positions, seed, recipe.shape).save_pretrained(folder)
    GenerationConfig(eos_token_id=list(codec.eos_ids)).save_pretrained(folder)


def _teach(
    learner: Learner,
    lessons: Lessons,
    term: Term,
    recipe: Recipe,
    digest: hashlib._Hash,
    report: Callable[[str], None],
) -> None:
    """The lessons of a term; `digest` takes in their tokens and weights."""
    step = 0
    for lesson in term.lessons:
        for batch in lessons.batches(lesson, recipe.tokens):
            digest.update(_bytes(batch))
            update = learner.update(batch)
            step += 1
            if step % _REPORT_EVERY == 0:
                nats = _surprise(batch, update)
                report(f"{lesson.name}: step {step} of {term.steps}, {nats:.3f} nats a token")


def _train_tokenizer(seed: int, shown: Demonstrations, size: int) -> bytes:
    """On what the three roles read and write; every line is a text of its own."""
    prompts = Prompts("short")
    clusters = (shown.transcripts(seed, index, habits=HABITS) for index in range(_TOKENIZER_CLUSTERS))
    exchanges = (exchange for cluster in clusters for exchange in cluster)
    texts = (text for exchange in exchanges for text in (message(prompts, exchange), exchange.reply))
    return train((line for text in texts for line in text.split("\n")), shown.pieces(), size)


def _surprise(batch: TrainBatch, update: Update) -> float:
    """Mean negative log-likelihood of the tokens that count."""
    samples = [sample for group in batch.groups for sample in group.samples]
    logprobs = np.concatenate([row for group in update.scores.logprobs for row in group])
    weights = np.concatenate([np.asarray(sample.weights) for sample in samples])
    return -float(logprobs[weights >= 1].mean())


def _bytes(batch: TrainBatch) -> bytes:
    """A batch's tokens and weights, for the digest."""
    samples = [sample for group in batch.groups for sample in group.samples]
    rows = [*(group.prompt for group in batch.groups), *(sample.tokens for sample in samples)]
    weights = [weight for sample in samples for weight in sample.weights]
    tokens = [token for row in rows for token in row]
    return np.asarray(tokens, np.int32).tobytes() + np.asarray(weights, np.float32).tobytes()
