"""Runs that cannot be lost: killed again and again, a run comes to the very end of one that was left alone.

SIGKILL falls at random instants: while the run starts, plays, trains, and while a checkpoint is on its way to
the disk; now and then the newest checkpoint is damaged besides. What is real here and what is scripted:
durable_run.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from places import SUPPORT
from safetensors.torch import load_file

from spell_megatron.base.interpreter import python
from spell_megatron.selfplay.seeds import seed_of

KILLS = {"scripted": 20, "real": 8}
STEPS = {"scripted": 24, "real": 12}
SMALL = (
    "selfplay.questions=3",
    "selfplay.round_questions=12",
    "selfplay.group_size=4",
    "heldout.questions=0",
    "record.checkpoint_every=1",
    f"record.keep_last={(KEEP_LAST := 3)}",
    f"record.keep_every={(KEEP_EVERY := 10)}",
    "record.mismatch_bound=1000",
    "corpus.toy_clusters=6",
)
PATIENCE = 300.0


class Runs:
    """A folder with one run, and the program that goes on with it."""

    def __init__(self, folder: Path, program: subprocess.Popen[str]) -> None:
        self.folder, self._program, self._pid = folder, program, 0
        self.log = folder / "requests.log"

    @property
    def run(self) -> Path | None:
        """The run's folder, once it can be resumed."""
        begun = [path.parent for path in self.folder.glob("*/config.yaml")]
        return begun[0] if begun else None

    @property
    def requests(self) -> list[int]:
        """Seeds of all requests so far, in order."""
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    @property
    def errors(self) -> str:
        return (self.folder / "errors.log").read_text()[-4000:]

    def start(self) -> None:
        assert self._program.stdin
        self._program.stdin.write("\n")
        self._program.stdin.flush()
        self._pid = int(self._line())

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        """Exit status of the run."""
        return int(self._line())

    def alive(self) -> bool:
        stat = Path(f"/proc/{self._pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    def _line(self) -> str:
        assert self._program.stdout
        return self._program.stdout.readline()


@contextmanager
def runs_in(folder: Path, engine: str = "scripted") -> Iterator[Runs]:
    folder.mkdir()
    with (folder / "errors.log").open("w") as errors:
        arguments = (engine, str(folder), *SMALL, f"steps={STEPS[engine]}")
        command = [sys.executable, str(SUPPORT / "durable_run.py"), *arguments]
        program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            yield Runs(folder, program)
        finally:
            program.kill()
            program.communicate()


def until(condition: Callable[[], object], runs: Runs) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and runs.alive() and time.monotonic() < deadline:
        time.sleep(0.0005)


def journaled(run: Path | None) -> Counter[tuple[int, int, int]]:
    """How often each episode (step, round, index) is written down; a line without an end is not."""
    places: Counter[tuple[int, int, int]] = Counter()
    for path in (run / "rollouts").glob("step-*.jsonl") if run else ():
        for line in path.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            places[row["step"], row["round"], row["index"]] += 1
    return places


def wait_for_the_instant(number: int, runs: Runs, draw: random.Random) -> None:
    """Somewhere in the start, in a step, or in the writing of a checkpoint; before the run could end by itself."""
    kind, asked = number % 4, len(runs.requests)
    if kind == 0:
        moment = time.monotonic() + draw.uniform(0.0, 2.0)
        until(lambda: time.monotonic() > moment or len(runs.requests) > asked, runs)
    elif kind == 3:
        assert runs.run
        folder, before = runs.run / "checkpoints", set((runs.run / "checkpoints").glob("*"))
        until(lambda: set(folder.glob("*.partial")) - before, runs)
        pause = draw.uniform(0.0, 0.05)
        time.sleep(pause if number % 8 == 7 else 0.0)  # every other one at once: it is surely half-written
    else:
        wanted = asked + draw.randrange(1, 300)
        until(lambda: len(runs.requests) >= wanted, runs)
        time.sleep(draw.uniform(0.0, 0.05))


def damage_newest(run: Path, draw: random.Random) -> bool:
    """Flip one bit of the newest checkpoint; False where it is the only one, without which a run does not go on."""
    whole = [path for path in (run / "checkpoints").glob("step-*") if not path.suffix]
    if len(whole) < 2:
        return False
    newest = max(whole)
    path = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1
    path.write_bytes(content)
    return True


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    with runs_in(tmp_path_factory.mktemp("alone") / "runs") as runs:
        runs.start()
        assert runs.wait() == 0, runs.errors
        assert runs.run
        return runs.run


def kill_often(killed: Runs, kills: int, steps: int) -> Path:
    """Kill a run of so many steps, then let it end. No episode may be lost or made twice; returns its folder."""
    draw = random.Random(3)
    half_written = damaged = asked = 0
    finished: Counter[tuple[int, int, int]] = Counter()
    for number in range(kills + 1):
        killed.start()
        until(lambda: killed.run, killed)
        if number < kills:
            wait_for_the_instant(number, killed, draw)
            assert killed.alive(), killed.errors
            killed.kill()
        assert killed.wait() == (-signal.SIGKILL if number < kills else 0), killed.errors
        again = {seed_of(0, *place, "questioner") for place in finished} & set(killed.requests[asked:])
        assert not again, "a finished episode was generated once more"
        assert killed.run
        half_written += bool(list(killed.run.glob("checkpoints/*.partial")))
        if number % 5 == 4:
            damaged += damage_newest(killed.run, draw)
        finished, asked = journaled(killed.run), len(killed.requests)
    assert half_written >= kills // 6
    assert damaged >= kills // 6
    assert (killed.run / "run.log").read_text().count("skipped a checkpoint") >= damaged
    assert set(finished.values()) == {1}
    assert len(killed.requests) > len(set(killed.requests))  # unfinished episodes are asked again
    left = sorted(path.name for path in (killed.run / "checkpoints").iterdir())
    kept = [name for name in left if ".suspect-" not in name]
    assert len(left) - len(kept) == damaged  # renamed, not removed
    stay = {*range(KEEP_EVERY, steps + 1, KEEP_EVERY), *range(steps + 1 - KEEP_LAST, steps + 1)}
    assert kept == [f"step-{step:05d}" for step in sorted(stay)]
    metrics(killed.run, steps)  # a row for every step, without a gap
    return killed.run


@pytest.mark.distributed
def test_a_run_that_is_killed_twenty_times_ends_like_one_that_is_left_alone(
    alone: Path, tmp_path: Path
) -> None:
    with runs_in(tmp_path / "killed") as killed:
        run = kill_often(killed, KILLS["scripted"], STEPS["scripted"])
    assert metrics(run) == metrics(alone)
    ours, theirs = (load_file(folder / "hf/model.safetensors") for folder in (run, alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.engine
def test_a_run_on_a_real_engine_is_killed_again_and_again(tmp_path: Path) -> None:
    with runs_in(tmp_path / "killed", "real") as killed:
        kill_often(killed, KILLS["real"], STEPS["real"])


@pytest.mark.distributed
def test_a_run_goes_on_in_another_layout(alone: Path, tmp_path: Path) -> None:
    """From the checkpoint that one process wrote, on two ranks that share every layer."""
    run = tmp_path / alone.name
    shutil.copytree(alone, run)
    for path in (*run.glob("checkpoints/step-0002?"), *run.glob("rollouts/step-0001[1-9].jsonl")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = [
        *python("launchers.ranks", "2"),
        *(str(SUPPORT / "durable_run.py"), "scripted", str(tmp_path)),
        *("policy.layout.tensor=2", "steps=12"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    ours, theirs = metrics(run, 12), metrics(alone)
    for step in (11, 12):
        assert ours[step].keys() == theirs[step].keys()
        assert ours[step]["questioner/reward"] == theirs[step]["questioner/reward"]
        assert ours[step]["policy/grad_norm"] == pytest.approx(theirs[step]["policy/grad_norm"], rel=1e-3)
    assert (run / "checkpoints/step-00012").is_dir()


def metrics(run: Path, steps: int = STEPS["scripted"]) -> list[dict[str, float]]:
    """Rows without what depends on the clock or counts what was begun and reused; one a step, without a gap."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(steps + 1))
    return [{k: value for k, value in row.items() if not k.startswith(("time", "episodes/"))} for row in rows]
