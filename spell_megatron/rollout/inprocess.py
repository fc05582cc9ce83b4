"""vLLM inside this process, with continuous batching under asyncio.

vLLM's asynchronous engine always runs its core in another process. Its synchronous one can run here, but
knows only "add" and "step". `InProcessEngine` puts a pump between: `generate` adds requests and awaits
them, the pump steps while any is unfinished and lets other tasks run between two steps, so that a request
joins the batch while others are half way. Nothing depends on a clock or a thread: the same order of calls
gives the same batches, and so the same tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed

from spell_megatron.config import RolloutConfig as Settings
from spell_megatron.rollout import backend, dialect
from spell_megatron.rollout.cpu_start import look_at_models_here
from spell_megatron.rollout.engine import (
    EngineError,
    EngineStats,
    Memory,
    check_version,
    room_for,
    versions_of,
)
from spell_megatron.rollout.experts import PromptExperts
from spell_megatron.rollout.transfer.manifest import Manifest, buckets
from spell_megatron.types import Experts, Rollout, Tokens
from tokenizer.ends import end_tokens

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.engine.llm_engine import LLMEngine

_BUCKET_BYTES = 256 << 20


@dataclass(slots=True)
class _Request:
    """A completion on its way."""

    prompt: Tokens
    done: asyncio.Future[Rollout]
    prompt_experts: Experts | None = None
    """Where they are known already."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class InProcessEngine:
    """An `Engine` in this process: one replica, on the CPU or this process's GPU.

    `model` is a Hugging Face folder, `scratch` a folder for vLLM's caches, `stop` the token ids that end a
    completion (the model's own where not given), `version` the number of the weights in the folder; with
    `tells_experts` rollouts come with the experts that made them.

    Create it after the trainer's process group, if there is to be one: vLLM opens a group of its own in a
    process that has none.
    """

    def __init__(
        self,
        model: Path | str,
        settings: Settings,
        *,
        scratch: Path,
        stop: Sequence[int] | None = None,
        seed: int = 0,
        version: int = 0,
        sleeps: bool = False,
        tells_experts: bool = False,
    ) -> None:
        self._folder = Path(model)
        self._manifest = Manifest.of(self._folder)
        self._stop = list(stop if stop is not None else end_tokens(self._folder))
        self._window = settings.max_model_len
        self._continues = settings.servers.in_flight == "continue"
        self._scratch = scratch
        self._sleeps = sleeps and backend.current().sleeps
        self._version = version
        self._experts = PromptExperts() if tells_experts else None
        self._requests: dict[str, _Request] = {}
        self._ids = itertools.count()
        self._pump_task: asyncio.Task[None] | None = None
        self._fault = ""
        self._asleep: set[Memory] = set()
        self._counted = EngineStats()
        self._owns_process_group = not torch.distributed.is_initialized()
        self._llm = self._start(settings, seed)

    def _start(self, settings: Settings, seed: int) -> LLMEngine:
        backend.prepare(self._scratch)
        with backend.undisturbed(self._scratch):
            from vllm.config import WeightTransferConfig
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            from spell_megatron.rollout.transfer import inproc

            look_at_models_here()
            inproc.register()
            llm = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(self._folder),
                    seed=seed,
                    disable_log_stats=True,
                    weight_transfer_config=WeightTransferConfig(backend=inproc.NAME),
                    **dialect.engine_arguments(
                        settings,
                        backend.current(),
                        sleeps=self._sleeps,
                        tells_experts=self._experts is not None,
                    ),
                )
            )
            llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        llm.set_weight_version(str(self._version))
        return llm

    @property
    def version(self) -> int:
        return self._version

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        if not self.healthy():
            raise EngineError(f"the engine cannot generate: {self._fault or 'it sleeps; wake it first'}")
        budget = room_for(prompt, max_tokens, self._window)
        ids = [self._submit(prompt, seed, budget, temperature, top_p) for seed in seeds]
        try:
            return await asyncio.gather(*(self._requests[id].done for id in ids))
        finally:
            self._abort([id for id in ids if id in self._requests])

    def _submit(self, prompt: Tokens, seed: int, max_tokens: int, temperature: float, top_p: float) -> str:
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        id = str(next(self._ids))
        known = self._experts.of(prompt) if self._experts else None
        self._llm.add_request(
            id,
            tokens_input(list(prompt)),
            SamplingParams(
                output_kind=RequestOutputKind.DELTA,
                **dialect.sampling_parameters(
                    seed=seed,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    stop=self._stop,
                    experts_from=0 if known is None else len(prompt),
                ),
            ),
        )
        self._requests[id] = _Request(prompt, asyncio.get_running_loop().create_future(), known)
        self._count(prompt_tokens=len(prompt))
        if self._pump_task is None or self._pump_task.done():
            self._pump_task = asyncio.create_task(self._pump())
        return id

    async def _pump(self) -> None:
        """Step while there is work. One pump runs at a time, in the loop of those who wait."""
        while self._requests:
            try:
                with torch.random.fork_rng(devices=[]):  # on a CPU, sampling draws from the global generator
                    outputs = cast("list[RequestOutput]", self._llm.step())
                for output in outputs:
                    self._absorb(output)
            except Exception as error:
                self._fail(f"vLLM failed while it generated: {type(error).__name__}: {error}", error)
                return
            await asyncio.sleep(0)

    def _absorb(self, output: RequestOutput) -> None:
        """Add one step's tokens to their request; resolve it when it is finished."""
        request = self._requests.get(output.request_id)
        if request is None:  # aborted in the same step
            return
        (delta,) = output.outputs
        if not request.tokens:
            self._count(cached_tokens=output.num_cached_tokens or 0)
        request.tokens.extend(delta.token_ids)
        choices = cast("list[dict[int, Logprob]]", delta.logprobs)
        request.logprobs += [
            choice[token].logprob for token, choice in zip(delta.token_ids, choices, strict=True)
        ]
        self._count(generated_tokens=len(delta.token_ids))
        if not output.finished:
            return
        spans = ((span.version, span.start, span.end) for span in delta.weight_versions or ())
        version, updates = versions_of(spans, len(request.tokens))
        told: tuple[Experts | None, Experts | None] = (None, None)
        if self._experts:
            told = self._experts.split(
                request.prompt, request.prompt_experts, delta.routed_experts, len(request.tokens)
            )
        del self._requests[output.request_id]  # now that nothing can fail of which it would have to be told
        if not request.done.done():
            request.done.set_result(
                Rollout(
                    prompt=request.prompt,
                    tokens=tuple(request.tokens),
                    logprobs=tuple(request.logprobs),
                    finish="stop" if delta.finish_reason == "stop" else "length",
                    version=version,
                    updates=updates,
                    prompt_experts=told[0],
                    experts=told[1],
                )
            )

    def _abort(self, ids: list[str]) -> None:
        for id in ids:
            del self._requests[id]
        if ids:
            self._llm.abort_request(ids)

    def _fail(self, fault: str, cause: BaseException | None = None) -> None:
        """Serve nothing more, and tell everybody who waits."""
        self._fault = fault
        waiting = [request.done for request in self._requests.values()]
        self._requests.clear()
        for done in waiting:
            if not done.done():
                error = EngineError(fault)
                error.__cause__ = cause
                done.set_exception(error)

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        check_version(self._version, version)
        if self._requests and not self._continues:
            raise EngineError(
                f"{len(self._requests)} requests run: a completion would mix versions {self._version} and"
                f" {version}. Await or cancel them before the update, or set rollout.servers.in_flight=continue"
            )
        self._fault = f"the update to version {version} did not finish"
        rpc: Any = self._llm.collective_rpc
        rpc("start_weight_update")
        try:
            for bucket in buckets(self._manifest.checked(weights), _BUCKET_BYTES):
                rpc("update_weights", kwargs={"update_info": {"weights": bucket}})
        except BaseException:
            with contextlib.suppress(RuntimeError):  # vLLM has closed the session if the fault was its own
                rpc("finish_weight_update")
            raise
        rpc("finish_weight_update")
        # What runs gives its blocks back, too, and is computed anew by the new weights before it goes on.
        if not self._llm.reset_prefix_cache(reset_running_requests=self._continues):
            raise EngineError(f"vLLM kept its prefix cache after the update to version {version}")
        self._llm.set_weight_version(str(version))
        if self._experts:
            self._experts.forget()
        self._version, self._fault = version, ""

    def stats(self) -> EngineStats:
        core = cast("InprocClient", self._llm.engine_core).engine_core
        running, waiting = core.scheduler.get_request_counts()
        return dataclasses.replace(self._counted, running=running, waiting=waiting)

    def _count(self, prompt_tokens: int = 0, cached_tokens: int = 0, generated_tokens: int = 0) -> None:
        self._counted = EngineStats(
            self._counted.prompt_tokens + prompt_tokens,
            self._counted.cached_tokens + cached_tokens,
            self._counted.generated_tokens + generated_tokens,
        )

    def sleep(self, keep: bool = True) -> None:
        if self._sleeps:
            keep = keep or self._manifest.mixture
            self._llm.sleep(level=dialect.KEEPS if keep else dialect.DISCARDS)
            self._asleep = {"weights", "cache"}
            if not keep:
                self._fault = "its weights were given up for an update that has not come"

    def wake(self, memory: Memory) -> None:
        if memory in self._asleep:
            self._llm.wake_up(tags=[dialect.SLEEP_TAGS[memory]])
            self._asleep.remove(memory)

    def healthy(self) -> bool:
        return not self._fault and not self._asleep

    def close(self) -> None:
        if self._fault == "it is closed":
            return
        self._fail("it is closed")
        with contextlib.nullcontext() if self._owns_process_group else backend.process_group_kept():
            self._llm.engine_core.shutdown()
        del self._llm
        gc.collect()
