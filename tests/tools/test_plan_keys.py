"""What single keys add to a plan: ranks, bytes, seconds, faults and notes."""

from __future__ import annotations

import re

import pytest

from spell_megatron.config import load_config
from spell_megatron.policy.layout import LayoutError
from spell_megatron.tools.plan import planner, ranking
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.estimate import estimate
from spell_megatron.tools.plan.findings import Plan
from spell_megatron.tools.plan.rehearsal import Build
from spell_megatron.tools.plan.workload import expected_batch
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit

ON_A_PART = ("rollout.placement=disaggregated", "rollout.servers.count=1", "rollout.servers.tensor=2")
TP2 = "policy.layout={tensor: 2, sequence: true}"
LINKS = {
    "tensor parallelism",
    "context parallelism",
    "experts' exchange",
    "pipeline's sends",
    "gradients' reduction",
}
NO_PASS = {*LINKS, "scoring", "pipeline's bubble", "optimizer's step"}


def planned(recipe: str, *overrides: str) -> Plan:
    return estimate(load_config(recipe, overrides), Assumptions())


def computed(plan: Plan) -> float:
    """Seconds of a training pass on the GPU itself."""
    return sum(seconds for kind, seconds in plan.costs.items() if kind not in NO_PASS)


def test_engines_on_a_part_of_the_nodes_leave_the_trainer_the_rest() -> None:
    with pytest.raises(LayoutError, match="world size 6 is no multiple"):
        planned("qwen3-14b-16k", *ON_A_PART)  # TP 4
    found = planned("qwen3-14b-16k", *ON_A_PART, TP2)
    assert (found.world.size, found.world.data, found.engine.gpus) == (6, 3, 2)
    assert found.saving.whole == pytest.approx(6 * found.saving.staged)
    assert found.saving.host == pytest.approx(6 * found.saving.staged), "the engines keep nothing there"


def test_ranks_that_fill_no_nodes_exchange_over_the_network() -> None:
    found = planned("qwen3-14b-16k", *ON_A_PART, "cluster.nodes=2")
    assert found.world.size == 12
    assert found.costs["tensor parallelism"] == pytest.approx(found.traffic.tensor / (0.7 * 50e9))


def test_the_built_model_has_as_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(jobs: list[Build]) -> None:
        raise SpellError(f"{jobs[0].size} ranks")

    monkeypatch.setattr(planner, "rehearse", refuse)
    with pytest.raises(SpellError, match=r"^6 ranks$"):
        planner.plan(load_config("qwen3-14b-16k", [*ON_A_PART, TP2]))


def test_plays_beside_updates_take_the_longer_of_both() -> None:
    alone = planned("qwen3-8b-16k", "cluster.engine_nodes=1")
    stale = ("selfplay.max_staleness=1", "policy.loss.importance_cap=2")
    beside = planned("qwen3-8b-16k", "cluster.engine_nodes=1", *stale)
    rollout, update, resync = alone.seconds.rollout, alone.seconds.update, alone.seconds.resync
    assert alone.seconds.total == pytest.approx(rollout + update + resync)
    assert beside.seconds.total == pytest.approx(max(rollout, update) + resync)


def test_a_reference_model_is_held_all_the_time() -> None:
    without, with_it = planned("qwen3-8b-16k"), planned("qwen3-8b-16k", "policy.loss.kl=0.01")
    weights = 2 * without.stages[0].parameters.total
    for phase in ("update", "rollout", "resync"):
        assert getattr(with_it.stages[0], phase) == getattr(without.stages[0], phase) + weights
    assert with_it.saving.host == without.saving.host + 8 * weights, "it leaves the GPU as the policy does"


@pytest.mark.parametrize("key", ["policy.loss.kl=0.01", "policy.minibatches=4"])
def test_log_probs_cost_a_forward_pass(key: str) -> None:
    """As long as one that is computed again, but with the head, whose logits are read and written 96 + 67 bytes."""
    full, none = (planned("qwen3-8b-16k", f"policy.recompute={kind}") for kind in ("full", "none"))
    found = planned("qwen3-8b-16k", "policy.recompute=full", key)
    data, tensor = 4, 2
    logits = (
        expected_batch(found.config.selfplay, found.lengths).response_tokens
        / data
        * found.shape.vocab
        / tensor
    )
    head = logits * (2 * found.shape.hidden / 600e12 + (96 + 67) / (0.8 * 3.35e12))
    assert found.costs["scoring"] == pytest.approx(computed(full) - computed(none) + head)
    once_more = full.costs["tensor parallelism"] - none.costs["tensor parallelism"]
    assert found.costs["tensor parallelism"] == pytest.approx(full.costs["tensor parallelism"] + once_more)
    assert "scoring" not in full.costs
    assert computed(found) == pytest.approx(computed(full))


