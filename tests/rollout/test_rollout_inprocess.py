"""The in-process engine against Hugging Face and float64 formulae."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from models import KINDS, Kind, make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from spell_megatron.config import RolloutConfig as Settings
from spell_megatron.config import ServersConfig
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.experts import PromptExperts
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.types import Rollout, version_spans

pytestmark = pytest.mark.engine

WINDOW = 512
SETTINGS = Settings(
    dtype="float32", max_model_len=WINDOW, max_num_seqs=32, max_batched_tokens=64, kv_cache_mib=32
)
PROMPTS = [[random.Random(i).randrange(3, 250) for _ in range(70 + 9 * i)] for i in range(3)]
Result = TypeVar("Result")


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(coroutine)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def engine(scratch: Path) -> Iterator[InProcessEngine]:
    """One engine for everything that does not depend on the kind of model; starting one is the cost."""
    engine = InProcessEngine(make_model("qwen3", scratch / "qwen3"), SETTINGS, scratch=scratch / "vllm")
    yield engine
    engine.close()


async def sample(
    engine: InProcessEngine,
    prompt: list[int],
    seeds: list[int],
    max_tokens: int = 24,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Rollout]:
    return await engine.generate(
        prompt, seeds=seeds, max_tokens=max_tokens, temperature=temperature, top_p=top_p
    )


async def sample_all(engine: InProcessEngine) -> list[Rollout]:
    groups = await asyncio.gather(*(sample(engine, prompt, [1, 2, 3, 4]) for prompt in PROMPTS))
    return [rollout for group in groups for rollout in group]


@torch.no_grad()
def reference(
    model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Log-probs of a rollout's tokens under the distribution that top-p sampling defines, in float64."""
    ids = torch.tensor([[*rollout.prompt, *rollout.tokens]])
    logits = model(ids).logits[0, len(rollout.prompt) - 1 : -1].double()
    probabilities = (logits / temperature).softmax(-1)
    ordered, order = probabilities.sort(-1, descending=True)
    kept_ordered = ordered.cumsum(-1) - ordered < top_p  # the smallest set whose mass reaches top_p
    kept = torch.zeros_like(kept_ordered).scatter(-1, order, kept_ordered)
    nucleus = (probabilities * kept) / (probabilities * kept).sum(-1, keepdim=True)
    return nucleus.log().gather(-1, torch.tensor(rollout.tokens)[:, None])[:, 0]


def worst(model: PreTrainedModel, rollouts: list[Rollout]) -> float:
    return max((reference(model, r) - torch.tensor(r.logprobs).double()).abs().max().item() for r in rollouts)


