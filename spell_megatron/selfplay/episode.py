"""An episode: everything that came of one question, from the prompt that asked for it to the last vote.

It is what is journaled, reported and trained on: the batch, the metrics and the report are functions
of episodes alone. As JSON every prompt is written once, however many rollouts share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from spell_megatron.selfplay import rewards
from spell_megatron.selfplay.memory import Remembered
from spell_megatron.types import Question, Rollout, SpellError, Tokens, version_spans


@dataclass(frozen=True, slots=True)
class Judgement:
    """One verdict on one response: a vote of 1 (YES), 0 (NO) or None (invalid), and what it earned."""

    rollout: Rollout
    text: str
    vote: int | None
    reward: float


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to the question, with the verdicts on it.

    `answer` is what was extracted from the text (None: no answer), `rule` the rule's reward,
    `verdict` the majority of the judgements (None: absent), `judged` the external judge's opinion (None: not asked, or
    it failed, and `unjudged` says why), `reward` all combined.
    """

    rollout: Rollout
    text: str
    answer: str | None
    rule: float
    judgements: tuple[Judgement, ...] = ()
    verdict: int | None = None
    reward: float = 0.0
    judged: float | None = None
    unjudged: str = ""

    @property
    def votes(self) -> list[int | None]:
        return [judgement.vote for judgement in self.judgements]


