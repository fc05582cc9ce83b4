"""The launcher against a real SLURM: to the end, failures, signals, preemption, requeue and resume."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
from places import ROOT, SUPPORT
from slurm_cluster import Cluster
from slurm_trainer import FAILURE

from launchers import job as jobs
from launchers import slurm
from launchers.launch import JobFailed, launch
from spell_megatron.base.secret import read_secret

pytestmark = pytest.mark.slurm

SECONDS = 300
FIRST_LOG = "*/logs/attempt-*-0.log"
GREETING = "GREETING: 'a;b \"c\" $HOME'"
HERE = f"cluster.env={{PYTHONPATH: {ROOT}, OMP_NUM_THREADS: 1, {GREETING}}}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if importlib.util.find_spec("nemo_run") is None:
        pytest.skip("no nemo-run: pip install --no-deps -r requirements/launch.lock")
    try:
        with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster
    except slurm_cluster.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def here(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands meet the test's cluster, from a folder that is nobody's; nothing is left in its queue."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    monkeypatch.chdir(tmp_path)
    yield
    cluster.cancel_all()


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks count instead of training."""
    monkeypatch.setattr(jobs, "TRAINER", (str(SUPPORT / "slurm_trainer.py"),))


class Watcher:
    """Does something to the job when it has got so far; a thread, as the launcher is busy following."""

    def __init__(self, runs: Path, files: str, pattern: str, act: Callable[[str], None]) -> None:
        self._runs, self._files, self._pattern, self._act = runs, files, re.compile(pattern), act
        self.acted = False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if any(
                self._pattern.search(file.read_text(errors="replace"))
                for file in self._runs.glob(self._files)
            ):
                (log,) = self._runs.glob(FIRST_LOG)
                self._act(log.name.split("-")[1])
                self.acted = True
                return
            time.sleep(0.2)


def attempts(runs: Path) -> list[str]:
    return [path.read_text() for path in sorted(runs.glob("*/logs/attempt-*.log"))]


def steps(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"step (\d+)$", text, re.M)]