def hugging_face(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_a_hugging_face_forward_through_three_updates(kind: Kind, scratch: Path) -> None:
    folders = [make_model(kind, scratch / f"{kind}-{seed}", seed) for seed in range(4)]
    engine = InProcessEngine(folders[0], SETTINGS, scratch=scratch / "vllm")
    try:
        for version, folder in enumerate(folders):
            model = hugging_face(folder)
            if version:
                assert worst(model, run(sample_all(engine))) > 0.1, (
                    "the two models are too alike to tell apart"
                )
                engine.update_weights(checkpoint(folder).items(), version)
            rollouts = run(sample_all(engine))
            assert worst(model, rollouts) <= 1e-4
            assert {rollout.version for rollout in rollouts} == {engine.version} == {version}
    finally:
        engine.close()


def test_a_request_goes_on_under_the_new_weights_as_if_they_had_read_it_from_its_start(scratch: Path) -> None:
    old, new = (make_model("qwen3", scratch / f"continued-{seed}", seed) for seed in (5, 6))
    settings = replace(SETTINGS, servers=ServersConfig(in_flight="continue"))
    engine = InProcessEngine(old, settings, scratch=scratch / "vllm")

    async def play(update_at: int) -> list[Rollout]:
        running = [asyncio.create_task(sample(engine, PROMPTS[0], [1, 2, 3], 100)) for _ in range(2)]
        began = engine.stats().generated_tokens
        while not all(task.done() for task in running):
            if engine.stats().generated_tokens - began >= update_at and not engine.version:
                engine.update_weights(checkpoint(new).items(), 1)
            await asyncio.sleep(0)
        return [rollout for task in running for rollout in task.result()]

    try:
        alone = run(play(update_at=10**9))
        assert all(not rollout.updates and rollout.version == 0 for rollout in alone)
        rollouts = run(play(update_at=150))
        after = run(sample(engine, PROMPTS[0], [1]))
    finally:
        engine.close()
    continued = [rollout for rollout in rollouts if rollout.updates]
    assert len(continued) >= 3
    models = {0: hugging_face(old), 1: hugging_face(new)}
    for rollout, unbroken in zip(rollouts, alone, strict=True):
        given = torch.tensor(rollout.logprobs).double()
        spans = version_spans(rollout)
        assert [version for version, _, _ in spans] == ([0, 1] if rollout.updates else [0])
        for version, first, end in spans:
            gaps = {of: (reference(models[of], rollout) - given)[first:end].abs().max() for of in models}
            assert gaps[version] <= 1e-4
            assert gaps[1 - version] > 0.1, "the two models are too alike to tell apart"
        before = spans[0][2]
        assert rollout.tokens[:before] == unbroken.tokens[:before]
    assert after[0].version == 1 and worst(models[1], after) <= 1e-4, "what the old weights cached was used"


def test_the_trainer_does_not_notice_the_engine(scratch: Path) -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_num_threads(),
            torch.set_num_threads,
            os.sched_getaffinity(0),
            {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")},
        )

    folder = make_model("qwen3", scratch / "unnoticed")
    temporary = set(os.listdir("/tmp"))
    before = state()
    engine = InProcessEngine(folder, SETTINGS, scratch=scratch / "vllm")
    run(sample_all(engine))
    engine.update_weights(checkpoint(folder).items(), 1)
    engine.close()
    assert state() == before
    assert {name for name in set(os.listdir("/tmp")) - temporary if "vllm" in name} == set()
    engine.close()  # twice is once
    assert not engine.healthy()
    with pytest.raises(EngineError, match="closed"):
        run(sample(engine, PROMPTS[0], [0]))


@pytest.mark.parametrize("updated", [False, True], ids=["packed", "not packed yet"])
def test_a_half_loaded_matrix_is_not_used(scratch: Path, updated: bool) -> None:
    folder = make_model("qwen3", scratch / "half")
    good = checkpoint(folder)
    engine = InProcessEngine(folder, SETTINGS, scratch=scratch / "vllm")
    try:
        if updated:
            engine.update_weights(good.items(), 1)
        rpc: Any = engine._llm.collective_rpc  # beneath the manifest, which would have refused it
        rpc("start_weight_update")
        rpc("update_weights", kwargs={"update_info": {"weights": list(_without_one(good).items())}})
        rpc("finish_weight_update")
        with pytest.raises(EngineError, match="incomplete"):
            run(sample(engine, PROMPTS[0], [0]))
    finally:
        engine.close()


def test_requests_join_while_others_run(engine: InProcessEngine) -> None:
    async def play() -> tuple[list[Rollout], list[Rollout], int]:
        long = asyncio.create_task(sample(engine, PROMPTS[0], [1, 2], max_tokens=200))
        start = engine.stats().generated_tokens
        while engine.stats().generated_tokens < start + 20:
            await asyncio.sleep(0)
        short = asyncio.create_task(sample(engine, PROMPTS[1], [3], max_tokens=5))
        most = 0
        while not short.done():
            most = max(most, engine.stats().running)
            await asyncio.sleep(0)
        assert not long.done()
        return await long, await short, most

    (first, second), (late,), most = run(play())
    assert most == 3
    assert len(late.tokens) == 5 and late.finish == "length"
    assert max(len(first.tokens), len(second.tokens)) > 25


def test_the_same_calls_give_the_same_tokens(engine: InProcessEngine) -> None:
    first, second = run(sample_all(engine)), run(sample_all(engine))
    assert first == second
    assert len({rollout.tokens for rollout in first}) == len(first)
    alone = run(sample(engine, PROMPTS[1], [3]))
    assert alone[0].tokens == first[4 + 2].tokens  # seed 3 of the second prompt, in other company


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.95), (1.3, 0.5), (0.7, 1.0)])
def test_logprobs_are_of_the_distribution_sampled_from(
    engine: InProcessEngine, scratch: Path, temperature: float, top_p: float
) -> None:
    rollouts = run(sample(engine, PROMPTS[2], list(range(8)), 16, temperature, top_p))
    model = hugging_face(scratch / "qwen3")
    for rollout in rollouts:
        expected = reference(model, rollout, temperature, top_p)
        assert torch.allclose(torch.tensor(rollout.logprobs).double(), expected, atol=1e-4, rtol=0)


