"""An external judge as reward (the paper's Table 4): any OpenAI-compatible endpoint, asked while training goes on.

Equal answers to one question are asked about once, and so many at a time as the recipe says; a request, a reply and the
tries are bounded. A judge that fails has no opinion, which is told and counted: it is never a 0. The key comes from the
environment (SPELL_JUDGE_KEY), so that no recipe, no run folder and no log holds it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict

from eval.endpoint import Endpoint, Refused, RequestLimits, Unanswered
from eval.journal import key_of
from eval.judge import bracketed_verdict
from spell_megatron.config import Config, ExternalJudgeConfig
from spell_megatron.selfplay.ports import Opinion
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.roles import ROLES, check_prompts
from spell_megatron.selfplay.tasks import tasks_of
from spell_megatron.types import Question, SpellError

_log = logging.getLogger(__name__)

KEY = "SPELL_JUDGE_KEY"
REMEMBERED = 50_000
"""Verdicts that are kept, the most recent ones."""
LONGEST_ANSWER = 8_000
"""Characters of an answer that the judge is shown."""
LONGEST_WAIT = 30.0
"""Seconds between two tries, at most."""


class RewardJudge:
    """Satisfies `selfplay.ports.Judge`. For one event loop, in which it opens its endpoint when it is first asked."""

    def __init__(
        self, settings: ExternalJudgeConfig, api_key: str = "", prompts: Prompts | None = None
    ) -> None:
        self._settings, self._prompts = settings, prompts or Prompts("full")
        limits = RequestLimits(settings.timeout_seconds, settings.tries, LONGEST_WAIT)
        self._endpoint = Endpoint(settings.url, model=settings.model, api_key=api_key, limits=limits)
        self._places = asyncio.Semaphore(settings.concurrency)
        self._opening = asyncio.Lock()
        self._opened = False
        self._asked: OrderedDict[str, asyncio.Task[Opinion]] = OrderedDict()
        self._faults: set[str] = set()

    async def __call__(self, question: Question, answer: str) -> Opinion:
        """Raises EndpointDied where there is no such endpoint when it is first asked."""
        await self._open()
        prompt = self._prompts.verifier(question, answer[:LONGEST_ANSWER])
        key = key_of(prompt)
        if key not in self._asked:
            self._asked[key] = asyncio.create_task(self._ask(prompt))
        self._asked.move_to_end(key)
        # Other answers wait for the same verdict: an episode that is cancelled must not take it from them.
        opinion = await asyncio.shield(self._asked[key])
        if opinion.score is None:
            self._asked.pop(key, None)  # the next one asks again
        self._forget()
        return opinion

    async def _open(self) -> None:
        async with self._opening:
            if not self._opened:
                await self._endpoint.__aenter__()
                self._opened = True

    async def _ask(self, prompt: str) -> Opinion:
        fault = ""
        async with self._places:
            for seed in range(self._settings.tries):
                try:
                    reply = await self._endpoint.chat(prompt, max_tokens=self._settings.max_tokens, seed=seed)
                except (Refused, Unanswered) as error:
                    fault = str(error)
                    break
                if reply is None:
                    fault = "the reply was cut at selfplay.external_judge.max_tokens"
                elif (verdict := bracketed_verdict(reply)) is not None:
                    return Opinion(float(verdict))
                else:
                    fault = "no verdict in the reply"
        if fault not in self._faults:
            self._faults.add(fault)
            _log.warning("the external judge at %s: %s (counted in judge/failed)", self._endpoint.url, fault)
        return Opinion(None, fault)

    def _forget(self) -> None:
        """Drop the oldest verdicts beyond the bound; one that is still asked for stays."""
        while len(self._asked) > REMEMBERED and next(iter(self._asked.values())).done():
            self._asked.popitem(last=False)


def reward_judge(config: Config) -> RewardJudge | None:
    """For `train` and `resume`: None where the recipe names no judge.

    It is asked as a verifier of `full` prompts is, about a task of the user's own by the template that it brings.
    Raises SpellError where it brings none.
    """
    settings = config.selfplay.external_judge
    if not settings.url:
        return None
    tasks, model = tasks_of(config.corpus), config.model
    own = {name: text for task in tasks for name, text in task.templates.items()}
    prompts = Prompts("full", language=model.language, form=model.answer_form, more=own)
    try:
        for task in tasks:
            check_prompts(prompts, task.name, (ROLES["verifier"],))
    except SpellError as error:
        raise SpellError(
            f"selfplay.external_judge: {error}; a task of your own brings it in `templates`"
        ) from None
    return RewardJudge(settings, os.environ.get(KEY, ""), prompts)
