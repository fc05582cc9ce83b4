"""Every correction of megatron-core is needed by the installed version, explained, and applied once."""

from __future__ import annotations

from pathlib import Path

import megatron.core
import pytest
import torch

import megatron_patches
from megatron_patches.versions import TESTED, installed

pytestmark = pytest.mark.unit

CORE = Path(megatron.core.__path__[0])


@pytest.mark.parametrize("patch", megatron_patches.PATCHES, ids=lambda patch: patch.name)
def test_a_patch_says_what_breaks_and_where(patch: megatron_patches.Patch) -> None:
    assert patch.breaks
    named = [
        part.split(":")[0].strip() for part in patch.upstream.replace(";", " ").replace(",", " ").split()
    ]
    if patch.versions[0] != installed():
        return  # the place is named in another version
    files = [CORE / name.removeprefix("megatron/core/") for name in named if name.endswith(".py")]
    assert all(path.is_file() for path in files), patch.upstream
    assert patch.scope in ("cpu", "any")


def test_every_patch_is_still_needed() -> None:
    """What upstream has mended can go: this names the file to delete."""
    applied = set(megatron_patches.apply())
    expected = {
        patch.name
        for patch in megatron_patches.PATCHES
        if installed() in patch.versions and (patch.scope == "any" or not torch.cuda.is_available())
    }
    assert applied == expected


def test_the_installed_version_is_a_tested_one() -> None:
    assert installed() in TESTED


def test_each_patch_has_a_file_of_its_own() -> None:
    files = {path.stem for path in Path(megatron_patches.__file__).parent.glob("*.py")}
    assert files - {"__init__", "patch", "versions"} == {patch.name for patch in megatron_patches.PATCHES}