def test_greedy_decoding_follows_hugging_face(engine: InProcessEngine, scratch: Path) -> None:
    (rollout,) = run(sample(engine, PROMPTS[0], [0], 20, temperature=0.0))
    out = hugging_face(scratch / "qwen3").generate(
        torch.tensor([PROMPTS[0]]),
        max_new_tokens=20,
        do_sample=False,
        attention_mask=torch.ones(1, len(PROMPTS[0])),
    )
    assert list(rollout.tokens) == out[0, len(PROMPTS[0]) :].tolist()


def test_a_completion_ends_with_its_stop_token(engine: InProcessEngine) -> None:
    rollouts = run(sample(engine, PROMPTS[0], list(range(48)), 100))
    finishes = {rollout.finish for rollout in rollouts}
    assert finishes == {"stop", "length"}
    for rollout in rollouts:
        assert (rollout.tokens[-1] == 2) == (rollout.finish == "stop")
        assert 2 not in rollout.tokens[:-1]
        assert len(rollout.tokens) == len(rollout.logprobs)


def test_the_prompt_of_a_group_is_computed_once(engine: InProcessEngine) -> None:
    prompt = [7, *(random.Random(99).randrange(3, 250) for _ in range(320))]
    before = engine.stats()
    run(sample(engine, prompt, list(range(8)), 4))
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == 8 * 321
    assert after.cached_tokens - before.cached_tokens == 7 * 320
    assert 0 < after.generated_tokens - before.generated_tokens <= 32
    assert (after.running, after.waiting) == (0, 0)


def test_more_prompt_tokens_than_fit_in_a_step_wait_for_the_next(
    engine: InProcessEngine, scratch: Path
) -> None:
    async def play() -> list[list[Rollout]]:
        prompts = [[3 + i, *PROMPTS[i % 3]] for i in range(24)]  # some 2000 tokens, in steps of WINDOW
        return await asyncio.gather(*(sample(engine, prompt, [i], 8) for i, prompt in enumerate(prompts)))

    groups = run(play())
    assert worst(hugging_face(scratch / "qwen3"), [rollout for group in groups for rollout in group]) <= 1e-4


def test_cancelling_aborts_the_requests(engine: InProcessEngine) -> None:
    async def play() -> None:
        doomed = asyncio.create_task(sample(engine, PROMPTS[0], [1, 2, 3], max_tokens=400))
        other = asyncio.create_task(sample(engine, PROMPTS[1], [1], max_tokens=30))
        while engine.stats().running < 4:
            await asyncio.sleep(0)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        assert engine.stats().running <= 1
        assert len((await other)[0].tokens) > 0

    run(play())
    assert engine.stats().running == 0
    assert run(sample(engine, PROMPTS[1], [1], 30)) == run(sample(engine, PROMPTS[1], [1], 30))