def test_two_reasons_for_log_probs_are_two_passes() -> None:
    one, two = (
        planned("qwen3-8b-16k", "policy.minibatches=2", f"policy.loss.kl={kl}").costs["scoring"]
        for kl in (0, 0.01)
    )
    assert two == pytest.approx(2 * one)


def test_every_minibatch_is_reduced_and_stepped_and_fills_the_pipeline() -> None:
    layout = "policy.layout={pipeline: 2}"
    one, four = planned("qwen3-8b-16k", layout), planned("qwen3-8b-16k", layout, "policy.minibatches=4")
    for kind in ("optimizer's step", "gradients' reduction"):
        assert four.costs[kind] == pytest.approx(4 * one.costs[kind])
    assert one.costs["pipeline's bubble"] == pytest.approx(computed(one) / one.streams)
    filled = computed(four) / (four.streams / 4) + four.costs["scoring"] / four.streams
    assert four.costs["pipeline's bubble"] == pytest.approx(filled)


def test_a_pipeline_holds_no_more_streams_than_a_minibatch_has() -> None:
    layout = "policy.layout={pipeline: 4, tensor: 2, sequence: true}"
    one = planned("qwen3-8b-16k", layout)
    many = planned("qwen3-8b-16k", layout, f"policy.minibatches={one.streams // 2}")
    assert [stage.activations.microbatches for stage in one.stages] == [4, 3, 2, 1]
    assert many.stages[0].activations.microbatches == -(-one.streams // (one.streams // 2)) < 4


def test_what_costs_and_is_not_planned_is_named() -> None:
    keys = {
        "policy.fp8": "blockwise",
        "policy.router_replay": "true",
        "policy.deterministic": "true",
        "selfplay.beyond.answerability": "4",
        "selfplay.external_judge.url": "https://host:8000",
        "selfplay.static_questions": "true",
        "record.mismatch_action": "drop",
        "rollout.eager": "true",
        "rollout.engine": "{moe_backend: triton}",
    }
    assert planned("qwen3-30b-a3b-16k").notes == ()
    for key, value in keys.items():
        [note] = planned("qwen3-30b-a3b-16k", f"{key}={value}").notes
        assert note.startswith(f"not planned: {key.removesuffix('.url')}")
    [note] = planned("qwen3-30b-a3b-16k", "heldout.every=5", "heldout.questions=9").notes
    assert "heldout.every=5" in note


def test_fp8_is_not_timed_in_silence() -> None:
    found = planned("qwen3-8b-16k", "policy.fp8=blockwise")
    assert not found.faults
    assert re.search(r"note: .*policy\.fp8=blockwise", ranking([found]))
    assert found.to_dict()["notes"] == list(found.notes)


def test_a_recipe_of_fp8_that_an_h100_does_not_have_is_at_fault() -> None:
    [fault] = planned("qwen3-8b-16k", "policy.fp8=mxfp8").faults
    assert "Blackwell" in fault
    assert "policy.fp8=blockwise" in fault


def test_questions_that_the_kv_cache_does_not_hold_wait() -> None:
    """Half the cache is as good as half the questions."""
    usual = planned("qwen3-30b-a3b-16k")
    half = planned("qwen3-30b-a3b-16k", f"rollout.kv_cache_mib={usual.engine.kv_wanted / 2**21:.0f}")
    assert half.engine.sequence < half.engine.kv_cache < half.engine.kv_wanted
    assert half.fits
    assert not half.faults
    [note] = half.notes
    assert "50% of the questions" in note
    assert "rollout.kv_cache_mib" in note
    fewer = planned("qwen3-30b-a3b-16k", "selfplay.concurrency=64")
    assert half.seconds.rollout == pytest.approx(fewer.seconds.rollout, rel=1e-3)
    assert half.seconds.rollout > usual.seconds.rollout


def test_a_kv_cache_below_one_sequence_is_a_fault() -> None:
    sequence = planned("qwen3-30b-a3b-16k").engine.sequence
    for mib, faults in ((-(-sequence >> 20), 0), ((sequence >> 20) - 1, 1)):
        found = planned("qwen3-30b-a3b-16k", f"rollout.kv_cache_mib={mib}")
        assert len(found.faults) == faults
        assert found.fits == (not faults)


def test_float32_computes_without_tensor_cores() -> None:
    """Two thirds of what NVIDIA's data sheet has, 67 TFLOP/s, at the most; attention is 4.5 forward passes where it
    is computed again, and products 4."""
    found = planned("qwen3-8b-16k", "policy.dtype=float32")
    assert found.config.policy.recompute == "full"
    rate = found.assumed.float32_rate
    assert 67e12 / 2 <= rate <= 67e12 * 2 / 3
    assert found.costs["attention"] == pytest.approx(4.5 * found.work.attention / found.world.size / rate)
    products = found.costs["dense layers"] + found.costs["head's products"]
    assert 3.9 <= products * rate * found.world.size / found.work.dense <= 4
    engine = planned("qwen3-8b-16k", "rollout.dtype=float32")
    assert engine.seconds.rollout > 1.5 * planned("qwen3-8b-16k").seconds.rollout


@pytest.mark.parametrize(
    ("expert", "tensor", "dispatcher", "copies"),
    [
        (8, 1, "alltoall", 8 * 7 / 8),
        (
            1,
            2,
            "alltoall",
            8,
        ),  # every one of a token's eight experts is here, and half of each on the other rank
        (1, 2, "deepep", 1),
        (4, 2, "alltoall", 8 * (2 - 1 / 4)),
        (4, 2, "deepep", 2 * 4 * (1 - (3 / 4) ** 8) * 7 / 8),
    ],
)
def test_tokens_go_to_every_rank_of_their_experts(
    expert: int, tensor: int, dispatcher: str, copies: float
) -> None:
    layout = f"policy.layout={{tensor: 2, sequence: true, expert: {expert}, expert_tensor: {tensor}}}"
    found = planned(
        "qwen3-30b-a3b-16k", layout, f"policy.dispatcher={dispatcher}", "policy.stream_tokens=49152"
    )
    groups = expected_batch(found.config.selfplay, found.lengths).groups
    tokens = sum(len(group.prompt) + sum(len(s.tokens) for s in group.samples) for group in groups)
    there_and_back = 2 * 2  # forward and backward
    token = found.shape.hidden * 2 * found.shape.layers * there_and_back
    assert found.traffic.expert == pytest.approx(tokens / found.world.size * token * copies)


def test_recomputed_experts_of_one_rank_are_sent_back_all_the_same() -> None:
    """Only what other expert-parallel ranks computed is not: there is none (`policy/experts.py`)."""
    layout = "policy.layout={tensor: 2, sequence: true, expert: %s, expert_tensor: %s}"
    for expert, tensor, ways in ((1, 2, (4, 6)), (8, 1, (4, 5))):
        none, full = (
            planned(
                "qwen3-30b-a3b-16k",
                layout % (expert, tensor),
                "policy.dispatcher=alltoall",
                f"policy.recompute={kind}",
            ).traffic.expert
            for kind in ("none", "full")
        )
        assert full / none == pytest.approx(ways[1] / ways[0])


def test_a_sleeping_engine_takes_pinned_host_memory() -> None:
    """Powers of two, which vLLM's copy comes to; the learner's own copies are of their own size."""
    found = planned("qwen3-8b-16k")
    [stage] = found.stages
    learner = stage.static.weights + stage.static.optimizer + found.saving.staged
    assert found.saving.host == pytest.approx(8 * (learner + 1.44 * found.engine.weights))


def test_the_head_computes_its_logits_again_but_for_the_last_chunk() -> None:
    once = planned("qwen3-8b-16k", "policy.head_chunk=1000000")
    usual, rows = planned("qwen3-8b-16k"), expected_batch(once.config.selfplay, once.lengths).response_tokens
    forward = 2 * rows * once.shape.hidden * once.shape.vocab / once.world.size / 600e12
    assert once.costs["head's products"] == pytest.approx(3 * forward)
    assert 3.8 < usual.costs["head's products"] / forward < 4


def test_attention_is_no_faster_than_charts_of_it() -> None:
    """arXiv 2407.08608: figure 5 with a causal mask, figure 6; head dimension 128, 16K tokens."""
    assumed = Assumptions()
    charts = {"fa2_forward": 335e12, "fa2_backward": 322e12, "fa3_forward": 616e12, "fa3_backward": 561e12}
    for kernel, measured in charts.items():
        assert 0.88 * measured < getattr(assumed, kernel) <= measured, kernel
