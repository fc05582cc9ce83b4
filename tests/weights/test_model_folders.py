"""Model folders: what is not computed as Hugging Face computes it is refused by name, before any work."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import KINDS, Kind, build_model, make_model
from places import ROOT, TOY_SEED
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spell_megatron.config import PolicyConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import World
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.transfer.manifest import Manifest
from spell_megatron.types import Group, Sample, SpellError, TrainBatch
from spell_megatron.weights import families, keys
from spell_megatron.weights.contents import read_contents, shape_of
from spell_megatron.weights.families import Family
from spell_megatron.weights.files import ModelFolder
from spell_megatron.weights.locate import model_folder
from spell_megatron.weights.table import ROWS, named

pytestmark = pytest.mark.unit

Change = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]


def configured(**values: Any) -> Change:
    """Another value for a key of config.json; `...` takes it away."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return change


def stored(change: Callable[[Tensors], Tensors], name: str = "model.safetensors") -> Change:
    def rewrite(folder: Path) -> None:
        tensors = change(load_file(folder / "model.safetensors"))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name)

    return rewrite


def plus(name: str, *size: int) -> Change:
    return stored(lambda tensors: {**tensors, name: torch.ones(size)})


def rope(**values: Any) -> Change:
    return configured(rope_parameters=..., rope_scaling=values)


