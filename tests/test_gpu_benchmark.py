"""The measurements that are meant for a GPU, on a CPU: bfloat16 is as exact as it can be, every command runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import make_model
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.common import save_model
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


def test_every_command_runs_without_a_gpu(tmp_path: Path) -> None:
    make_model("moe", tmp_path / "model")
    for arguments in (
        ["attention", "--tokens", "70", "--heads", "4", "--kv-heads", "2", "--head-dim", "32"],
        ["steps", "--model", f"{tmp_path / 'model'}:1", "--tokens", "70", "--recompute", "all_but_attention"],
    ):
        done = CliRunner().invoke(gpu.app, [*arguments, "--rounds", "1", "--json"], catch_exceptions=False)
        cases = json.loads(done.stdout.splitlines()[-1])["cases"]
        assert [case.get("prompt") for case in cases] in ([None], ["shared", "repeated"])
        assert all(case["TFLOP/s"] > 0 for case in cases)
