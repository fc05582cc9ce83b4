"""An OpenAI-compatible endpoint: token ids in, text out, retried within limits.

Three things can go wrong and they are told apart: the endpoint refuses a request (that sample fails,
with the endpoint's words), it does not answer in spite of retries (the sample fails), or it is gone
(the run ends; what is done is kept).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from eval.benchmark import Completion
from spell_megatron.base.secret import holds_secret
from spell_megatron.base.terminal import tidy
from spell_megatron.rollout.address import Address
from spell_megatron.types import SpellError

Read = TypeVar("Read")
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_RETRIED = {408, 409, 425, 429}
LARGEST = 16 << 20
"""Bytes of the largest answer that is read."""


class EndpointDied(SpellError):
    """Nothing answers any more. What was answered is in the journal."""

    exit_code = 3


class Refused(Exception):
    """The endpoint understood the request and declined it: asking again would not help."""


class Unanswered(Exception):
    """No usable answer within the limits."""


class _Transient(Exception):
    """Worth another try."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """`timeout` is seconds for one answer, `wait` the longest pause between two of the `tries`.

    `rate` bounds requests a second; how many run at once is the caller's matter.
    """

    timeout: float = 3600.0
    tries: int = 6
    wait: float = 30.0
    rate: float = math.inf


def fingerprint(folder: Path) -> tuple[str, ...]:
    """Names the weights of a model folder of this machine: others at the same path must not share a journal. Nothing
    where there is no such folder."""
    if not (folder / "config.json").is_file():
        return ()
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return (folder.name, hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16])


class CompletionSource(Protocol):
    """Where completions come from: an endpoint, or the live engines of a training run."""

    identity: Sequence[str]
    """Names the weights, as far as they can be known; part of every journal key."""
    max_model_len: int | None

    async def complete(
        self, prompt: Sequence[int], *, seed: int, max_tokens: int, temperature: float, top_p: float
    ) -> Completion: ...

    async def alive(self) -> bool: ...


class Endpoint:
    """`async with Endpoint(url)` finds the served model; raises EndpointDied where nothing answers.

    `model` chooses among several; `identity` names its weights where the caller knows them better.
    """

    def __init__(
        self,
        url: str | Address,
        *,
        model: str = "",
        api_key: str = "",
        limits: RequestLimits | None = None,
        identity: Sequence[str] = (),
    ) -> None:
        plain = str(url).rstrip("/").removesuffix("/v1")
        address = url if isinstance(url, Address) else Address(plain)
        self.url = address.url
        if holds_secret(self.url):
            raise SpellError(
                "an endpoint's URL goes into reports: take user and parameters out, and set SPELL_API_KEY (of a judge,"
                " SPELL_JUDGE_KEY) in the environment"
            )
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise SpellError(f"an endpoint is a URL like http://host:8000, found {url!r}")
        self.model = model
        self.root = ""
        self.max_model_len: int | None = None
        self.identity: Sequence[str] = tuple(identity)
        self.stop: Sequence[int] = ()
        """Ids that end a completion, besides the server's own."""
        self.shows_special = False
        """Ask for special tokens in the text, because the tags of thought are among them."""
        self._limits = limits or RequestLimits()
        self._turn = 0.0
        self._client = address.async_client(
            timeout=httpx.Timeout(self._limits.timeout, connect=min(30.0, self._limits.timeout)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=not address.socket and urlsplit(self.url).hostname not in _LOOPBACK,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        )

    async def __aenter__(self) -> Endpoint:
        try:
            await self._describe()
        except BaseException:
            await self._client.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def complete(
        self, prompt: Sequence[int], *, seed: int, max_tokens: int, temperature: float, top_p: float
    ) -> Completion:
        """One completion of token ids. Raises Refused or Unanswered."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt),
            "seed": seed,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            **_NEUTRAL,
        }
        if self.stop:
            body["stop_token_ids"] = list(self.stop)
        if self.shows_special:
            body["skip_special_tokens"] = False
        return await self._post("/v1/completions", body, _completion)

    async def chat(self, prompt: str, *, max_tokens: int, seed: int) -> str | None:
        """The reply to one user message, temperature 0; None where it was cut at `max_tokens`. Raises Refused or
        Unanswered."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "seed": seed,
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        if self.max_model_len is not None:  # vLLM and its kin say so; others may refuse what is not OpenAI's
            body |= _NEUTRAL
        return await self._post("/v1/chat/completions", body, _reply)

    async def alive(self) -> bool:
        """Whether the endpoint still lists its models."""
        try:
            async with asyncio.timeout(10.0):
                return (await self._exchange("GET", _MODELS))[0] < 500
        except (httpx.HTTPError, TimeoutError, Refused):
            return False

    async def _describe(self) -> None:
        try:
            async with asyncio.timeout(30.0):
                status, answer = await self._exchange("GET", _MODELS)
            if status in (401, 403):
                raise SpellError(
                    f"{self.url} refuses the key (HTTP {status}: {_message(answer)}): set SPELL_API_KEY (of a judge,"
                    " SPELL_JUDGE_KEY) in the environment"
                )
            served = {str(entry["id"]): entry for entry in _parsed(answer)["data"]}
        except (httpx.HTTPError, TimeoutError, Refused, _Transient, KeyError, TypeError) as error:
            raise EndpointDied(
                f"no OpenAI-compatible endpoint at {self.url}{_MODELS} ({type(error).__name__}: {error}):"
                " check the URL and that the server runs"
            ) from None
        if not self.model and len(served) == 1:
            self.model = next(iter(served))
        if self.model not in served:
            names = ", ".join(served) or "no model"
            raise SpellError(f"{self.url} serves {names}: name one of them, found {self.model!r}")
        entry = served[self.model]
        self.root = str(entry.get("root") or "")
        self.max_model_len = (
            entry.get("max_model_len") if isinstance(entry.get("max_model_len"), int) else None
        )
        known = fingerprint(Path(self.root)) if self.root else ()
        self.identity = self.identity or (self.model, self.root, *known)

    async def _post(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Read]) -> Read:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._limits.tries),
            wait=wait_random_exponential(multiplier=0.5, max=self._limits.wait),
            retry=retry_if_exception_type(_Transient),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    return read(await self._once(path, body))
        except _Transient as error:
            raise Unanswered(str(error)) from None
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        now = asyncio.get_running_loop().time()
        self._turn = max(now, self._turn + 1 / self._limits.rate)
        await asyncio.sleep(self._turn - now)
        try:
            async with asyncio.timeout(self._limits.timeout):  # of a whole answer, however slowly it comes
                status, answer = await self._exchange("POST", path, body)
        except (httpx.TimeoutException, TimeoutError):
            raise _Transient("timed out") from None
        except httpx.HTTPError as error:
            raise _Transient(f"connection failed ({type(error).__name__})") from None
        if status >= 500 or status in _RETRIED:
            raise _Transient(f"HTTP {status}")
        if status >= 300:  # a redirection is not followed: the key is for this host
            raise Refused(f"HTTP {status}: {_message(answer)}")
        value = _parsed(answer)
        if not isinstance(value, dict):
            raise _Transient("the answer is not a JSON object")
        return value

    async def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        """Status and answer. Raises Refused for one that is larger than any honest one."""
        answer, content = bytearray(), None if body is None else json.dumps(body)
        async with self._client.stream(method, path, content=content, headers=_JSON) as response:
            async for block in response.aiter_bytes():
                answer += block
                if len(answer) > LARGEST:
                    raise Refused(f"an answer of more than {LARGEST >> 20} MiB")
        return response.status_code, bytes(answer)


