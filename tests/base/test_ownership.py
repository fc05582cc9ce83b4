"""Whose a folder is: what is executed from it can neither be written nor replaced by others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from places import ROOT

from spell_megatron.base.ownership import make_own, own

pytestmark = pytest.mark.unit

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "team" / "runs" / "kernels"
    make_own(made)
    for place in (made, *made.parents[:2]):
        place.chmod(0o755)
    return made


@pytest.mark.parametrize("height", [0, 1])
@pytest.mark.parametrize(
    ("mode", "kept"),
    [(0o770, False), (0o2775, False), (0o707, False), (0o1777, True), (0o3770, True), (0o2755, True)],
)
def test_who_may_rename_what_lies_in_a_folder_above_can_replace_it(
    folder: Path, height: int, mode: int, kept: bool
) -> None:
    assert own(folder)
    folder.parents[height].chmod(mode)
    assert own(folder) == kept


@needs_root
def test_a_folder_of_somebody_elses_may_be_replaced_by_its_owner(folder: Path) -> None:
    os.chown(folder.parent, 4321, 4321)
    assert not own(folder)


def test_on_the_way_of_a_link_all_folders_count(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "link").symlink_to(folder.parent)
    through = tmp_path / "open" / "link" / folder.name
    assert own(through)
    (tmp_path / "open").chmod(0o777)  # where the link stands
    assert not own(through)
    (tmp_path / "open").chmod(0o755)
    folder.parents[1].chmod(0o777)  # where what it means stands
    assert not own(through)


@needs_root
def test_in_a_container_with_numbers_of_its_own_root_is_nobody() -> None:
    """As enroot makes them: folders of the host that are root's have a number that means none of its users."""
    code = (
        "import ctypes, os, sys\n"
        "from pathlib import Path\n"
        "from spell_megatron.base.ownership import own\n"  # while its files can be read
        "os.setgroups([]); os.setgid(4321); os.setuid(4321)\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.prctl(4, 1)\n"  # PR_SET_DUMPABLE: else what is in /proc is root's
        "if libc.unshare(0x10000000): sys.exit(77)\n"  # CLONE_NEWUSER
        "open('/proc/self/uid_map', 'w').write('4321 4321 1')\n"
        "assert Path('/').stat().st_uid != 0 and own(Path(sys.argv[1]))"
    )
    with TemporaryDirectory() as place:
        os.chown(place, 4321, 4321)
        done = subprocess.run([sys.executable, "-c", code, place], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("no user namespaces here")
    assert done.returncode == 0, done.stderr
