"""examples/otter: a model under other names is read, trained, played with and written as one under the usual names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from places import ROOT, TOY_SEED
from reference import random_batch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spell_megatron.config import PolicyConfig, load_config
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import World
from spell_megatron.run.record import RunFolder, read_metrics
from spell_megatron.run.train import train
from spell_megatron.tools.convert import export_hf, import_hf
from spell_megatron.tools.parity import compare
from spell_megatron.tools.plan import plan
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.estimate import estimate
from spell_megatron.types import SpellError
from spell_megatron.weights.contents import read_contents

SEED = TOY_SEED
RECIPE = str(ROOT / "examples" / "otter.yaml")
OTTER = ("otter:OTTER",)
CONFIG = {
    "model_type": "otter",
    "made_in": "a river",
    "n_vocab": 896,
    "width": 128,
    "depth": 4,
    "n_heads": 4,
    "n_kv_heads": 4,
    "head_width": 32,
    "mlp_width": 384,
    "norm_eps": 1e-6,
    "context": 1024,
    "rope_base": 1e4,
    "tied": True,
    "dtype": "float32",
}


def normed(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=CONFIG["norm_eps"])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.norm, self.norm_q, self.norm_k = normed(width), normed(size), normed(size)
        self.wq, self.wk, self.wv = (nn.Linear(width, heads * size, bias=False) for _ in "qkv")
        self.wo = nn.Linear(heads * size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (w(x).unflatten(1, (-1, self.size)).transpose(0, 1) for w in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(
            turned(self.norm_q(q)), turned(self.norm_k(k)), v, is_causal=True
        )
        return self.wo(mixed.transpose(0, 1).flatten(1))


def turned(x: Tensor) -> Tensor:
    """`[heads, tokens, size]`: each pair of halves is a complex number, turned by position times frequency."""
    half = x.shape[-1] // 2
    pace = CONFIG["rope_base"] ** -(torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(torch.ones(()).to(x), torch.arange(x.shape[1], dtype=x.dtype)[:, None] * pace)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = normed(width)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Otter(nn.Module):
    """Written from what the family says of itself, apart from Megatron, transformers and the name table."""

    def __init__(self) -> None:
        super().__init__()
        width = CONFIG["width"]
        self.tokens = nn.Embedding(CONFIG["n_vocab"], width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn": Attention(width, CONFIG["n_heads"], CONFIG["head_width"]),
                    "mlp": Mlp(width, CONFIG["mlp_width"]),
                }
            )
            for _ in range(CONFIG["depth"])
        )
        self.norm = normed(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Log-probs `[tokens, vocabulary]`."""
        x = self.tokens(ids)
        for block in self.blocks:
            x = x + block["attn"](x)
            x = x + block["mlp"](x)
        return (self.norm(x) @ self.tokens.weight.T).log_softmax(-1)


RENAMED = {
    "model.embed_tokens": "tokens",
    "model.norm": "norm",
    "model.layers.": "blocks.",
    "input_layernorm": "attn.norm",
    "post_attention_layernorm": "mlp.norm",
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj": "attn.wo",
    "self_attn.q_norm": "attn.norm_q",
    "self_attn.k_norm": "attn.norm_k",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped toy model as an Otter."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "examples"), prepend=":")
    otter = tmp_path / "otter"
    shutil.copytree(SEED, otter)
    tensors = {}
    for name, tensor in load_file(SEED / "model.safetensors").items():
        for usual, own in RENAMED.items():
            name = name.replace(usual, own)
        tensors[name] = tensor
    save_file(tensors, otter / "model.safetensors")
    (otter / "config.json").write_text(json.dumps(CONFIG))
    return otter


def same(one: Path, other: Path) -> bool:
    left, right = (load_file(path / "model.safetensors") for path in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.unit
def test_it_goes_through_megatron_and_back_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "megatron", OTTER)
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert same(folder, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == CONFIG


@pytest.mark.unit
def test_it_computes_what_its_own_definition_does(folder: Path, world: World) -> None:
    batch = random_batch(CONFIG["n_vocab"], shapes=((40, (20, 9)),))
    learner = Learner(PolicyConfig(dtype="float32"), folder, world, families=OTTER)
    model = Otter().double()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    [group] = batch.groups
    for sample, ours in zip(group.samples, learner.score(batch).logprobs[0], strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([*group.prompt, *sample.tokens]))[len(group.prompt) - 1 : -1]
        truth = logprobs.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(ours).double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.unit
def test_without_its_family_it_is_refused_and_with_it_so_is_an_unknown_key(folder: Path) -> None:
    with pytest.raises(SpellError, match=r"'otter' is not supported.*model\.families="):
        read_contents(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "whiskers": 6}))
    with pytest.raises(SpellError, match="whiskers: this key is unknown"):
        read_contents(folder, OTTER)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "depth": "4"}))
    with pytest.raises(SpellError, match="depth is '4', expected a whole number"):
        read_contents(folder, OTTER)


@pytest.mark.unit
def test_the_planner_builds_it(folder: Path) -> None:
    found = plan(load_config(RECIPE, [f"model.path={folder}"]))
    usual = estimate(load_config("toy"), Assumptions())
    assert found.rehearsal
    assert found.rehearsal.hf_weights == len(load_file(folder / "model.safetensors"))
    assert [stage.parameters for stage in found.stages] == [stage.parameters for stage in usual.stages]


@pytest.mark.engine
def test_it_plays_trains_and_is_exported_as_itself(folder: Path, tmp_path: Path) -> None:
    overrides = [f"runs={tmp_path}", f"model.path={folder}", "steps=1"]
    overrides += ["selfplay.questions=3", "selfplay.round_questions=12", "heldout.questions=0"]
    overrides += ["rollout.kv_cache_mib=64", "corpus.toy_clusters=6"]
    run = RunFolder(Path(train(load_config(RECIPE, overrides)).run_dir))
    assert read_metrics(run)[-1]["mismatch/mean"] < 1e-4
    assert json.loads((run.hf / "config.json").read_text()) == CONFIG
    assert read_contents(run.hf, OTTER).sizes == read_contents(folder, OTTER).sizes
    assert not same(folder, run.hf), "nothing was learned"
    compare(run.hf, 16, OTTER).check()
