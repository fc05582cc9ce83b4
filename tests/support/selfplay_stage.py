"""A stage for self-play without a model: characters for tokens, and actors that follow their seeds.

The actors' answers depend on the seed and the prompt alone, as an engine's do; how long they take to
answer is truly random, so that arrival is shuffled anew in every run.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from spell_megatron.config import SamplingConfig
from spell_megatron.config import SelfPlayConfig as Settings
from spell_megatron.selfplay import Prompts
from spell_megatron.selfplay.episode import Episode, Judgement, Response
from spell_megatron.selfplay.play import SelfPlay
from spell_megatron.types import Cluster, Document, Finish, Question, Rollout, Tokens

TASKS = ("doc_general_qa", "docmath_qa", "doc_mc")
Actor = Callable[[str, str, random.Random], str]


class Characters:
    """A codec whose tokens are code points."""

    def prompt(self, message: str) -> list[int]:
        return [ord(character) for character in message]

    def decode(self, tokens: Tokens) -> str:
        return "".join(map(chr, tokens))

    def count(self, text: str) -> int:
        return len(text)


class Corpus:
    """Clusters in an endless row, each with every task; resumable to the draw."""

    def __init__(self, clusters: int = 50, documents: int = 8, tasks: Sequence[str] = TASKS) -> None:
        self.position, self.clusters, self.documents, self.tasks = 0, clusters, documents, tasks

    def draw(self, n: int) -> list[tuple[Cluster, str]]:
        drawn = []
        for _ in range(n):
            number, task = divmod(self.position, len(self.tasks))
            drawn.append((cluster(number % self.clusters, self.documents), self.tasks[task]))
            self.position += 1
        return drawn

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class FixedQuestions(Corpus):
    """The same clusters with a question ready-made, for static runs."""

    def draw(self, n: int) -> list[tuple[Cluster, Question]]:  # type: ignore[override]
        return [(c, Question("docmath_qa", f"How many in {c.id}?", "12")) for c, _ in super().draw(n)]


def cluster(number: int, documents: int = 8) -> Cluster:
    texts = (
        Document(f"c{number}d{i}", f"Fact {i} of cluster {number}.", f"Title {i}") for i in range(documents)
    )
    return Cluster(f"c{number}", "facts", tuple(texts))


class Engine:
    """Generates what `actor(role, prompt, random)` says, after a delay that nobody controls."""

    def __init__(self, actor: Actor | None = None, delay: float = 0.001) -> None:
        self.actor, self.delay, self.requests = actor or act, delay, 0
        self.running = self.most = 0

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(random.random() * self.delay)
        finally:
            self.running -= 1
        self.requests += len(seeds)
        text = "".join(map(chr, prompt))
        return [self._rollout(prompt, text, seed, max_tokens) for seed in seeds]

    def _rollout(self, prompt: Tokens, text: str, seed: int, limit: int) -> Rollout:
        tokens = [ord(c) for c in self.actor(role_of(text), text, random.Random(seed))]
        finish: Finish = "length" if len(tokens) > limit else "stop"
        return Rollout(list(prompt), tokens[:limit], [-0.5] * len(tokens[:limit]), finish, 7)


def role_of(prompt: str) -> str:
    openings = {"You set": "questioner", "Read the": "responder", "You compare": "verifier"}
    return next(role for opening, role in openings.items() if prompt.startswith(opening))


def act(role: str, prompt: str, draw: random.Random) -> str:
    """Policies that make every outcome happen."""
    return {"questioner": ask, "responder": respond, "verifier": judge}[role](prompt, draw)


def ask(prompt: str, draw: random.Random) -> str:
    chance = draw.random()
    if chance < 0.1:
        return "I cannot think of a question."
    if chance < 0.15:
        return "<think> and on and on"
    question: dict[str, Any] = {"question": f"What about number {draw.randrange(10**6)}?", "answer": "orange"}
    if key := re.search(r"under the letter ([A-D])", prompt):
        question |= {"answer": key[1], "options": {letter: f"choice {letter}" for letter in "ABCD"}}
    elif "a single number" in prompt:
        question["answer"] = 0 if chance < 0.2 else 12
    return f"Thinking.\n{json.dumps(question)}"


def respond(prompt: str, draw: random.Random) -> str:
    number = re.findall(r"number (\d+)\?", prompt)
    difficulty = int(number[-1]) % 5 / 4 if number else 0.5
    if "\nEmpty\n" in prompt:
        difficulty = 0.1
    if draw.random() < 0.05:
        return "No idea."
    right = draw.random() < difficulty
    if "the letter of the correct choice" in prompt:
        return f"The correct answer is ({draw.choice('ABCD')})."
    if "single number" in prompt:
        return f"Therefore, the answer is ({12 if right else draw.randrange(100, 900)})."
    return f"The correct answer is ({'orange' if right else draw.choice(['pear', 'plum'])})."


def judge(prompt: str, draw: random.Random) -> str:
    reference, answer = re.findall(r"Reference answer: (.*)\nStudent's answer: (.*)\n", prompt)[-1]
    chance = draw.random()
    if chance < 0.1:
        return "[[YES]] or [[NO]]"
    return "[[YES]]" if (reference == answer) == (chance < 0.8) else "[[NO]]"


def settings(**changes: Any) -> Settings:
    """A small step: 6 questions, groups of 4."""
    values: dict[str, Any] = {
        "questions": 6,
        "round_questions": 30,
        "group_size": 4,
        "documents": 3,
        "concurrency": 16,
    }
    lengths = SamplingConfig(questioner_tokens=400, responder_tokens=400, verifier_tokens=100)
    return Settings(**(values | {"sampling": lengths} | changes))


def selfplay(chosen: Settings | None = None, **changes: Any) -> SelfPlay:
    parts: dict[str, Any] = {
        "prompts": Prompts("full"),
        "codec": Characters(),
        "generator": Engine(),
        "clusters": Corpus(),
    }
    return SelfPlay(chosen or settings(), **(parts | {"seed": 1, "max_model_len": 8000} | changes))


def rollout(text: str = "text", prompt: str = "prompt") -> Rollout:
    return Rollout([ord(c) for c in prompt], [ord(c) for c in text], [-0.5] * len(text), "stop", 0)


def response(rule: float, votes: Sequence[int | None] = (), reward: float | None = None) -> Response:
    """A response as a pipeline would leave it, with the given votes."""
    from spell_megatron.selfplay import voting

    verdict = voting.majority(votes) if votes else None
    judgements = tuple(
        Judgement(rollout("verdict", "judge"), "verdict", vote, voting.vote_reward(vote, verdict))
        for vote in votes
    )
    worth = max(rule, verdict or 0.0) if reward is None else reward
    return Response(rollout("answer", "respond"), "answer", "answer", rule, judgements, verdict, worth)


def episode(
    index: int,
    outcome: str = "kept",
    task: str = "doc_general_qa",
    reward: float | None = 0.5,
    responses: Sequence[Response] = (),
) -> Episode:
    return Episode(
        *(0, 0, index, f"c{index}", "facts", task, 8),
        documents=(0, 1),
        asked=rollout(f"question {index}", f"ask {index}"),
        question=Question(task, f"Question {index}?", "12"),
        responses=tuple(responses),
        outcome=outcome,
        reward=reward,
    )
