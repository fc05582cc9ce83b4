"""The judge: any OpenAI-compatible endpoint that decides whether an answer means the gold answer.

It is asked only where the rule failed, at temperature 0, and sees the question, the extracted answer
and the gold answer (the verifier's own prompt). Two readings of its reply are kept: the official one
(YES occurs and NO does not, as substrings, so that "NOT" flips it) and the last bracketed decision.
A reply without the reading that counts, or one that was cut, is no verdict: it is asked again, and after that the
sample is unjudged.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from eval.benchmark import Ask, Grade, Item, Mode, Unjudged, Unreadable, Verdict
from eval.endpoint import Endpoint, Refused, Unanswered
from eval.journal import KeyedJournal, key_of
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.reading.thoughts import strip_thinking
from spell_megatron.types import Question

T = TypeVar("T")
MAX_TOKENS = 8192
TRIES = 5
_DECISION = re.compile(r"\[\[(YES|NO)\]\]")


def official_verdict(reply: str) -> bool:
    """The release's reading: YES occurs and NO does not, in what follows the reasoning."""
    text = strip_thinking(reply) or ""
    return "YES" in text and "NO" not in text


def bracketed_verdict(reply: str) -> bool | None:
    """The last `[[YES]]` or `[[NO]]` after the reasoning; None without one."""
    found = _DECISION.findall(strip_thinking(reply) or "")
    return found[-1] == "YES" if found else None


async def equivalence(task: str, item: Item, grade: Grade, ask: Ask, mode: Mode) -> Verdict:
    """Ask whether the extracted answer means the first gold answer, with the verifier's prompt of a task."""
    question = Question(task, item.question, item.references[0])
    parse = _bracketed if mode == "strict" else _usable
    reply = await ask(_prompts().verifier(question, grade.shown), parse)
    readings = {
        "official": float(official_verdict(reply)),
        "bracketed": float(bracketed_verdict(reply) or False),
    }
    return Verdict(readings["bracketed" if mode == "strict" else "official"], readings)


@cache
def _prompts() -> Prompts:
    return Prompts("full")


def _usable(reply: str) -> str | None:
    text = strip_thinking(reply) or ""
    return reply if "YES" in text or "NO" in text else None


def _bracketed(reply: str) -> str | None:
    return None if bracketed_verdict(reply) is None else reply


@dataclass
class JudgeModel:
    """Replies of one judge model, each asked for once: they are kept in a journal.

    The endpoint's own limits should allow a single try: the tries are counted here.
    """

    endpoint: Endpoint
    journal: KeyedJournal
    concurrency: int = 16
    longest_wait: float = 30.0

    def __post_init__(self) -> None:
        self._places = asyncio.Semaphore(self.concurrency)
        self._asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._failed: dict[str, Unjudged] = {}
        self._gone = ""

    async def ask(self, prompt: str, parse: Callable[[str], T | None]) -> T:
        """A parsed reply. Raises Unjudged where the judge is silent, Unreadable where it makes no sense."""
        key = key_of("judge", list(self.endpoint.identity), prompt)
        async with self._asking[key]:  # equal answers of one question share a verdict
            record = self.journal.get(key)
            if record is not None and (parsed := parse(record["reply"])) is not None:
                return parsed
            if key not in self._failed:
                try:
                    return await self._retried(key, prompt, parse)
                except Unjudged as reason:
                    self._failed[key] = reason
            raise self._failed[key]

    async def _retried(self, key: str, prompt: str, parse: Callable[[str], T | None]) -> T:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=0.2, max=self.longest_wait),
            retry=retry_if_exception_type((Unanswered, Unreadable)),
            reraise=True,
        )
        async with self._places:
            try:
                async for attempt in retrying:
                    with attempt:
                        return await self._once(key, prompt, parse, seed=attempt.retry_state.attempt_number)
            except Refused as refusal:
                raise Unjudged(f"the judge refused: {refusal}") from None
            except Unanswered as silence:
                if not await self.endpoint.alive():
                    self._gone = "the judge is gone"
                raise Unjudged(f"the judge is silent: {silence}") from None
        raise Unjudged("the judge was not asked")

    async def _once(self, key: str, prompt: str, parse: Callable[[str], T | None], seed: int) -> T:
        if self._gone:
            raise Unjudged(self._gone)
        reply = await self.endpoint.chat(prompt, max_tokens=MAX_TOKENS, seed=seed)
        if reply is None:
            raise Unreadable("the judge's reply was cut at its output limit")
        if (parsed := parse(reply)) is None:
            raise Unreadable("no verdict in the judge's reply")
        self.journal.append(key, {"reply": reply})
        return parsed
