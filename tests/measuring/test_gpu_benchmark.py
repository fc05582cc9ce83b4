"""The measurements that are meant for a GPU, on a CPU: bfloat16 is as exact as it can be, every command runs."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from models import make_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.common import save_model
from benchmarks.switches import settings
from spell_megatron.config import FusionsConfig, OptimizerConfig, SelfPlayConfig
from spell_megatron.policy.world import World

pytestmark = pytest.mark.unit


def test_bfloat16_is_as_far_from_float32_as_that_of_transformers(world: World, tmp_path: Path) -> None:
    folder = save_model(tmp_path, num_hidden_layers=2, tie_word_embeddings=True)
    errors = gpu.errors_of(folder, world)
    theirs = errors.pop("transformers, bfloat16")
    assert theirs["gradients"] > 1e-3, "so exact: the comparison says nothing"
    for by, ours in errors.items():
        if "float32" in by:
            assert max(ours.values()) <= 1e-5, by
        else:  # not the loss: errors of either sign cancel in it as they like
            assert ours["log-probs, mean"] <= 1.5 * theirs["log-probs, mean"], by
            assert ours["gradients"] <= 1.5 * theirs["gradients"], by


def test_attention_is_compared_with_a_flash_kernel(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused kernels take batches alone, and without one a long sequence's scores fill any memory."""
    theirs = gpu.scaled_dot_product_attention

    def alone(*args: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # any other is an error
            return theirs(*args, **options)

    monkeypatch.setattr(gpu, "scaled_dot_product_attention", alone)
    found = gpu.group_attention(64, 4, (4, 2, 32), world, 1)
    assert found["largest difference"] < 1e-5


def test_every_command_runs_without_a_gpu(tmp_path: Path) -> None:
    make_model("moe", tmp_path / "model")
    for arguments in (
        ["attention", "--tokens", "70", "--heads", "4", "--kv-heads", "2", "--head-dim", "32"],
        ["layers", "--model", f"{tmp_path / 'model'}:1", "--tokens", "70"],
        ["steps", "--model", f"{tmp_path / 'model'}:1", "--tokens", "70", "--recompute", "all_but_attention"],
    ):
        done = CliRunner().invoke(gpu.app, [*arguments, "--rounds", "1", "--json"], catch_exceptions=False)
        cases = json.loads(done.stdout.splitlines()[-1])["cases"]
        assert len(cases) == {"attention": 1, "layers": 3, "steps": 2}[arguments[0]]
        assert all(case["TFLOP/s"] > 0 for case in cases)
        expected = [value for case in cases for name, value in case.items() if name.endswith("predicted")]
        assert (
            len(expected) == (0 if arguments[0] == "attention" else len(cases))
            and min(expected, default=1) > 0
        )


def test_every_switch_of_the_policy_has_its_turn() -> None:
    """The key of each other than the base's, one at a time; what the policy computes stays."""
    name, base, sampled = next(every := settings())
    assert sampled.top_p == SelfPlayConfig().sampling.top_p < 1
    found = {name: policy for name, policy, _ in every}
    flags = {
        f"{part}.{field.name}"
        for part, kind in (("optimizer", OptimizerConfig), ("fusions", FusionsConfig))
        for field in fields(kind)
        if field.type == "bool"
    }
    assert {name.partition("=")[0] for name in found} >= {
        "top_p",
        "spec",
        "fp8",
        "recompute",
        "share_prompts",
        *flags,
    }
    for name, policy in found.items():
        changed = [key for key, value in asdict(policy).items() if value != asdict(base)[key]]
        assert changed == ([] if name.startswith("top_p") else [name.partition(".")[0].partition("=")[0]])
