"""What the report shows, in reading order: the paper's own views, each with a line on how to read it."""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.run.record.plots import (
    AMBER,
    BLUE,
    PHASES,
    PLUM,
    RED,
    TEAL,
    Draw,
    Rows,
    change,
    difficulty,
    each,
    heldout_curve,
    lines,
    one,
    roles,
    stack,
)


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    panels: tuple[Panel, ...]


def sections(rows: Rows) -> list[Section]:
    """Every view whose metrics are there."""
    made = []
    for title, figures in _VIEWS.items():
        panels = [Panel(name, caption, svg) for name, caption, draw in figures if (svg := draw(rows))]
        if panels:
            made.append(Section(title, tuple(panels)))
    return made


_LEARNT: list[tuple[str, str, Draw]] = [
    (
        "Held-out accuracy, before and after",
        "Questions that self-play never saw. Hollow: before the first step; filled: after the last.",
        change("heldout"),
    ),
    (
        "Best of several answers, before and after",
        "Share of the held-out questions that at least one of the answers to each gets right (pass@k).",
        change("heldout_best"),
    ),
    (
        "Held-out accuracy by kind of question",
        "By the labels of the held-out questions, such as the links or the documents that an answer needs.",
        change("heldout_by"),
    ),
    (
        "Held-out accuracy over the run",
        "The same measure at every step where it was taken.",
        heldout_curve,
    ),
    (
        "Reward by role",
        "Mean over the step. The responder's rises as it learns and falls as questions harden:"
        " read it beside the held-out accuracy.",
        roles("reward"),
    ),
    (
        "Responder's reward by task",
        "On the questions that it was asked, which differ from step to step.",
        each("responder/reward"),
    ),
]

_CURRICULUM: list[tuple[str, str, Draw]] = [
    (
        "Difficulty of the questions",
        "Mean reward of a question's responses; the fuller the colour, the more questions. Questions that"
        " nobody or everybody answers teach nothing: the questioner is paid for the middle.",
        difficulty,
    ),
    (
        "What became of the questions",
        "Share of each outcome. Kept questions make the batch.",
        stack(
            "outcome",
            {"kept": TEAL, "zero_variance": BLUE, "bad_ground": AMBER, "bad_format": RED},
            share=True,
        ),
    ),
    (
        "Documents read by the questioner",
        "With every remembered question the questioner reads more of the cluster.",
        one("questioner/documents"),
    ),
    (
        "Tokens read by the questioner",
        "Length of its prompt.",
        one("questioner/prompt_tokens"),
    ),
    (
        "Visits",
        "How often each pair of a cluster and a task was met so far, by domain. Below one, memory says nothing.",
        each("visits"),
    ),
    (
        "Memory hits",
        "Share of the prompts that met remembered questions of their cluster and task.",
        one("memory/hits", TEAL, percent=True),
    ),
    (
        "Memory occupancy",
        "Questions that are remembered, and the rings (one for each cluster and task) that hold them.",
        lines({"memory/questions": ("questions", BLUE), "memory/rings": ("rings", AMBER)}, zero=True),
    ),
]

_VERIFIER: list[tuple[str, str, Draw]] = [
    (
        "Agreement",
        "With the rule: the majority says what the rule says. With itself: share of votes with the majority.",
        lines(
            {"verifier/rule_agreement": ("rule", TEAL), "verifier/self_consistency": ("itself", PLUM)},
            percent=True,
        ),
    ),
    (
        "Invalid outputs",
        "Questions that are no proper JSON, responses without an answer, verdicts without a decision.",
        lines(
            {
                "questioner/format_errors": ("questioner", BLUE),
                "responder/no_answer": ("responder", AMBER),
                "verifier/invalid": ("verifier", TEAL),
            },
            percent=True,
            rare=True,
        ),
    ),
]

_HEALTH: list[tuple[str, str, Draw]] = [
    (
        "Length of the outputs",
        "Mean tokens of a rollout.",
        roles("length"),
    ),
    (
        "Outputs cut at the token limit",
        "They yield no answer.",
        roles("truncated", percent=True, rare=True),
    ),
    (
        "Entropy of the policy",
        "Mean over the response tokens, in nats.",
        one("policy/entropy", PLUM),
    ),
    (
        "Engine-learner mismatch",
        "Absolute difference of the sampled tokens' log-probabilities. On-policy it is numerical noise.",
        lines(
            {"mismatch/mean": ("mean", TEAL), "mismatch/max": ("max", RED), "mismatch/k3": ("KL (k3)", PLUM)},
            log=True,
        ),
    ),
    (
        "Importance weights",
        "Mean of the truncated probability ratio, learner over engine, and the share of tokens at the cap.",
        lines({"importance/weight": ("mean", TEAL), "importance/truncated": ("truncated", RED)}, zero=True),
    ),
    (
        "Gradient norm",
        "Before clipping.",
        one("policy/grad_norm", AMBER),
    ),
    (
        "Loss",
        "Token mean of the clipped surrogate. Near zero by construction when on-policy.",
        one("policy/loss", zero=False),
    ),
    (
        "Load of experts",
        "Tokens of a layer's busiest expert over the mean of its experts: the most uneven layer, and all layers' mean.",
        lines({"policy/expert_load_max": ("worst layer", RED), "policy/expert_load_mean": ("mean", TEAL)}),
    ),
    (
        "Time of a step",
        "Seconds of each phase.",
        stack("time", PHASES, share=False),
    ),
    (
        "Tokens of a step",
        "Generated by the engine, and trained on.",
        lines({"tokens/generated": ("generated", BLUE), "tokens/trained": ("trained", AMBER)}, zero=True),
    ),
]

_VIEWS = {
    "What it learnt": _LEARNT,
    "The curriculum": _CURRICULUM,
    "The verifier": _VERIFIER,
    "Health of the training": _HEALTH,
}
