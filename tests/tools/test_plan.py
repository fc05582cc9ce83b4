"""The planner's arithmetic: against published sizes, counted operations, and its own promises."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import KINDS, Kind, make_model

from spell_megatron.config import (
    RECIPES,
    LayoutConfig,
    OptimizerConfig,
    PolicyConfig,
    load_config,
    model_recipes,
)
from spell_megatron.rollout.transfer.manifest import Manifest
from spell_megatron.tools.plan import ranking, search
from spell_megatron.tools.plan.activations import FullStream, activations
from spell_megatron.tools.plan.assumptions import GIB, Assumptions
from spell_megatron.tools.plan.catalogue import architecture, known
from spell_megatron.tools.plan.changes import changed, resized
from spell_megatron.tools.plan.estimate import estimate
from spell_megatron.tools.plan.findings import ROOM, Plan
from spell_megatron.tools.plan.parameters import active_parameters, stage_parameters, total_parameters
from spell_megatron.tools.plan.rehearsal import _check_covered
from spell_megatron.tools.plan.resync import resync, tensor_count
from spell_megatron.tools.plan.search import remedies
from spell_megatron.tools.plan.workload import batch_work, forward_work
from spell_megatron.types import SpellError
from spell_megatron.weights.families import FAMILIES
from spell_megatron.weights.shape import ModelShape, model_shape

pytestmark = pytest.mark.unit

TINY = ModelShape(
    family=FAMILIES["qwen3"], vocab=256, hidden=64, layers=4, heads=4, kv_heads=2, head_dim=32, ffn=96,
    tied=False, norm_eps=1e-6, max_positions=4096,
)  # fmt: skip
PUBLISHED = {  # parameters, as the hub's pages count them in the models' files
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-32B-Instruct": 32_763_876_352,
    "Meta-Llama-3.1-8B-Instruct": 8_030_261_248,
    "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-4B-Thinking-2507": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "Qwen3-30B-A3B-Thinking-2507": 30_532_122_624,
}
SHIPPED = model_recipes()
ONE_NODE = {  # what the recipes' comments say of a single node
    "qwen2.5-32b-16k": "selfplay.concurrency=24",
    "qwen2.5-32b-instruct-16k": "selfplay.concurrency=24",
    "qwen3-32b-16k": "selfplay.concurrency=24",
    "qwen3-30b-a3b-16k": "selfplay.concurrency=32",
    "qwen3-30b-a3b-thinking-16k": "selfplay.concurrency=16",
    "qwen2.5-32b-instruct-100k": "selfplay.concurrency=5 policy.layout.context=1",
    "qwen2.5-32b-100k": "selfplay.concurrency=5 policy.layout.context=1",
    "qwen3-32b-100k": "selfplay.concurrency=5 policy.layout.context=1",
    "qwen3-30b-a3b-100k": "selfplay.concurrency=8",
    "qwen3-30b-a3b-thinking-100k": "selfplay.concurrency=8",
}


def planned(recipe: str, *overrides: str) -> Plan:
    return estimate(load_config(recipe, overrides), Assumptions())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resync_counts_the_tensors_of_a_real_model(kind: Kind, tmp_path: Path) -> None:
    folder = make_model(kind, tmp_path, seed=0)
    assert tensor_count(model_shape(folder)) == len(Manifest.of(folder).shapes)


def test_a_resync_on_the_trainers_gpus_moves_no_byte_over_host_or_network() -> None:
    config = load_config("qwen3-30b-a3b-100k")
    near, far = planned("qwen3-30b-a3b-100k"), planned("qwen3-30b-a3b-100k", "cluster.engine_nodes=2")
    here, there = (resync(config, plan.shape, plan.engine) for plan in (near, far))
    whole = total_parameters(near.shape) * 2
    assert here.hosted == here.broadcast == 0 and there.hosted == there.broadcast == whole
    assert here.gathered == there.gathered == whole * 7 / 8, "an eighth of the experts is there already"
    # Joined, staged, taken over: whole. Into layers and from there into place: a quarter, twice. Read and written.
    assert here.copied == 2 * (3 * whole + 2 * whole / 4)
    assert near.seconds.resync <= 4 < far.seconds.resync


def test_engines_are_as_wide_as_the_run_makes_them() -> None:
    """On nodes of their own, whose number of servers follows from their width."""
    spread = ("cluster.engine_nodes=1", "rollout.servers.tensor=4")
    asked, unasked = (planned("qwen3-4b-16k", *spread, f"rollout.servers.count={n}").engine for n in (2, 0))
    assert unasked == asked
    assert (asked.tensor, asked.engines) == (4, 2)


def test_known_models_have_their_published_sizes() -> None:
    assert set(known()) == set(PUBLISHED)
    for name, parameters in PUBLISHED.items():
        assert total_parameters(model_shape(architecture(f"hub/{name}"))) == parameters, name


def test_the_mixture_has_30_billion_parameters_of_which_3_are_active() -> None:
    shape = model_shape(architecture("Qwen/Qwen3-30B-A3B-Instruct-2507"))
    assert round(total_parameters(shape) / 1e9, 1) == 30.5
    assert active_parameters(shape) / 1e9 == pytest.approx(3.3, abs=0.06)


@pytest.mark.parametrize(
    "layout", [LayoutConfig(), LayoutConfig(tensor=2, sequence=True), LayoutConfig(pipeline=2, context=2)]
)
def test_stages_hold_the_model_once(layout: LayoutConfig) -> None:
    """Matrices are cut by TP, norms are copied; pipeline stages add up to the model."""
    parts = stage_parameters(TINY, layout)
    norms = TINY.layers * (2 * TINY.hidden + 2 * TINY.head_dim) + TINY.hidden
    matrices = sum(part.total for part in parts) - norms
    assert norms + layout.tensor * matrices == total_parameters(TINY)


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpellError, match=r"does not know the sizes of 'org/unheard-of'.*Qwen3-8B"):
        architecture("org/unheard-of")
    (tmp_path / "config.json").write_text("{}")
    assert architecture(str(tmp_path)) == tmp_path


def test_forward_operations_equal_those_counted_by_torch() -> None:
    """torch counts the matrix products of the Hugging Face model, attention over all S x S pairs."""
    import torch
    from models import build_model
    from torch.utils.flop_counter import FlopCounterMode

    length = 48
    model = build_model("qwen3", num_hidden_layers=4)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    ours = forward_work(TINY, tokens=length, pairs=length**2, head_rows=length)
    assert counter.get_total_flops() == ours.total


def test_shared_prompts_save_what_the_repeated_prompts_cost() -> None:
    group = (100, [10] * 8)
    shared, unshared = (batch_work(TINY, [group], shared=flag) for flag in (True, False))
    again = forward_work(TINY, tokens=7 * 100, pairs=7 * 100**2 / 2, head_rows=0)
    assert unshared.total - shared.total == pytest.approx(again.total)


def test_earlier_stages_keep_more_microbatches() -> None:
    """1F1B: stage s of p keeps p - s microbatches, and never more than there are."""
    policy = PolicyConfig(layout=LayoutConfig(pipeline=4), recompute="full")
    stream = FullStream(local=1000, whole=1000, rows=100)
    kept = [activations(TINY, policy, s, stream, 8, Assumptions()).microbatches for s in range(4)]
    assert kept == [4, 3, 2, 1]
    assert activations(TINY, policy, 0, stream, 2, Assumptions()).microbatches == 2


def test_full_recompute_keeps_only_the_inputs_of_layers() -> None:
    stream = FullStream(local=1000, whole=1000, rows=100)
    acts = activations(TINY, PolicyConfig(recompute="full"), 0, stream, 1, Assumptions())
    angles = 1000 * TINY.head_dim * 4
    assert acts.kept == TINY.layers * 1000 * TINY.hidden * 2 + angles


def test_layers_keep_everything_here_or_in_host_memory_or_compute_it_again() -> None:
    """What a layer keeps is a share of what all keep, and lies in its place."""
    stream, assumed = FullStream(local=1000, whole=1000, rows=100), Assumptions(pinned_rounding=1.0)

    def kept(**policy: Any) -> tuple[int, int]:
        found = activations(TINY, PolicyConfig(**policy), 0, stream, 1, assumed)
        return found.kept, found.host

    layer, angles = kept()[0] // TINY.layers, 1000 * TINY.head_dim * 4
    inputs = (kept(recompute="full")[0] - angles) // TINY.layers
    assert kept(recompute="full", recompute_layers=3) == (3 * inputs + layer + angles, 0)
    assert kept(offload_layers=1) == (4 * layer, layer)  # it leaves, or comes back, while the others are here
    assert kept(offload_layers=3) == (2 * layer, 3 * layer)


def test_offloading_costs_what_the_layers_between_do_not_hide() -> None:
    config = load_config("qwen3-30b-a3b-100k", ["policy.recompute_layers=24"])
    costs = [
        estimate(changed(config, {"policy.offload_layers": count}), Assumptions(host_rate=rate)).costs
        for count, rate in ((0, 25e9), (2, 25e9), (12, 25e9), (12, 1e15))
    ]
    copies = [cost.get("copies to the host", 0.0) for cost in costs]
    assert copies[0] == copies[1] == copies[3] == 0 < copies[2]
    assert costs[0]["experts"] < estimate(load_config("qwen3-30b-a3b-100k"), Assumptions()).costs["experts"]


@pytest.mark.parametrize("attention", ["fa2", "fa3"])
def test_flash_kernels_need_room_for_gradients_of_shared_keys(attention: Any) -> None:
    """Where attention passes more than the MLP does."""
    shape = replace(TINY, ffn=1)
    assert shape.heads > shape.kv_heads
    stream, policy = FullStream(local=1000, whole=1000, rows=100), PolicyConfig(attention=attention)
    with_it, without = (
        activations(shape, policy, 0, stream, 1, Assumptions(flash=flash)).layer for flash in (True, False)
    )
    queries, keys = 1000 * shape.heads * shape.head_dim, 1000 * shape.kv_heads * shape.head_dim
    expanded = 2 * queries * 2 if attention == "fa2" else 2 * keys * 4
    assert with_it - without == queries * 4 + 1000 * shape.heads * 8 + 2 * keys * 2 + expanded


@pytest.mark.parametrize("recipe", SHIPPED)
def test_shipped_recipes_fit_with_room_to_spare(recipe: str) -> None:
    config = load_config(recipe)
    sizes = [config.cluster.nodes, 4, 8]
    for nodes in dict.fromkeys(sizes):
        scaled = replace(
            config.selfplay, concurrency=config.selfplay.concurrency * nodes // config.cluster.nodes
        )
        found = estimate(resized(replace(config, selfplay=scaled), nodes * 8, None), Assumptions())
        assert not found.faults
        assert found.headroom >= ROOM, f"{recipe} on {nodes} nodes"


@pytest.mark.parametrize("recipe", ONE_NODE)
def test_large_models_fit_one_node_as_their_recipes_say(recipe: str) -> None:
    found = planned(recipe, "cluster.nodes=1", "policy.optimizer.cpu_offload=true", *ONE_NODE[recipe].split())
    assert found.fits
    assert found.headroom >= ROOM


def test_recipes_are_short_and_explain_their_numbers() -> None:
    for recipe in SHIPPED:
        text = (RECIPES / f"{recipe}.yaml").read_text()
        assert len(text.splitlines()) <= 24, recipe
        assert "inherit:" in text
        for line in text.splitlines():
            number = re.search(r": *\{?.*\b\d", line.split("#")[0])
            named = re.match(r"name:|inherit:|  path:", line)
            assert not number or named or "#" in line, f"{recipe}: {line.strip()} is not explained"


def test_remedies_mend_what_does_not_fit() -> None:
    """A remedy is given as overrides: with them the recipe fits."""
    broken = ["cluster.nodes=1"]
    found = planned("qwen3-30b-a3b-16k", *broken)
    assert not found.fits
    offered = remedies(found)
    assert offered
    for remedy in offered:
        overrides = re.split(r" (?=[a-z_]+\.)", remedy.rpartition(" (")[0])
        mended = planned("qwen3-30b-a3b-16k", *broken, *overrides)
        assert mended.fits, remedy
        assert mended.headroom >= ROOM


def test_faults_name_the_keys() -> None:
    short = planned("qwen3-8b-16k", "policy.stream_tokens=8192")
    assert any("policy.stream_tokens=8192" in fault for fault in short.faults)
    starved = planned("qwen3-8b-16k", "rollout.kv_cache_mib=1024")
    assert any("rollout.kv_cache_mib" in fault for fault in starved.faults)
    assert not short.fits
    assert not starved.fits


def test_search_offers_legal_layouts_that_fit_fastest_first() -> None:
    found = search(load_config("qwen3-30b-a3b-100k"), gpus=32)
    assert found
    assert all(plan.fits and plan.headroom >= ROOM and plan.world.size == 32 for plan in found)
    seconds = [round(plan.seconds.total, 1) for plan in found]
    assert seconds == sorted(seconds)
    assert len({plan.config.policy for plan in found}) == len(found)
    assert len(ranking(found).splitlines()) == 1 + len(found)


def test_gpus_of_the_command_line_replace_the_recipes() -> None:
    config = load_config("qwen3-8b-16k")
    assert resized(config, 64, None).cluster.nodes == 8
    small = resized(config, 4, 48.0).cluster
    assert (small.nodes, small.gpus_per_node, small.gpu_memory_gib) == (1, 4, 48.0)
    with pytest.raises(SpellError, match="12 GPUs do not fill nodes of 8"):
        resized(config, 12, None)


def test_json_answer_has_the_promised_fields() -> None:
    answer = planned("qwen3-30b-a3b-100k").to_dict()
    assert answer["parameters_total"] > answer["parameters_active"] > 0
    assert answer["fits"] is True
    assert answer["headroom"] == 1 - max(
        max(row["update"], row["rollout"], row["resync"]) for row in answer["per_rank"]
    ) / (79.6 * GIB)
    assert answer["flops_per_step_unshared"] > answer["flops_per_step"] == answer["flops_per_step_shared"]
    assert answer["communication_bytes"]["total"] == pytest.approx(
        sum(v for k, v in answer["communication_bytes"].items() if k != "total")
    )
    assert answer["seconds_per_step"] == pytest.approx(sum(answer["seconds"].values()))


def test_changed_replaces_dotted_keys_only() -> None:
    config = load_config("toy")
    after = changed(config, {"policy.optimizer.distributed": True, "steps": 3})
    assert after.policy.optimizer == replace(config.policy.optimizer, distributed=True)
    assert (after.steps, after.selfplay) == (3, config.selfplay)


def test_weights_left_out_or_held_twice_are_refused() -> None:
    full = {"a": (1,), "b": (1,)}
    _check_covered(Counter(a=1, b=1), full, copies=set())
    _check_covered(Counter(a=2, b=1), full, copies={"a"})
    with pytest.raises(SpellError, match=r"b \(0 times\)"):
        _check_covered(Counter(a=1), full, copies=set())
    with pytest.raises(SpellError, match=r"a \(2 times\)"):
        _check_covered(Counter(a=2, b=1), full, copies=set())


def test_offloaded_state_leaves_the_gpu() -> None:
    on, off = (
        planned("qwen3-8b-16k", f"policy.optimizer.cpu_offload={flag}").stages[0].static
        for flag in ("false", "true")
    )
    assert (off.optimizer, off.host) == (0, on.optimizer // 12 * 16)
    assert OptimizerConfig().distributed is False  # the recipes set it
