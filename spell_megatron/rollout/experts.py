"""The experts that an engine's routers chose: how vLLM is asked for them, and what becomes of its answers.

It keeps them block by block beside its KV cache, so that a cached prompt has them, too, and gives them back with the
completion. Most of them are the prompt's, which is the same for all completions of a group: it is asked for while
nobody has it, and all that share the prompt share one array.
"""

from __future__ import annotations

import base64
import io
from weakref import WeakValueDictionary

import numpy as np

from spell_megatron.config import Config
from spell_megatron.rollout import backend, dialect
from spell_megatron.rollout.engine import EngineError
from spell_megatron.types import Experts, Tokens


def check_replay(config: Config) -> None:
    """Raise EngineError where the engines that are to be started here could not tell their experts."""
    servers = config.rollout.servers
    starts_some = servers.count or not servers.urls
    if config.policy.router_replay and starts_some and backend.current() is dialect.CPU:
        raise EngineError(
            "policy.router_replay=true needs engines that tell which experts they chose. vLLM does so from its second"
            " model runner alone, which needs a GPU, and here is none: leave policy.router_replay=false, or give"
            " rollout.servers.urls of servers that can"
        )


def decoded(text: str) -> Experts:
    """The array of an HTTP answer, base64 of `.npy`. Raises ValueError where it is none."""
    array: Experts = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    return array


class PromptExperts:
    """One array a prompt, for as long as a rollout holds it. Belongs to one version of the weights."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[bytes, Experts] = WeakValueDictionary()

    def of(self, prompt: Tokens) -> Experts | None:
        return self._known.get(_key(prompt))

    def forget(self) -> None:
        self._known = WeakValueDictionary()

    def split(
        self, prompt: Tokens, known: Experts | None, told: Experts | None, tokens: int
    ) -> tuple[Experts, Experts]:
        """The experts of a prompt and of the completion of `tokens` tokens behind it, `[n, layers, top k]`.

        `told` is what the engine answered: of all tokens but the last, without the prompt where that was `known`.
        Raises EngineError where it is not.
        """
        skipped = 0 if known is None else len(prompt)
        wanted = len(prompt) + tokens - 1 - skipped
        if told is None or told.ndim != 3 or len(told) != wanted or told.dtype.kind != "u":
            what = "nothing" if told is None else f"{told.dtype} {list(told.shape)}"
            raise EngineError(
                f"policy.router_replay: an engine was to tell the experts of {wanted} tokens, and told {what}. Start"
                " its server with --enable-return-routed-experts"
            )
        if known is None:
            known = self._known.setdefault(_key(prompt), told[: len(prompt)].copy())
        return known, told[len(prompt) - skipped :].copy()


def _key(prompt: Tokens) -> bytes:
    return np.asarray(prompt, dtype=np.int64).tobytes()
