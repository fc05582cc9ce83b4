"""What an update must bring, and how a stream is cut."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import make_model
from safetensors.torch import load_file

from spell_megatron.rollout.engine import EngineError, check_version, room_for
from spell_megatron.rollout.transfer import checksum as checksums
from spell_megatron.rollout.transfer.checksum import checksum
from spell_megatron.rollout.transfer.manifest import Manifest, buckets
from spell_megatron.types import SpellError
from tokenizer.ends import end_tokens

pytestmark = pytest.mark.unit


@given(st.lists(st.integers(min_value=0, max_value=40)), st.integers(min_value=1, max_value=64))
def test_buckets_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    weights = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    cut = list(buckets(weights, limit))
    assert [item for bucket in cut for item in bucket] == weights
    for bucket in cut:
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= limit
    for left, right in itertools.pairwise(cut):  # no bucket could have taken the next tensor
        assert sum(tensor.nbytes for _, tensor in left) + right[0][1].nbytes > limit


def test_a_tied_head_may_come_or_not(tmp_path: Path) -> None:
    folder = make_model("qwen3_tied", tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    manifest = Manifest.of(folder)
    assert dict(manifest.checked(weights.items())) == weights
    with_head = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    assert dict(manifest.checked(with_head.items())) == with_head


def test_a_tensor_may_come_once(tmp_path: Path) -> None:
    manifest = Manifest({"a": (2,), "b": (2,)})
    tensor = torch.zeros(2)
    with pytest.raises(EngineError, match="'a' twice"):
        list(manifest.checked([("a", tensor), ("b", tensor), ("a", tensor)]))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"config\.json"):
        Manifest.of(tmp_path)
    make_model("qwen3", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(EngineError, match="cannot read the weights"):
        Manifest.of(tmp_path)


def test_end_tokens_come_from_the_model_folder(tmp_path: Path) -> None:
    with pytest.raises(SpellError, match="eos_token_id"):
        end_tokens(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert end_tokens(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert end_tokens(tmp_path) == (7, 8)
    for named in ("-1", "[7, -1]", "true", "[[7]]", "7.0"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {named}}}')
        with pytest.raises(SpellError, match="where token ids belong"):
            end_tokens(tmp_path)


def test_the_window_bounds_the_answer() -> None:
    assert room_for([1] * 10, 5, 20) == 5
    assert room_for([1] * 10, 50, 20) == 10
    with pytest.raises(EngineError, match="20 tokens"):
        room_for([1] * 20, 1, 20)


def test_versions_grow() -> None:
    check_version(3, 4)
    with pytest.raises(EngineError, match="version 3"):
        check_version(3, 3)


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(2, 40))
def test_a_checksum_notices_values_and_places(seed: int, dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone()) == checksum(tensor.T.contiguous().T)
    assert checksum(tensor) != checksum(tensor.flip(0))
    changed = tensor.clone()
    changed[-1, -1] = -changed[-1, -1] - 1
    assert checksum(tensor) != checksum(changed)


def test_a_checksum_reaches_over_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_CHUNK", 4)
    tensor = torch.arange(12.0)
    pieces = [tensor[4:8], tensor[:4], tensor[8:]]
    assert checksum(tensor) != checksum(torch.cat(pieces))


def test_kept_weights_come_with_their_checksums() -> None:
    from spell_megatron.rollout.transfer.store import WeightStore

    store = WeightStore(Manifest(dict.fromkeys("ab", (2, 3))), torch.device("cpu"), summed=True)
    weights = {name: torch.randn(2, 3) for name in "ab"}
    store.begin()
    store.fill(weights.items(), 1)
    list(store)
    assert store.sums == {name: checksum(tensor) for name, tensor in weights.items()}
    assert store.reached == "b"
