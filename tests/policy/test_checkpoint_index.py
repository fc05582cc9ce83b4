"""The index of a checkpoint is data: whatever its pickle says, nothing is run and no class is altered."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hostile_indexes import BYTES, FILE, attacks, index
from places import SUPPORT

from spell_megatron.policy.checkpoint.index import NAME, read_index
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit

MUTATED = 10_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / FILE).write_bytes(bytes(BYTES))
    return tmp_path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_honest_index_is_read_as_torch_wrote_it(folder: Path, protocol: int) -> None:
    (folder / NAME).write_bytes(pickle.dumps(index(), protocol))
    found, written = read_index(folder), index()
    assert found.state_dict_metadata == written.state_dict_metadata
    assert found.storage_data == written.storage_data


@pytest.mark.parametrize("kind", attacks(""))
def test_an_index_that_is_more_is_refused(folder: Path, kind: str) -> None:
    (folder / NAME).write_bytes(attacks(str(folder / "canary"))[kind])
    with pytest.raises(
        SpellError, match=r"\.metadata is not the index of a checkpoint \(.*\): nothing was read"
    ):
        read_index(folder)
    assert not (folder / "canary").exists()


def test_an_index_must_describe_all_of_a_tensor_once(folder: Path) -> None:
    def refused(reason: str) -> None:
        (folder / NAME).write_bytes(pickle.dumps(changed))
        with pytest.raises(SpellError, match=reason):
            read_index(folder)

    changed = index()
    changed.state_dict_metadata["weight"].chunks.pop()
    refused("do not make up the whole")
    changed = index()
    changed.storage_data.popitem()
    refused("parts of bias are not those that are stored")
    changed = index()
    next(iter(changed.storage_data.values())).length = BYTES + 1
    refused("beyond the end")
    changed = index()
    changed.state_dict_metadata.pop("bias")
    refused("bias is stored and not described")


def test_ten_thousand_mutated_indexes_run_nothing(folder: Path) -> None:
    program = SUPPORT / "hostile_indexes.py"
    done = subprocess.run(
        [sys.executable, str(program), str(folder), str(MUTATED)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert (found["ran"], found["odd"], found["altered"], found["canary"]) == ([], [], [], False)
    assert found["refused"] + len(found["taken"]) == MUTATED + len(attacks("")) + 1
    taken = Counter(found["taken"])
    assert set(taken) == {"honest", "mutated"}  # a flipped bit of an offset is a number like another
    assert found["refused"] > MUTATED / 2
