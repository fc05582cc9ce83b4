"""Reading comprehension: a text, a question, a short answer. The common part of five benchmarks.

The rule is cover exact match with the first gold answer; a judge is asked where the rule fails.
"""

from __future__ import annotations

from collections import Counter

from eval import extract
from eval.benchmark import Ask, Benchmark, Grade, Item, Mode, Verdict, fill
from eval.judge import equivalence
from eval.squad import cover_exact_match, exact_match, f1, normalise
from spell_megatron.selfplay.grading import extract_answer

PROMPT = """Please read the following text and answer the question below.

<text>
{context}
</text>

{question}

Format your response as follows: "{sentence} (insert answer here)"."""
SHOWN = 1000
"""Characters from the end of an answer that a judge sees where no answer sentence was found."""
NONE = dict.fromkeys(("exact_match", "f1", "f1_any"), 0.0)
"""What an answer comes to that is none: left out, it would raise the mean of the others."""


def prompt(context: str, question: str, sentence: str = "The correct answer is") -> str:
    """One user message: the text between its tags, the question, the sentence asked for."""
    return fill(PROMPT, context=context.strip(), question=question.strip(), sentence=sentence)


class Reading(Benchmark):
    long = True
    judged = True
    task = "doc_general_qa"
    """Whose verifier prompt the judge is given."""

    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        if answer is None:
            return Grade(0.0, None, metrics=NONE)
        prediction = extract_answer(self.task, answer) if mode == "strict" else extract.phrase(answer)
        # The official scorer compares the string "None" where it found no answer.
        compared = prediction if prediction is not None or mode == "strict" else "None"
        if compared is None:
            return Grade(0.0, None, answer.strip()[-SHOWN:], NONE)
        gold = item.references[0]
        correct = (
            covers_words(compared, item.references) if mode == "strict" else cover_exact_match(compared, gold)
        )
        metrics = {
            "exact_match": float(bool(normalise(gold)) and exact_match(compared, gold)),
            "f1": f1(compared, gold),
            "f1_any": max(longbench_f1(compared, reference) for reference in item.references),
        }
        return Grade(float(correct), prediction, prediction or answer.strip()[-SHOWN:], metrics)

    async def judge(self, item: Item, grade: Grade, ask: Ask, mode: Mode) -> Verdict:
        return await equivalence(self.task, item, grade, ask, mode)


def covers_words(prediction: str, references: tuple[str, ...]) -> bool:
    """Any normalised reference stands in the normalised prediction as whole words."""
    padded = f" {normalise(prediction)} "
    return any((wanted := normalise(reference)) and f" {wanted} " in padded for reference in references)


def longbench_f1(prediction: str, reference: str) -> float:
    """LongBench's own F1 over words, without SQuAD's guard for yes and no."""
    words, wanted = normalise(prediction).split(), normalise(reference).split()
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted)) if common else 0.0