@dataclass(frozen=True, slots=True)
class Turn:
    """What another role than these wrote, and what it earned (None: nothing, neither rewarded nor penalised)."""

    role: str
    rollout: Rollout
    text: str
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Episode:
    """One question. `outcome` is one of `rewards` (`kept`, `zero_variance`, `bad_format`, `bad_ground`, `unnoted`,
    `unquoted`, `outvoted`) or `dropped:<why>`.

    `documents` are the indices in the cluster of what the questioner read, of `cluster_documents` in
    all; `asked` is its rollout (None for a static question), `reward` what it earned (None where it
    is neither rewarded nor penalised). `probe` is the response without documents, `answerability` that with the
    questioner's own among a few others. `cut_tokens` counts
    document tokens that did not fit into the prompts of questioner and responder. `begun` is the step that
    began it, where that was not `step` (leftovers that are carried over). `turns` are those of further roles.
    """

    step: int
    round: int
    index: int
    cluster: str
    domain: str
    task: str
    cluster_documents: int
    documents: tuple[int, ...] = ()
    history: tuple[Remembered, ...] = ()
    key: str | None = None
    asked: Rollout | None = None
    asked_text: str = ""
    question: Question | None = None
    probe: Response | None = None
    responses: tuple[Response, ...] = ()
    outcome: str = ""
    reward: float | None = None
    cut_tokens: int = 0
    begun: int | None = None
    answerability: Response | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def posed(self) -> Question:
        """Its question, once there is one."""
        if self.question is None:
            raise ValueError("the episode has no question yet")
        return self.question

    @property
    def kept(self) -> bool:
        return self.outcome == rewards.KEPT

    @property
    def answered(self) -> bool:
        """Whether there are responses, and all have their reward."""
        return bool(self.responses) and self.outcome != rewards.UNJUDGED

    @property
    def mean_reward(self) -> float:
        """Mean reward of the responses (the paper's r-bar); 0 where there are none."""
        return fmean(response.reward for response in self.responses) if self.responses else 0.0

    def rollouts(self) -> Iterator[tuple[str, Rollout]]:
        """Every rollout with its role; the probes are a responder's."""
        if self.asked:
            yield "questioner", self.asked
        for turn in self.turns:
            yield turn.role, turn.rollout
        for response in (*filter(None, (self.probe, self.answerability)), *self.responses):
            yield "responder", response.rollout
            for judgement in response.judgements:
                yield "verifier", judgement.rollout

    @property
    def versions(self) -> set[int]:
        """Numbers of the weights that made it; more than one if they were replaced meanwhile."""
        return {version for _, rollout in self.rollouts() for version, _, _ in version_spans(rollout)}

    def to_dict(self) -> dict[str, Any]:
        """JSON of everything; `from_dict` gives an equal episode."""
        table = _PromptTable()
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "documents": list(self.documents),
            "history": [asdict(entry) for entry in self.history],
            "question": asdict(self.question) if self.question else None,
            "asked": table.pack(self.asked) if self.asked else None,
            "probe": _pack_response(self.probe, table) if self.probe else None,
            "answerability": _pack_response(self.answerability, table) if self.answerability else None,
            "responses": [_pack_response(response, table) for response in self.responses],
            "turns": [
                {
                    "role": turn.role,
                    "rollout": table.pack(turn.rollout),
                    "text": turn.text,
                    "reward": turn.reward,
                }
                for turn in self.turns
            ],
            "prompts": table.prompts,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Episode:
        try:
            prompts = record["prompts"]
            return cls(
                **{name: record[name] for name in _PLAIN},
                documents=tuple(record["documents"]),
                history=tuple(
                    Remembered(tuple(entry["documents"]), Question(**entry["question"]))
                    for entry in record["history"]
                ),
                question=Question(**record["question"]) if record["question"] else None,
                asked=_unpack(record["asked"], prompts) if record["asked"] else None,
                probe=_unpack_probe(record, "probe", prompts),
                answerability=_unpack_probe(record, "answerability", prompts),
                responses=tuple(_unpack_response(response, prompts) for response in record["responses"]),
                turns=tuple(
                    Turn(**{**turn, "rollout": _unpack(turn["rollout"], prompts)})
                    for turn in record.get("turns", ())
                ),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise SpellError(f"this is not the record of an episode: {error!r}") from None


_PLAIN = (
    *("step", "round", "index", "cluster", "domain", "task", "cluster_documents"),
    *("key", "asked_text", "outcome", "reward", "cut_tokens", "begun"),
)
"""Fields of an episode that are JSON as they are."""


_OPINIONS = ("text", "answer", "rule", "verdict", "judged", "unjudged", "reward")
"""The same of a response."""


class _PromptTable:
    """Prompts in the order of their first use, each once."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self._places: dict[tuple[int, ...], int] = {}

    def pack(self, rollout: Rollout) -> dict[str, Any]:
        prompt = tuple(rollout.prompt)
        place = self._places.setdefault(prompt, len(self.prompts))
        if place == len(self.prompts):
            self.prompts.append(list(prompt))
        return {
            "prompt": place,
            "tokens": list(rollout.tokens),
            "logprobs": list(rollout.logprobs),
            "finish": rollout.finish,
            "version": rollout.version,
            "updates": [list(update) for update in rollout.updates],
        }


def _unpack(record: Mapping[str, Any], prompts: list[Tokens]) -> Rollout:
    updates = tuple((place, version) for place, version in record.get("updates", ()))
    return Rollout(**{**record, "prompt": prompts[record["prompt"]], "updates": updates})


def _pack_response(response: Response, table: _PromptTable) -> dict[str, Any]:
    return {
        "rollout": table.pack(response.rollout),
        **{name: getattr(response, name) for name in _OPINIONS},
        "judgements": [
            {"rollout": table.pack(j.rollout), "text": j.text, "vote": j.vote, "reward": j.reward}
            for j in response.judgements
        ],
    }


def _unpack_response(record: Mapping[str, Any], prompts: list[Tokens]) -> Response:
    judgements = tuple(
        Judgement(**{**j, "rollout": _unpack(j["rollout"], prompts)}) for j in record["judgements"]
    )
    return Response(**{**record, "rollout": _unpack(record["rollout"], prompts), "judgements": judgements})


def _unpack_probe(record: Mapping[str, Any], name: str, prompts: list[Tokens]) -> Response | None:
    probe = record.get(name)
    return _unpack_response(probe, prompts) if probe else None
