"""The toy world's held-out questions, asked, drawn and graded exactly as training measures them."""

from __future__ import annotations

from eval.benchmark import Benchmark, Grade, Item, Mode, Terms
from eval.data import Data
from spell_megatron.config import load_config
from spell_megatron.corpus.heldout import load_heldout
from spell_megatron.selfplay import prompts_of
from spell_megatron.selfplay.grading import extract_answer, rule_reward
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.seeds import seed_of
from spell_megatron.types import Cluster, Question


class Toy(Benchmark):
    name = "toy"
    title = "Toy world, held out"
    reads_cut_answers = False

    def __init__(self) -> None:
        self._config = load_config("toy")
        tokens = self._config.selfplay.sampling.responder_tokens
        self.paper = self.official = Terms(max_tokens=tokens, thinking_tokens=tokens)

    def load(self, data: Data) -> list[Item]:
        questions = load_heldout(self._config.heldout)
        prompts = prompts_of(self._config)
        return [self._item(prompts, place, *entry) for place, entry in enumerate(questions)]

    @staticmethod
    def _item(prompts: Prompts, place: int, cluster: Cluster, question: Question) -> Item:
        message = prompts.responder(question, cluster.documents)
        return Item(
            id=str(place),
            messages=({"role": "user", "content": message},),
            question=question.text,
            references=(question.answer,),
            labels={"task": question.task},
            facts={"place": place, "question": question},
        )

    def seed(self, item: Item, sample: int, base: int) -> int:
        return seed_of(self._config.heldout.seed + base, "heldout", item.facts["place"], sample)

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        question: Question = item.facts["question"]
        if answer is None:
            return Grade(0.0, None)
        return Grade(rule_reward(question.task, answer, question), extract_answer(question.task, answer))
