"""One process in one run folder: who holds it is named, who is gone holds nothing."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import LeaseCompromise

from spell_megatron.base.ownership import private
from spell_megatron.run.record import RunFolder, lock, locked
from spell_megatron.run.record.folder import JsonLines, RunLockedError
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit

HOLD = (
    "import sys; from pathlib import Path; from spell_megatron.run.record.lock import locked\n"
    "with locked(Path(sys.argv[1])):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


@contextmanager
def holder(run: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(run)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def take(run: Path) -> None:
    with locked(run):
        pass


@pytest.mark.long
def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    with holder(tmp_path, SLURM_JOB_ID="4711") as other:
        with pytest.raises(
            RunLockedError, match=rf"process {other.pid} on .*, job 4711, since 20.* is at work in"
        ):
            take(tmp_path)
        other.communicate("")
        assert other.returncode == 0
    take(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.long
def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert sorted(os.listdir(tmp_path)) == ["LOCK", "LOCK.json"]
    take(tmp_path)


def elsewhere(run: Path) -> None:
    """Make the lock look as if its holder was on another machine."""
    name = json.loads((run / "LOCK.json").read_text())
    for file in ("LOCK", "LOCK.json"):
        text = (run / file).read_text()
        assert name["host"] in text
        (run / file).write_text(text.replace(name["host"], "node-17"))


@pytest.mark.long
def test_on_another_machine_it_is_the_heartbeat_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that comes back on other nodes waits until its former node is not heard of any more."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 4.0)
    monkeypatch.setattr(lock, "_MARGIN", 1.0)
    (tmp_path / "dead").mkdir()
    code = f"import spell_megatron.run.record.lock as lock; lock.LEASE_SECONDS = 4.0\n{HOLD}"
    command = [sys.executable, "-c", code, str(tmp_path / "dead")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    elsewhere(tmp_path / "dead")
    with pytest.raises(RunLockedError, match="on node-17"):
        take(tmp_path / "dead")
    process.kill()
    process.communicate()
    monkeypatch.setattr(lock, "_MARGIN", 60.0)
    take(tmp_path / "dead")


@pytest.mark.long
def test_a_lock_that_is_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.5)
    told = threading.Event()
    run, rows = RunFolder(tmp_path), JsonLines(tmp_path / "rollouts" / "step-00001.jsonl")
    with locked(tmp_path, told.set) as held:
        assert held.lost() is None
        rows.append({"index": 0})
        (tmp_path / "LOCK").unlink()
        assert told.wait(60)
        assert "no more records, checkpoints or models" in str(held.lost())
        for write in (lambda: rows.append({"index": 1}), lambda: run.save_config("steps: 1\n")):
            with pytest.raises(RunLockedError, match="another process may have gone on"):
                write()
    assert rows.path.read_text() == '{"index": 0}\n'
    assert not run.config.exists()
    with locked(tmp_path):  # whoever has it again may write
        rows.append({"index": 1})
    rows.close()


@pytest.mark.parametrize(("reason", "code"), [("owner-changed", 2), ("refresh-failed", 1)])
def test_a_run_whose_file_server_was_away_may_be_tried_again(tmp_path: Path, reason: str, code: int) -> None:
    held = lock.RunLock(tmp_path, lambda: None)
    held.lose(LeaseCompromise(str(tmp_path / "LOCK"), "token", reason))  # type: ignore[arg-type]
    assert held.lost().exit_code == code  # type: ignore[union-attr]
    with pytest.raises(SpellError, match=reason):
        RunFolder(tmp_path).save_config("steps: 1\n")


@pytest.mark.parametrize(("group", "folder", "file"), [(False, 0o700, 0o600), (True, 0o750, 0o640)])
def test_a_run_is_closed_to_others(tmp_path: Path, group: bool, folder: int, file: int) -> None:
    with private(group):
        run = RunFolder.create(tmp_path / "runs", "x")
        run.save_config("steps: 1\n")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (run.path, run.checkpoints, run.config)]
    assert modes == [folder, folder, file]
    run.path.chmod(0o755)
    run.close_to_others(group)
    assert stat.S_IMODE(run.path.stat().st_mode) == folder


def test_what_vllm_compiles_is_this_users_alone(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs", "x")
    cache = run.engine_cache
    assert cache == tmp_path / "runs" / f".engine-{os.getuid()}"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    cache.chmod(0o777)  # somebody could have put something there
    assert run.engine_cache == run.path / "engine"
    cache.rmdir()
    (tmp_path / "theirs").mkdir()
    cache.symlink_to(tmp_path / "theirs")
    assert run.engine_cache == run.path / "engine"
