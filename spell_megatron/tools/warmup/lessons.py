"""What the seed model is taught, as batches of weighted tokens.

A transcript's tokens with weight 1 in a TrainBatch make the policy-gradient loss the negative
log-likelihood, so warm-up needs no trainer of its own. All exchanges about one cluster share their
documents, and so one Group: the documents are computed once.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spell_megatron.corpus.demonstrations import Demonstrations, Habits, Mix, Transcript
from spell_megatron.corpus.hard import Extent
from spell_megatron.corpus.toy import Scale
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.types import Document, Group, Sample, TrainBatch
from tokenizer.chat import ChatTokenizer

PROMPT_WEIGHT, ANSWER_WEIGHT = 0.05, 4.0
"""Weights of a prompt's token and of the answer's own; every other token of a reply weighs 1."""

_WORDS = 600
"""The tokens that patterns are made of: the last ones, past bytes and special tokens."""


@dataclass(frozen=True)
class Lesson:
    """A stretch of the curriculum."""

    name: str
    steps: int
    habits: Habits
    scale: Scale | Extent
    mix: Mix
    restate: bool = True
    """Also say every cluster's facts again in other words, and find the letters of `choices`."""
    verbatim: bool = False
    """With `restate`, also copy every document: a questioner has to note what is there, not what could be."""
    patterns: int = 0
    """Repeated random sequences per cluster: what grows the heads that look up."""
    choices: int = 0
    """Lists of choices per cluster."""


class Lessons:
    """Turns lessons into batches of a world's demonstrations, in an order that `seed` settles."""

    def __init__(
        self,
        codec: ChatTokenizer,
        shown: Demonstrations,
        seed: int,
        prompts: str = "short",
        answer_weight: float = ANSWER_WEIGHT,
    ) -> None:
        """`answer_weight` suits a tokenizer that makes one token of an answer, and is 1 for others."""
        self._codec, self._shown, self._seed, self._next = codec, shown, seed, 0
        self._prompts, self._answer_weight = Prompts(prompts), answer_weight
        self._fence = codec.encode("</text>")[-1]

    def batches(self, lesson: Lesson, tokens: int) -> Iterator[TrainBatch]:
        """`lesson.steps` batches of about `tokens` tokens."""
        groups: list[Group] = []
        for _ in range(lesson.steps):
            while sum(map(_size, groups)) < tokens:
                groups += self._cluster(lesson, self._next)
                self._next += 1
            batch: list[Group] = []
            while sum(map(_size, batch)) < tokens:
                batch.append(groups.pop(0))
            yield TrainBatch(tuple(batch))

    def _cluster(self, lesson: Lesson, index: int) -> list[Group]:
        """One group for each thing that exchanges about a cluster have in common."""
        shared: dict[tuple[str, int], list[tuple[list[int], Sample]]] = defaultdict(list)
        exchanges = self._shown.transcripts(
            self._seed, index, habits=lesson.habits, scale=lesson.scale, mix=lesson.mix
        )
        for exchange in exchanges:
            read = len(exchange.variables.get("documents", ()))
            shared[exchange.role, read].append(self._exchange(exchange))
        groups = [_common(pairs) for pairs in shared.values()]
        rng = random.Random(f"drills/{self._seed}/{index}")
        if lesson.restate:
            documents, facts = self._shown.restated(self._seed, index, lesson.scale)
            groups.append(self._restated(documents, facts))
            groups += [self._choices(documents, rng) for _ in range(lesson.choices)]
            if lesson.verbatim:
                groups.append(self._verbatim(documents))
        return groups + [self._pattern(rng) for _ in range(lesson.patterns)]

    def _exchange(self, exchange: Transcript) -> tuple[list[int], Sample]:
        """Prompt, and the reply with its weights: the answer counts more wherever the reply says it."""
        reply = [*self._codec.encode(exchange.reply), self._codec.eos_ids[0]]
        answer = reply[-2 if exchange.role == "verifier" else -3]
        weights = [self._answer_weight if token == answer else 1.0 for token in reply]
        return self._codec.prompt(message(self._prompts, exchange)), Sample(reply, weights)

    def _restated(self, documents: Sequence[Document], facts: Sequence[tuple[str, str]]) -> Group:
        """Facts by threes after their documents; only the values can be known, and only they count."""
        prompt = self._codec.prompt(_fenced(documents))
        said = [self._stated(facts[at : at + 3]) for at in range(0, len(facts), 3)]
        return Group(prompt[: prompt.index(self._fence) + 1], tuple(said))

    def _stated(self, facts: Sequence[tuple[str, str]]) -> Sample:
        """Some facts one after another, whose values weigh 1 each token."""
        tokens: list[int] = []
        weights: list[float] = []
        for sentence, value in facts:
            said, known = self._codec.encode(sentence), self._codec.encode(value)
            at = max(at for at in range(len(said)) if said[at : at + len(known)] == known)
            weights += [float(at <= place < at + len(known)) for place in range(len(said))]
            tokens += said
        return Sample(tokens, weights)

    def _verbatim(self, documents: Sequence[Document]) -> Group:
        """Each document once more, after all of them; its first token cannot be known."""
        prompt = self._codec.prompt(_fenced(documents))
        copies = [self._codec.encode(document.text) for document in documents]
        samples = [Sample(tokens, [0.0] + [1.0] * (len(tokens) - 1)) for tokens in copies]
        return Group(prompt[: prompt.index(self._fence) + 1], tuple(samples))

    def _choices(self, documents: Sequence[Document], rng: random.Random) -> Group:
        """Each of four choices quoted, documents before them; only its letter counts."""
        listed, quotes = self._shown.choices(rng)
        said = [self._codec.encode(quote) for quote in quotes]
        samples = [Sample(tokens, [0.0] * (len(tokens) - 2) + [ANSWER_WEIGHT, 0.0]) for tokens in said]
        return Group(self._codec.prompt(f"{_fenced(documents)} <ask> {listed}"), tuple(samples))

    def _pattern(self, rng: random.Random) -> Group:
        """A random sequence of words, twice: the second time every next word can be known."""
        words = range(self._codec.vocab_size - _WORDS, self._codec.vocab_size)
        sequence = rng.choices(words, k=rng.randint(6, 24))
        weights = [0.0] * (len(sequence) + 1) + [1.0] * (len(sequence) - 1)
        return Group(self._codec.prompt("")[:1], (Sample(sequence * 2, weights),))


def message(prompts: Prompts, exchange: Transcript) -> str:
    """The user's side of an exchange."""
    judged = exchange.role == "verifier"
    return prompts.render(exchange.role, exchange.task, judged=judged, **exchange.variables)


def _fenced(documents: Sequence[Document]) -> str:
    return " ".join(["<text>", *(document.text for document in documents), "</text>"])


def _common(pairs: Sequence[tuple[list[int], Sample]]) -> Group:
    """One group of exchanges: their common beginning is the prompt, the rest of each prompt weighs little."""
    prompts = [prompt for prompt, _ in pairs]
    shared = 0
    while shared < min(map(len, prompts)) - 1 and len({prompt[shared] for prompt in prompts}) == 1:
        shared += 1
    samples = []
    for prompt, reply in pairs:
        own = prompt[shared:]
        samples.append(Sample([*own, *reply.tokens], [PROMPT_WEIGHT] * len(own) + [*reply.weights]))
    return Group(prompts[0][:shared], tuple(samples))


def _size(group: Group) -> int:
    return len(group.prompt) + group.response_tokens
