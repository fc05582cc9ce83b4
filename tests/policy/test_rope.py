"""RoPE scaling: beyond the positions that a model was trained on, the learner computes what Hugging Face does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make_model
from reference import random_batch
from transformers import AutoModelForCausalLM

from spell_megatron.config import PolicyConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import World
from spell_megatron.types import SpellError
from spell_megatron.weights.shape import model_shape

pytestmark = pytest.mark.unit

TRAINED = 32_768
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
LLAMA = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def scaled_model(folder: Path, scaling: dict[str, Any] | None) -> Path:
    """One layer, one wide-open head; `rope_scaling` written as model cards tell users to write it."""
    make_model("qwen3", folder, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
               initializer_range=0.3)  # fmt: skip
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    config.update(rope_theta=1e6, max_position_embeddings=40_960)
    if scaling is not None:
        config["rope_scaling"] = scaling
    path.write_text(json.dumps(config))
    return folder


def logprobs(folder: Path, world: World, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a response that begins at position `prompt`: the learner's in float32, and the float64 truth."""
    batch = random_batch(256, shapes=((prompt, (40,)),))
    learner = Learner(PolicyConfig(dtype="float32", stream_tokens=prompt + 128), folder, world)
    (ours,) = learner.score(batch).logprobs[0]
    (group,) = batch.groups
    (sample,) = group.samples
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    ids = torch.tensor([[*group.prompt, *sample.tokens]])
    with torch.no_grad():
        log_p = model(ids, logits_to_keep=len(sample.tokens) + 1).logits[0, :-1].log_softmax(-1)
    return ours, log_p.gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0].numpy()


@pytest.mark.parametrize(
    "scaling", [YARN, {"rope_type": "linear", "factor": 2.0}, LLAMA], ids=lambda s: s["rope_type"]
)
def test_scaled_positions_equal_hugging_face(scaling: dict[str, Any], world: World, tmp_path: Path) -> None:
    ours, truth = logprobs(scaled_model(tmp_path / "scaled", scaling), world, 2000)
    assert np.abs(ours - truth).max() / np.abs(truth).max() < 1e-5
    plain, _ = logprobs(scaled_model(tmp_path / "plain", None), world, 2000)
    assert np.abs(ours - plain).max() > 0.01, "scaling made no difference: the test cannot fail"


def test_yarn_beyond_the_trained_positions_equals_hugging_face(world: World, tmp_path: Path) -> None:
    ours, truth = logprobs(scaled_model(tmp_path / "model", YARN), world, TRAINED + 232)
    assert np.abs(ours - truth).max() / np.abs(truth).max() < 1e-5


def test_yarn_reaches_as_far_as_its_factor(tmp_path: Path) -> None:
    assert model_shape(scaled_model(tmp_path / "plain", None)).max_positions == 40_960
    assert model_shape(scaled_model(tmp_path / "scaled", YARN)).max_positions == 4 * TRAINED


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "from-the-future"])
def test_other_types_are_refused_with_what_to_write(kind: str, tmp_path: Path) -> None:
    folder = scaled_model(tmp_path / "model", {"type": kind, "factor": 2.0})
    with pytest.raises(SpellError, match=f"{kind}.*yarn"):
        model_shape(folder)
