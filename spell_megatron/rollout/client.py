"""HTTP to one vLLM server: completions, and what a weight update needs.

vLLM's token-in-token-out route is used, not the completions route: it needs no tokenizer, returns token
ids, and says which weight version sampled them.
"""

from __future__ import annotations

import asyncio
import logging
import operator
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from spell_megatron.rollout import experts
from spell_megatron.rollout.address import Address, Unproven
from spell_megatron.rollout.dialect import SERVED_NAME, Route, sampling_parameters
from spell_megatron.rollout.engine import EngineError, versions_of
from spell_megatron.types import Experts, Rollout, Tokens

_log = logging.getLogger(__name__)
_CONNECT_SECONDS = 10.0
_OTHER_FILES = 1024
"""That a trainer has open besides: its own, torch's and NCCL's."""


def allow_connections(count: int) -> None:
    """Let this process have so many requests under way, each a connection: shells allow 1024 open files by default.

    A process may go up to its hard limit by itself.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    able = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (able, hard))
    if able < wanted:
        _log.warning(
            "%d requests may be under way, and this process may have %d files open: raise the hard limit"
            " (ulimit -Hn), or lower rollout.max_num_seqs",
            count,
            able,
        )


class Unavailable(EngineError):
    """The server did not answer, or not properly: another one may."""


class TurnedAway(Unavailable):
    """Somebody answers there who does not know our secret, or wants another."""


class Aborted(EngineError):
    """The server dropped the request on purpose, for new weights: ask again."""


@dataclass(frozen=True, slots=True)
class ServedRollout:
    rollout: Rollout
    cached_tokens: int
    experts: Experts | None = None
    """As the server told them, which the rollout does not have yet."""


class Client:
    """An asynchronous client of one server; belongs to the event loop that made it."""

    def __init__(self, address: Address, request_seconds: float) -> None:
        self.address = address
        self._http = address.async_client(
            trust_env=False,
            timeout=httpx.Timeout(request_seconds, connect=_CONNECT_SECONDS),
            # The server drops an idle connection after 5 s: stop using it well before.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
        )

    async def complete(
        self,
        prompt: Tokens,
        *,
        seed: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        stop: Sequence[int],
        experts_from: int | None = None,
    ) -> ServedRollout:
        """Sample one completion. Raises Unavailable, Aborted, or EngineError for a request that is wrong.

        `experts_from` is the prompt's first token whose experts are asked for, where the server tells them.
        """
        answer = await self._json(
            "POST",
            Route.GENERATE,
            json={
                "model": SERVED_NAME,
                "token_ids": list(prompt),
                "sampling_params": sampling_parameters(
                    seed=seed,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    stop=stop,
                    experts_from=experts_from,
                ),
            },
        )
        with self._sense():
            return _completion(prompt, answer)

    async def version(self, timeout: float) -> str:
        """The label of the weights it holds. The engine's core answers, so this is a sign of life, too."""
        answer = await self._json("GET", Route.WEIGHT_INFO, timeout=timeout)
        return str(answer.get("weight_version"))

    async def post(self, path: str, timeout: float, **body: Any) -> None:
        await self._json("POST", path, timeout=timeout, json=body)

    async def world_size(self, timeout: float) -> int:
        """Workers that a transfer has to reach."""
        answer = await self._json("GET", Route.WORLD_SIZE, timeout=timeout)
        with self._sense():
            return int(answer["world_size"])

    async def listens(self) -> bool:
        """Whether anything is at its port, well or not."""
        url = urlsplit(self.address.url)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, writer = await asyncio.open_connection(url.hostname, url.port)
        except ConnectionRefusedError:
            return False
        except (OSError, TimeoutError):
            return True
        writer.close()
        return True

    async def close(self) -> None:
        await self._http.aclose()

    @contextmanager
    def _sense(self) -> Iterator[None]:
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Unavailable(f"{self.address} sent an answer that makes no sense: {error!r}") from None

    async def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, **arguments)
        except Unproven as error:
            raise TurnedAway(str(error)) from None
        except (
            httpx.HTTPError,
            RuntimeError,
        ) as error:  # a client that was closed meanwhile raises the latter
            raise Unavailable(f"{self.address}{path}: {str(error) or type(error).__name__}") from None
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise TurnedAway(
                f"{self.address}{path} wants another secret: another run's server may have this port, or"
                " rollout.servers.secret_file is not that of its own"
            )
        if response.status_code == httpx.codes.BAD_REQUEST:
            raise EngineError(f"{self.address}{path} refused: {response.text[:500]}")
        if response.is_error:
            raise Unavailable(f"{self.address}{path} answered {response.status_code}: {response.text[:500]}")
        try:
            answer = response.json() if response.content else {}
        except (ValueError, RecursionError):
            raise Unavailable(f"{self.address}{path} sent something that is not JSON") from None
        return answer if isinstance(answer, dict) else {}


def _completion(prompt: Tokens, answer: dict[str, Any]) -> ServedRollout:
    (choice,) = answer["choices"]
    if choice["finish_reason"] not in ("stop", "length"):
        raise Aborted(f"the request ended with {choice['finish_reason']!r}")
    content = choice["logprobs"]["content"]
    tokens = tuple(map(operator.index, choice["token_ids"]))  # whole numbers, and nothing like them
    logprobs = tuple(float(token["logprob"]) for token in content)
    if len(tokens) != len(logprobs):
        raise ValueError(f"{len(tokens)} tokens and {len(logprobs)} log-probs")
    spans = ((span["version"], span["start"], span["end"]) for span in choice["weight_versions"])
    version, updates = versions_of(spans, len(tokens))
    details = answer.get("usage", {}).get("prompt_tokens_details") or {}
    told = choice.get("routed_experts")
    return ServedRollout(
        Rollout(prompt, tokens, logprobs, choice["finish_reason"], version, updates),
        details.get("cached_tokens") or 0,
        None if told is None else experts.decoded(told),
    )