@pytest.mark.usefixtures("counting")
def test_the_printed_file_works_as_a_plain_sbatch_file(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("toy", [f"runs={tmp_path}", "steps=3", HERE], "slurm", "cpu", dryrun=True) == 0
    printed = tmp_path / "printed.sh"
    printed.write_text(capsys.readouterr().out)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = cluster.run("sbatch", "--wait", f"--chdir={elsewhere}", str(printed), timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    (text,) = attempts(tmp_path)
    assert steps(text) == [1, 2, 3]
    assert "greeting 'a;b \"c\" $HOME'" in text
    if cluster.own_names:
        assert "2 ranks on n1 n2" in text


@pytest.mark.usefixtures("counting")
def test_a_failing_rank_ends_the_job_with_its_code_after_bounded_retries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(JobFailed) as failure:
        launch(
            "toy",
            [f"runs={tmp_path}", "name=fails", "steps=9", HERE, "cluster.crash_retries=1"],
            "slurm",
            "cpu",
        )
    assert failure.value.exit_code == FAILURE
    assert f"rank 1: Exited with exit code {FAILURE}" in str(failure.value)
    assert [steps(text) for text in attempts(tmp_path)] == [[1], []]  # the second began after step 1
    assert steps(capsys.readouterr().out) == [1]


@pytest.mark.usefixtures("counting")
def test_what_all_ranks_raise_leaves_rank_0_the_time_to_close_and_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(JobFailed) as failure:
        launch("toy", [f"runs={tmp_path}", "name=starves", "steps=9", HERE], "slurm", "cpu")
    assert failure.value.exit_code == 2
    (text,) = attempts(tmp_path)
    assert steps(text) == [1]
    assert text.count("no question was kept") == 2
    assert len(list(tmp_path.glob("*/left-*-0"))) == 1, "rank 0 was killed when another rank left"


@pytest.mark.usefixtures("counting")
def test_usr1_saves_requeues_and_resumes(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = Watcher(
        tmp_path, FIRST_LOG, r"step 2\b", lambda job: _run(cluster, "scancel", "--signal=USR1", job)
    )
    assert launch("toy", [f"runs={tmp_path}", "name=lingers", "steps=6", HERE], "slurm", "cpu") == 0
    assert watcher.acted
    first, second = attempts(tmp_path)
    assert "stopped on SIGUSR1 after step" in first
    assert steps(first) + steps(second) == list(range(1, 7))  # no step lost, none twice
    assert len(list(tmp_path.glob("*/left-*-0"))) == 1, "rank 0 was killed when another rank left"
    assert steps(capsys.readouterr().out) == list(range(1, 7))  # both attempts were followed


@pytest.mark.usefixtures("counting")
def test_a_job_of_a_higher_partition_preempts_and_the_run_resumes(cluster: Cluster, tmp_path: Path) -> None:
    intruder = (
        "sbatch",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        f"--output={tmp_path}/high.log",
        "--wrap",
        "sleep 1",
    )
    watcher = Watcher(tmp_path, FIRST_LOG, r"step 2\b", lambda job: _run(cluster, *intruder))
    assert launch("toy", [f"runs={tmp_path}", "name=waits", "steps=6", HERE], "slurm", "cpu") == 0
    assert watcher.acted
    first, second = attempts(tmp_path)
    assert "stopped on SIGTERM after step" in first
    assert steps(first) + steps(second) == list(range(1, 7))


@pytest.mark.usefixtures("counting")
def test_a_job_with_engine_nodes_is_asked_to_stop_and_the_run_resumes(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers and trainer get the same signal: what keeps the servers must not end the job before it is saved."""
    program = (
        "import sys; from pathlib import Path; from launchers import engines;"
        " engines.launches = lambda *_: print('keeps', flush=True) or [];"
        " engines.serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
    )
    monkeypatch.setattr(jobs, "ENGINES", ("-c", program))
    watcher = Watcher(
        tmp_path,
        "*/logs/engines-*-0.log",
        "keeps",
        lambda job: _run(cluster, "scancel", "--signal=TERM", job),
    )
    nodes = ["cluster.nodes=1", "cluster.engine_nodes=1"]
    assert launch("toy", [f"runs={tmp_path}", "name=lingers", "steps=6", HERE, *nodes], "slurm", "cpu") == 0
    assert watcher.acted
    first, second = attempts(tmp_path)
    assert "stopped on SIGTERM after step" in first
    assert steps(first) + steps(second) == list(range(1, 7))
    assert len(list(tmp_path.glob("*/left-*-0"))) == 1, "the trainer was killed when the servers had ended"


@pytest.mark.usefixtures("counting")
def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    Watcher(tmp_path, FIRST_LOG, r"step 1\b", lambda job: _run(cluster, "scancel", job))
    with pytest.raises(JobFailed, match="cancelled"):
        launch("toy", [f"runs={tmp_path}", "steps=60", HERE], "slurm", "cpu")
    cluster.cancel_all()
    assert len(attempts(tmp_path)) == 1


@pytest.mark.usefixtures("counting")
def test_the_trainer_is_told_where_the_engine_nodes_serve(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import socket, sys, time; print(socket.gethostname(), sys.argv[1:], flush=True); time.sleep(600)"
    )
    monkeypatch.setattr(jobs, "ENGINES", ("-c", program))
    nodes = ["cluster.nodes=1", "cluster.engine_nodes=1"]
    assert launch("toy", [f"runs={tmp_path}", "steps=2", HERE, *nodes], "slurm", "cpu") == 0
    (text,) = attempts(tmp_path)
    assert steps(text) == [1, 2]
    (told,) = re.findall(r"told (\[.*\])", text)
    *where, secret = ast.literal_eval(told)
    assert where[:2] == ["rollout.servers.count=0", "rollout.servers.host=n1"]
    assert re.fullmatch(r'rollout\.servers\.urls=\["http://n2:3\d{4}"\]', where[2])
    assert read_secret(Path(secret.removeprefix("rollout.servers.secret_file=")))
    (engines,) = tmp_path.glob("*/logs/engines-*.log")
    (run,) = tmp_path.glob("toy-*")
    if cluster.own_names:
        assert re.match(rf"n2 \['{run}', '3\d{{4}}', '1'\]", engines.read_text())


def test_the_toy_recipe_trains_on_two_nodes_through_a_signal_to_the_end(
    cluster: Cluster, tmp_path: Path
) -> None:
    small = [
        "steps=3",
        "record.checkpoint_every=1",
        "heldout.questions=8",
        "heldout.samples=1",
        "heldout.every=0",
    ]
    small += [
        "selfplay.questions=4",
        "selfplay.round_questions=12",
        "selfplay.max_rounds=20",
        "selfplay.group_size=4",
    ]
    small += ["rollout.kv_cache_mib=64", "rollout.max_num_seqs=64"]
    # A server on each node, as on GPUs that trainer and engines share: the second node's waits for the trainer.
    small += ["rollout.servers.count=1", "rollout.placement=colocated"]
    watcher = Watcher(
        tmp_path,
        "*/rollouts/step-00002.jsonl",
        r"\n",
        lambda job: _run(cluster, "scancel", "--signal=USR1", job),
    )
    assert launch("toy", [f"runs={tmp_path}", *small, HERE], "slurm", "cpu") == 0
    assert watcher.acted
    first, second = attempts(tmp_path)
    assert "stopped on SIGUSR1 after step" in first
    assert "resumed after step" in second
    (run,) = tmp_path.glob("toy-*")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert max(row["mismatch/max"] for row in rows[1:]) < 1e-3, "both servers have the weights of every step"
    assert len(list(run.glob(".vacated-*"))) < 2, "no server may start while the trainer saves its model"
    assert len(list((run / "logs").glob("engine-*.log"))) == 1
    assert (run / "hf" / "model.safetensors").is_file()
    assert (run / "report.html").is_file()


def test_a_recipe_for_four_nodes_of_eight_gpus_is_accepted(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        launch(
            "qwen3-30b-a3b-100k", [f"runs={tmp_path}", "cluster.partition=h100"], "slurm", "h100", dryrun=True
        )
        == 0
    )
    file = tmp_path / "printed.sh"
    file.write_text(capsys.readouterr().out)
    done = cluster.run("sbatch", "--test-only", str(file))
    assert done.returncode == 0, done.stderr
    assert "on nodes h[1-4]" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["cluster.partition=nowhere"], "`partition`"),
        (["cluster.nodes=5"], "lower `nodes`"),
        (["cluster.gpus_per_node=16"], "lower `cpus_per_rank`"),
        (["cluster.gpus_per_node=16", "cluster.cpus_per_rank=8"], "compare nodes, gpus_per_node"),
        (['cluster.time="9-00:00:00"'], "`time`"),
        (["cluster.sbatch={constraint: quantum}"], "`constraint`"),
        (["cluster.sbatch={gres: 'tpu:8'}"], "gpus_per_node: 0"),
    ],
)
def test_a_refused_header_is_explained(tmp_path: Path, overrides: list[str], remedy: str) -> None:
    with pytest.raises(Exception, match="SLURM refuses this job") as refusal:
        launch(
            "toy",
            [
                f"runs={tmp_path}",
                "cluster.partition=h100",
                "cluster.nodes=4",
                "cluster.container=''",
                *overrides,
            ],
            "slurm",
            "h100",
        )
    assert remedy in str(refusal.value)
    assert not attempts(tmp_path)


def test_a_vanished_job_is_not_waited_for() -> None:
    assert slurm.job_state("987654") is None


def _run(cluster: Cluster, *command: str) -> None:
    cluster.run(*command)