def test_a_prompt_that_does_not_fit_is_refused_by_its_length(engine: InProcessEngine) -> None:
    with pytest.raises(EngineError, match=rf"{WINDOW} tokens.*window of {WINDOW} tokens"):
        run(sample(engine, [5] * WINDOW, [0]))
    with pytest.raises(EngineError, match="no tokens"):
        run(sample(engine, [], [0]))
    (rollout,) = run(sample(engine, [5] * (WINDOW - 3), [0], 100))
    assert len(rollout.tokens) <= 3


def _without_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in weights.items() if name != "model.layers.1.self_attn.k_proj.weight"
    }


def _misshapen(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:-1] if name == "model.norm.weight" else tensor for name, tensor in weights.items()}


def _unknown(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "model.layers.7.mlp.up_proj.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_without_one, "model.layers.1.self_attn.k_proj.weight"),
        (_misshapen, "model.norm.weight"),
        (_unknown, "layers.7"),
    ],
)
def test_a_bad_update_is_refused_and_a_good_one_recovers(
    engine: InProcessEngine, scratch: Path, spoil: Callable[..., dict[str, torch.Tensor]], named: str
) -> None:
    version = engine.version
    good = checkpoint(scratch / "qwen3")
    with pytest.raises(EngineError, match=named.replace(".", r"\.")):
        engine.update_weights(
            spoil(checkpoint(make_model("qwen3", scratch / "other", 9))).items(), version + 1
        )
    assert engine.version == version and not engine.healthy()
    with pytest.raises(EngineError, match=f"version {version + 1} did not finish"):
        run(sample(engine, PROMPTS[0], [0]))
    engine.update_weights(good.items(), version + 1)
    assert worst(hugging_face(scratch / "qwen3"), run(sample_all(engine))) <= 1e-4


def test_versions_only_grow_and_no_completion_mixes_two(engine: InProcessEngine, scratch: Path) -> None:
    weights = checkpoint(scratch / "qwen3")
    for stale in (engine.version, engine.version - 1):
        with pytest.raises(EngineError, match="only grow"):
            engine.update_weights(weights.items(), stale)

    async def play() -> None:
        running = asyncio.create_task(sample(engine, PROMPTS[0], [1], 100))
        while not engine.stats().running:
            await asyncio.sleep(0)
        with pytest.raises(EngineError, match="1 requests run"):
            engine.update_weights(weights.items(), engine.version + 1)
        assert (await running)[0].version == engine.version

    run(play())
    assert engine.healthy()


def test_experts_that_vllm_tells_come_with_the_rollouts(
    engine: InProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells them on a GPU alone; here they are put into what its steps return: of each token, its number."""
    known, asked, step = PromptExperts(), [], engine._llm.step
    monkeypatch.setattr(engine, "_experts", known)

    def telling() -> list[Any]:
        outputs = step()
        for output in outputs:
            if output.finished and told:
                request = engine._requests[output.request_id]
                asked.append(0 if request.prompt_experts is None else len(request.prompt))
                tokens = [*request.prompt, *request.tokens, *output.outputs[0].token_ids][asked[-1] : -1]
                output.outputs[0].routed_experts = np.array(tokens, dtype=np.uint8).reshape(-1, 1, 1)
        return outputs

    async def one_by_one() -> list[Rollout]:
        return [(await sample(engine, PROMPTS[0], [seed], 6))[0] for seed in range(3)]

    monkeypatch.setattr(engine._llm, "step", telling)
    told = True
    rollouts = run(one_by_one())
    assert asked == [0, len(PROMPTS[0]), len(PROMPTS[0])]
    for rollout in rollouts:
        assert rollout.prompt_experts is rollouts[0].prompt_experts and rollout.experts is not None
        assert [*rollout.prompt_experts.ravel(), *rollout.experts.ravel()] == [
            *PROMPTS[0],
            *rollout.tokens[:-1],
        ]
    told = False
    with pytest.raises(EngineError, match="told nothing"):
        run(sample(engine, PROMPTS[0], [1], 6))
    assert not engine.healthy()
