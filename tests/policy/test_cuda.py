"""The learner on a CUDA device that is not there: where its host waits, where and in which precision it works.

Tensors have shapes and no values (torch's FakeTensor), and a small library, compiled here, is the device that autograd
asks for. Layers are plain torch's, and Transformer Engine's: its own Python, over an extension of shapes. It sees
neither numbers nor races: these want a GPU (`make gpu-check`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import ChainMap, Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakecuda import learners
from fakecuda.build import build, compiler
from places import ROOT, SUPPORT

from spell_megatron.tools.plan.assumptions import Assumptions

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler: g++ or clang++ builds the device"),
]

TE = Path(sys.prefix) / "apart"
"""The Python of Transformer Engine, where nothing else imports it: `requirements/apart.lock`."""
_needs_te = pytest.mark.skipif(not TE.is_dir(), reason="`make setup` brings Transformer Engine's Python")


def _cases(*, planted: bool) -> list[Any]:
    return [
        pytest.param(name, marks=[_needs_te] if case.te else [])
        for name, case in learners.CASES.items()
        if bool(case.plant) == planted
    ]


SOUND, PLANTED = _cases(planted=False), _cases(planted=True)
DISPATCHER = (
    "megatron/core/transformer/moe/moe_utils.py",
    "megatron/core/transformer/moe/token_dispatcher.py",
)
"""Upstream asks how many tokens go to which expert; with Transformer Engine's permutation, once a layer."""
ROUTER = "megatron/core/transformer/moe/moe_utils.py"
ON_HOST = "megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py"
"""An offloaded optimizer steps on the host, which has to have the gradients."""
A_STEP = 10
"""Waits of a step that do not depend on its streams: whether numbers are sound, the sums, the scores, the norm."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every learner. Those of one kind of layers share a process, since starting it takes longer."""
    library = build(tmp_path_factory.mktemp("device"))
    path = os.pathsep.join((str(SUPPORT), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # nothing is computed
    command = [sys.executable, "-W", "ignore", str(Path(learners.__file__)), str(library)]

    def run(site: str) -> dict[str, Any]:
        done = subprocess.run([*command, site], capture_output=True, text=True, timeout=590, env=environment)
        assert not done.returncode, done.stderr[-5000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    with ThreadPoolExecutor() as pool:
        return dict(ChainMap(*pool.map(run, ("", str(TE)) if TE.is_dir() else ("",))))


def faults(report: dict[str, Any]) -> list[str]:
    """What is wrong with a learner's way on the device."""
    found = [report["fault"]] if report["fault"] else []
    for wait in report["waits"]:
        if wait["layer"] and wait["phase"] != "build" and wait["file"] not in DISPATCHER:
            found.append(f"a layer waits: {wait}")
    found += [f"a product in float32: {p}" for p in report["wide"] if p["file"] != ROUTER]
    one, three = (_outside_layers(report, f"update of {streams}") for streams in (1, 3))
    found += [f"streams wait: {place}" for place in (three - one)]
    if one.total() > A_STEP:
        found.append(f"a step waits {one.total()} times: {one}")
    if (scoring := _outside_layers(report, "score")).total() > 1:
        found.append(f"scores wait: {scoring}")
    return found


def _outside_layers(report: dict[str, Any], phase: str) -> Counter[tuple[str, str, int]]:
    places: Counter[tuple[str, str, int]] = Counter()
    for wait in report["waits"]:
        if wait["phase"] == phase and not wait["layer"] and wait["file"] != ON_HOST:
            places[wait["what"], wait["file"], wait["line"]] += wait["count"]
    return places


@pytest.mark.parametrize("name", SOUND)
def test_nothing_waits_inside_a_layer_and_a_step_waits_as_often_as_one_of_one_stream(
    reports: dict[str, Any], name: str
) -> None:
    assert faults(reports[name]) == []


@pytest.mark.parametrize("name", SOUND)
def test_everything_is_on_the_device_in_its_precision(reports: dict[str, Any], name: str) -> None:
    case, report = learners.CASES[name], reports[name]
    offloaded = case.optimizer.get("cpu_offload", False)
    assert report["types"]["parameters"] == ["bfloat16 on cuda"]
    assert report["types"]["gradients"] == ["float32 on cuda"]
    assert [kind for kind in report["types"]["optimizer"] if kind.startswith("float32")] == [
        "float32 on cpu" if offloaded else "float32 on cuda"
    ]
    assert (report["weights"] > 0) == ("pipeline" not in case.layout)
    assert report["layer"] == ("TELayerNormColumnParallelLinear" if case.te else "NormColumnParallelLinear")


@pytest.mark.parametrize("name", [case for case in SOUND if "experts" in case.values[0]])
def test_the_dispatcher_of_experts_waits_once_a_layer_and_pass_with_te_and_else_thrice(
    reports: dict[str, Any], name: str
) -> None:
    case = learners.CASES[name]
    passes = 2 if "recompute" in case.policy else 1
    waits = [w["count"] for w in reports[name]["waits"] if w["layer"] and w["phase"] == "update of 3"]
    layers, streams = 2, 3
    assert sum(waits) == (1 if case.te else 3) * layers * streams * passes


@pytest.mark.parametrize(
    ("name", "times"),
    [
        *(("dense", 1), ("dense tp2 cp2", 2), ("experts tp2 ep2", 2), ("experts cp2 ep2", 1)),
        pytest.param("te dense tp2 cp2", 2, marks=_needs_te),
        pytest.param("te experts cp2 ep2", 1, marks=_needs_te),
    ],
)
def test_attention_is_computed_again_where_it_is_not_kept(
    reports: dict[str, Any], name: str, times: int
) -> None:
    calls = reports[name]["attention"]
    assert calls["forward"] == times * calls["backward"] > 0


@pytest.mark.parametrize("name", [case for case in SOUND if "ep2" in case.values[0]])
def test_recomputed_experts_results_are_sent_back_once(reports: dict[str, Any], name: str) -> None:
    """Tokens and their weights go to experts in both forward passes, and gradients of all three once."""
    layers, streams = 2, 3
    assert reports[name]["exchanges"] == (2 * 2 + 1 + 3) * layers * streams


@pytest.mark.parametrize("name", SOUND)
def test_activations_leave_the_device_where_they_are_offloaded(reports: dict[str, Any], name: str) -> None:
    assert (reports[name]["left"] > 0) == ("offloaded" in name)


def test_the_nucleus_moves_less_than_twice_what_the_heads_products_take(reports: dict[str, Any]) -> None:
    rows, vocabulary, hidden = 1024, 151_936, 2048
    assumed = Assumptions()
    products = 3 * 2 * rows * vocabulary * hidden / assumed.dense_rate
    whole, cut = reports["head"]["1.0"], reports["head"]["0.95"]
    assert (cut - whole) / (assumed.memory_rate * assumed.memory_efficiency) <= 2 * products
    logits = rows * vocabulary  # and the planner counts what is moved
    assert whole / logits == pytest.approx(assumed.logit_bytes, rel=0.05)
    assert (cut - whole) / logits == pytest.approx(assumed.nucleus_bytes, rel=0.05)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(reports: dict[str, Any], name: str) -> None:
    assert faults(reports[name])