def index(files: dict[str, str]) -> Change:
    def write(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    return write


def tokenizer(largest: int, *, added: bool) -> Change:
    def write(folder: Path) -> None:
        vocab = {"a": 0} if added else {"a": largest}
        tokens = [{"id": largest, "content": "<x>"}] if added else []
        (folder / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": vocab}, "added_tokens": tokens})
        )

    return write


REFUSED: dict[str, tuple[Kind, Change, str]] = {
    "a window of Mistral": ("mistral", configured(sliding_window=4096), "sliding_window=4096.*Mistral"),
    "quantised": (
        "qwen3",
        configured(quantization_config={"quant_method": "fp8"}),
        "quantization_config.*unquantised",
    ),
    "scales": (
        "qwen3",
        plus("model.layers.0.mlp.up_proj.weight_scale_inv", 1),
        "scales of quantised weights",
    ),
    "integers": (
        "qwen3",
        stored(lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()}),
        "holds I8 numbers",
    ),
    "biases": ("qwen3", configured(attention_bias=True), "attention_bias"),
    "gelu": ("qwen2", configured(hidden_act="gelu"), "hidden_act='gelu'"),
    "dual chunks": ("qwen2", configured(dual_chunk_attention_config={"chunk_size": 8}), "dual-chunk"),
    "sliding": ("qwen3", configured(use_sliding_window=True, sliding_window=8), "use_sliding_window"),
    "sliding layers": ("qwen3", configured(layer_types=["sliding_attention"] * 2), "layer_types"),
    "partial rotary": ("qwen3", configured(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "code": ("qwen3", configured(auto_map={"AutoModel": "modeling.Mine"}), "auto_map.*not run"),
    "unknown key": (
        "qwen3",
        configured(final_logit_softcapping=30.0),
        "final_logit_softcapping: this key is unknown",
    ),
    "experts of a dense model": ("qwen3", configured(num_experts=4), "num_experts: this key is unknown"),
    "mixed layers": ("moe", configured(mlp_only_layers=[0]), "mix dense and expert layers"),
    "dynamic": ("qwen3", rope(rope_type="dynamic", factor=2.0), "'dynamic' is not supported"),
    "factor in words": ("qwen3", rope(rope_type="yarn", factor="4.0"), "factor is '4.0', expected a number"),
    "no original length": (
        "qwen3",
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=None),
        "original_max_position_embeddings is None",
    ),
    "a factor without end": (
        "qwen3",
        rope(rope_type="yarn", factor=1e308, original_max_position_embeddings=128),
        r"factor is 1e\+308, expected a number between 0",
    ),
    "unknown rope key": ("qwen3", rope(rope_type="yarn", factor=4.0, attn_factor=0.8), "attn_factor"),
    "two ropes": (
        "qwen3",
        configured(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "both rope_scaling",
    ),
    "rope of layers": ("qwen3", configured(rope_parameters={"full_attention": {}}), "full_attention={}"),
    "type and rope_type": ("qwen3", rope(type="linear", rope_type="yarn", factor=2.0), "keep one"),
    "null head": ("qwen3", configured(head_dim=None), "head_dim is None, expected a whole number"),
    "layers in words": ("qwen3", configured(num_hidden_layers="2"), "num_hidden_layers is '2'"),
    "layers by a truth": ("qwen3", configured(num_hidden_layers=True), "num_hidden_layers is True"),
    "no size": ("qwen3", configured(hidden_size=...), "lacks 'hidden_size'"),
    "too many experts a token": ("moe", configured(num_experts_per_tok=8), "num_experts_per_tok=8"),
    "two files": ("qwen3", stored(lambda tensors: tensors, "again.safetensors"), "two sets of weights"),
    "a tower": ("qwen3", plus("visual.patch.weight", 3), "another modality"),
    "an adapter": ("qwen3", plus("base_model.model.lora_A.weight", 4), "adapter"),
    "a value head": ("qwen3", plus("v_head.summary.weight", 64), "value or reward head"),
    "layers beyond": ("qwen3", configured(num_hidden_layers=1, layer_types=...), "layers or parts"),
    "layers missing": (
        "qwen3",
        configured(num_hidden_layers=3, layer_types=...),
        "lacks the tensor 'model.layers.2",
    ),
    "layers without end": (
        "qwen3",
        configured(num_hidden_layers=10**12, layer_types=...),
        "no model has so many",
    ),
    "leftover index": ("qwen3", index({"a": "model-00001-of-00002.safetensors"}), "remove the index"),
    "index of nothing": (
        "qwen3",
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "no weight_map",
    ),  # type: ignore[dict-item, return-value]
    "added tokens": ("qwen3", tokenizer(256, added=True), "the id 256, and the embedding 256 rows"),
    "a large vocabulary": ("qwen3", tokenizer(300, added=False), "the id 300"),
    "generation settings": (
        "qwen3",
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config",
    ),  # type: ignore[dict-item, return-value]
    "a nest": (
        "qwen3",
        lambda f: (f / "config.json").write_text('{"a":' * 200_000),
        "cannot read .*config.json",
    ),  # type: ignore[dict-item, return-value]
    "pickles": (
        "qwen3",
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "no .*safetensors",
    ),  # type: ignore[dict-item, return-value]
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    return {kind: make_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def changed(models: dict[Kind, Path], kind: Kind, change: Change, to: Path) -> Path:
    folder = Path(shutil.copytree(models[kind], to / "model"))
    change(folder)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_computed_wrongly_is_refused(
    models: dict[Kind, Path], tmp_path: Path, case: str
) -> None:
    kind, change, words = REFUSED[case]
    folder = changed(models, kind, change, tmp_path)
    with pytest.raises(SpellError, match=words):
        read_contents(folder)
    with pytest.raises(EngineError, match=words):
        Manifest.of(folder)


@pytest.mark.parametrize("odd", ['{"model": {"vocab": 5}}', '{"model": [], "added_tokens": {"id": 5}}'])
def test_what_is_no_tokenizer_is_left_to_those_who_read_one(
    models: dict[Kind, Path], tmp_path: Path, odd: str
) -> None:
    folder = changed(models, "qwen3", lambda f: (f / "tokenizer.json").write_text(odd), tmp_path)  # type: ignore[arg-type, return-value]
    assert read_contents(folder).sizes


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_what_transformers_makes_of_its_config(models: dict[Kind, Path], kind: Kind) -> None:
    contents = read_contents(models[kind])
    weights = load_file(models[kind] / "model.safetensors")
    assert contents.sizes == {name: tuple(tensor.shape) for name, tensor in weights.items()}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    d=st.sampled_from([8, 16]),
    rest=st.tuples(st.integers(1, 3), st.integers(2, 30), st.integers(5, 60)),
)
def test_random_sizes_are_those_of_transformers(
    tmp_path: Path, kind: Kind, groups: int, shared: int, d: int, rest: tuple[int, int, int]
) -> None:
    layers, ffn, vocab = rest
    heads = groups * shared
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": heads * d,
    }
    if kind != "qwen2":
        sizes["head_dim"] = d
    model = build_model(kind, **sizes)
    model.config.save_pretrained(tmp_path)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if kind.endswith("_tied"):
        wanted.pop("lm_head.weight")
    if kind == "moe":  # transformers keeps experts stacked in memory, and one by one in a folder
        wanted = {name: size for name, size in wanted.items() if ".experts." not in name}
    found = dict(shape_of(tmp_path).tensors())
    assert {name: size for name, size in found.items() if ".experts." not in name} == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_any_single_tensor_of_another_shape_is_named(
    models: dict[Kind, Path], tmp_path: Path, kind: Kind
) -> None:
    weights = load_file(models[kind] / "model.safetensors")
    folder = Path(shutil.copytree(models[kind], tmp_path / "model"))
    for name, tensor in weights.items():
        for wrong in (tensor[:-1], torch.cat((tensor, tensor[:1])), tensor.flatten()[:, None]):
            save_file({**weights, name: wrong.contiguous()}, folder / "model.safetensors")
            with pytest.raises(SpellError) as error:
                read_contents(folder)
            message = str(error.value)
            assert repr(name) in message
            assert str(list(wrong.shape)) in message
            assert str(list(tensor.shape)) in message


@pytest.mark.parametrize(
    "key", ["vocab_size", "intermediate_size", "num_key_value_heads", "hidden_size", "head_dim"]
)
def test_a_config_of_another_size_is_refused(models: dict[Kind, Path], tmp_path: Path, key: str) -> None:
    value = json.loads((models["qwen3"] / "config.json").read_text())[key]
    folder = changed(models, "qwen3", configured(**{key: value * 2}), tmp_path)
    with pytest.raises(SpellError, match=r"has the shape \["):
        read_contents(folder)


def logprobs(folder: Path, world: World) -> tuple[np.ndarray, np.ndarray]:
    """Of the learner and of transformers, on a few tokens."""
    draw = np.random.default_rng(0)
    prompt, reply = (tuple(map(int, draw.integers(3, 250, size))) for size in (20, 12))
    sample = Sample(reply, [0.0] * len(reply), [0.0] * len(reply))
    learner = Learner(PolicyConfig(dtype="float32"), folder, world)
    ours = learner.score(TrainBatch((Group(prompt, (sample,)),))).logprobs[0][0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
    return ours, logits.log_softmax(-1)[range(len(reply)), list(reply)].numpy()


ACCEPTED: dict[str, tuple[Kind, Change]] = {
    "derived angles": ("qwen3", plus("model.layers.0.self_attn.rotary_emb.inv_freq", 16)),
    "tied in words, not in weights": ("qwen3", configured(tie_word_embeddings=True)),
    "an unknown key that is off": ("qwen3", configured(use_mrope=False, shared_expert=None)),
    "a window that Qwen2.5 does not use": ("qwen2", configured(sliding_window=4, use_sliding_window=False)),
    "keys of libraries": ("qwen2", configured(unsloth_version="1", pretraining_tp=1, attention_dropout=0.1)),
    "rope of old": ("qwen3", configured(rope_parameters=..., rope_theta=1e6, rope_scaling=None)),
    "yarn": ("qwen3", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
    "bias of Qwen2.5": ("qwen2", configured(attention_bias=True)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_accepted_is_computed_as_transformers_does(
    models: dict[Kind, Path], tmp_path: Path, world: World, case: str
) -> None:
    ours, theirs = logprobs(changed(models, *ACCEPTED[case], tmp_path), world)
    assert np.abs(ours - theirs).max() < 2e-5


def test_a_tied_head_that_is_there_is_noted_only_where_it_differs(
    models: dict[Kind, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def equal(tensors: Tensors) -> Tensors:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    def nearly(tensors: Tensors) -> Tensors:
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1e-3
        return {**tensors, "lm_head.weight": head}

    caplog.set_level(logging.WARNING)
    folder = changed(models, "qwen3_tied", stored(equal), tmp_path)
    assert read_contents(folder).shape.tied
    assert not caplog.records
    stored(nearly)(folder)
    assert not read_contents(folder).shape.tied
    assert "not tied" in caplog.text


def test_head_dim_of_a_family_is_its_own(models: dict[Kind, Path], tmp_path: Path) -> None:
    folder = changed(models, "qwen3", configured(head_dim=...), tmp_path)
    (folder / "model.safetensors").unlink()
    assert shape_of(folder).head_dim == 128
    with pytest.raises(SpellError, match=r"has the shape \["):
        read_contents(changed(models, "qwen3", configured(head_dim=...), tmp_path / "again"))


def test_what_is_shipped_and_known_passes() -> None:
    assert read_contents(TOY_SEED).sizes
    for path in (ROOT / "spell_megatron" / "tools" / "plan" / "models").glob("*/config.json"):
        assert shape_of(path.parent).layers


def test_no_key_stands_in_two_lists() -> None:
    lists = (keys.READ, keys.READ_OF_EXPERTS, keys.HARMLESS, set(keys.REFUSED), set(keys._NEEDED))
    assert sum(map(len, lists)) == len(frozenset().union(*lists))


OWN: dict[str, tuple[Family, str]] = {
    "like nobody": (Family("own", "Own", like="gpt2"), "is like 'gpt2'.*compute the same: llama, mistral"),
    "like another layer": (Family("own", "Own", qk_norm=True, like="llama"), "is like 'llama'.*same: qwen3$"),
    "without a row": (Family("own", "Own", rows=ROWS[1:]), "has no row for embedding.word_embeddings.weight"),
}


@pytest.mark.parametrize("case", OWN)
def test_a_family_of_the_users_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    family, words = OWN[case]
    monkeypatch.setattr(families, "made", family, raising=False)
    with pytest.raises(SpellError, match=f"^model.families: '{families.__name__}:made' {words}"):
        families.find("own", [f"{families.__name__}:made"])


def test_a_name_table_of_other_parameters_is_refused() -> None:
    with pytest.raises(
        SpellError, match=r"no parameter 'mlp.linear_fc1.weights'; did you mean 'mlp.linear_fc1.weight'"
    ):
        named({"mlp.linear_fc1.weights": ("a",)})
    with pytest.raises(
        SpellError, match=r"mlp.linear_fc1.weight is made of 2 tensors \(.*up_proj.weight\), not 1"
    ):
        named({"mlp.linear_fc1.weight": ("a",)})


def test_a_key_under_two_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        families, "made", Family("own", "Own", keys={"width": "hidden_size"}, like="llama"), raising=False
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "width": 8, "hidden_size": 8}))
    with pytest.raises(SpellError, match="says hidden_size under two names"):
        shape_of(tmp_path, [f"{families.__name__}:made"])


def test_what_a_family_implies_is_held_against_the_same_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Family("own", "Own", implied={"hidden_act": "gelu"}, like="llama")
    monkeypatch.setattr(families, "made", made, raising=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"}))
    with pytest.raises(SpellError, match="hidden_act='gelu' is not supported"):
        shape_of(tmp_path, [f"{families.__name__}:made"])


def sharded(folder: Path, *files: str) -> dict[str, torch.Tensor]:
    """Put the weights of a folder into these files and an index; returns them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {file: sorted(tensors)[place :: len(files)] for place, file in enumerate(files)}
    for file, chosen in names.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    index({name: file for file, chosen in names.items() for name in chosen})(folder)
    return tensors


MISTRAL = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "second", [{}, {"tok_embeddings.weight": torch.ones(256, 64)}], ids=["same", "other names"]
)
def test_where_an_index_names_files_no_others_are_read(
    models: dict[Kind, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, second: Tensors
) -> None:
    """Folders of Mistral's have a second set of weights, under names of its own."""
    folder = Path(shutil.copytree(models["mistral"], tmp_path / "model"))
    tensors = sharded(folder, *MISTRAL)
    save_file(
        second or {name: tensor + 1 for name, tensor in tensors.items()}, folder / "consolidated.safetensors"
    )
    with caplog.at_level(logging.INFO):
        contents = read_contents(folder)
    assert "not in the index, and so not read: consolidated.safetensors" in caplog.text
    assert {path.name for path in contents.files.values()} == set(MISTRAL)
    read = ModelFolder(contents)
    assert all(torch.equal(read.read(name), tensor) for name, tensor in tensors.items())
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(SpellError, match="two sets of weights" if not second else "does not have"):
        read_contents(folder)


def test_what_transformers_would_read_in_the_place_of_the_index_is_a_second_set(
    models: dict[Kind, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models["mistral"], tmp_path / "model"))
    save_file(
        {name: tensor + 1 for name, tensor in sharded(folder, *MISTRAL).items()}, folder / "model.safetensors"
    )
    with pytest.raises(SpellError, match=r"two sets of weights: model\.safetensors and those of"):
        read_contents(folder)


def test_the_hub_is_asked_for_one_set_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [*MISTRAL, "model.safetensors.index.json", "config.json", "tokenizer.json", "params.json"]
    second = [
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "consolidated.safetensors.index.json",
    ]
    asked = dict[str, Any]()

    def download(path: str, **patterns: Any) -> str:
        asked.update(patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_folder("mistralai/Mistral-7B-v0.3") == tmp_path
    assert list(filter_repo_objects([*there, *second, "model.bin"], **asked)) == there