_NEUTRAL = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What a server takes from the model's generation_config.json where a request does not say it."""
_JSON = {"Content-Type": "application/json"}
_MODELS = "/v1/models"
_ENDS = {"length": "length", **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence"), "stop")}
"""How an answer ended, by the words of vLLM and OpenAI, of Together and of TGI."""


def _completion(value: dict[str, Any]) -> Completion:
    choice, usage = _choice(value), value.get("usage")
    text = choice.get("text")
    if not isinstance(text, str):
        raise _Transient("the answer holds no text")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    counted = tokens if isinstance(tokens, int) and 0 < tokens < LARGEST else 0
    return Completion(text, _finish(choice.get("finish_reason")), counted)


def _reply(value: dict[str, Any]) -> str | None:
    choice = _choice(value)
    if _finish(choice.get("finish_reason", "stop")) == "length":
        return None
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str):
        raise _Transient("the answer holds no message")
    return content


def _choice(value: dict[str, Any]) -> dict[str, Any]:
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _Transient("the answer holds no choices")
    return choices[0]


def _finish(reason: Any) -> str:
    """How an answer ended. A server that is ended sends what it has of those in flight, as aborted: they are none."""
    word = reason if isinstance(reason, str) else None
    if word not in _ENDS:
        raise _Transient(f"the answer is not whole (finish_reason {word and word[:40]!r})")
    return _ENDS[word]


def _parsed(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        raise _Transient("the answer is not JSON") from None


def _message(answer: bytes) -> str:
    try:
        value = _parsed(answer)
        error = value.get("error", value) if isinstance(value, dict) else value
        text = error.get("message") if isinstance(error, dict) else error
    except _Transient:
        text = None
    return " ".join(tidy(str(text or answer[:1000].decode("utf-8", "replace"))).split())[:200]
