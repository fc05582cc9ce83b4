"""A real SLURM of two nodes on this machine, for tests: no systemd, no cgroups, nothing under /etc.

Where root allows it, the nodes have names and network namespaces of their own, so that they reach each other
as machines do. Elsewhere both run under this machine's name (`slurmd -N`), as four more nodes of eight
make-believe GPUs do, which serve `sbatch --test-only`. There is no accounting.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from debian import install

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
NODES = ("n1", "n2")
GPU_NODES = ("h1", "h2", "h3", "h4")
_SUBNET = "10.77.0"
_BRIDGE = "spellbr0"

_CONF = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2,bf_resolution=1
ReturnToService=2
SlurmdTimeout=0
MpiDefault=none
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
{nodes}
NodeName=h[1-4] NodeHostname={host} NodeAddr={address} Port=[27911-27914] CPUs=128 SocketsPerBoard=2 \
CoresPerSocket=64 RealMemory=1000000 Gres=gpu:h100:8 State=UNKNOWN
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=02:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE \
GraceTime=30
PartitionName=high Nodes=n[1-2] MaxTime=02:00:00 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=h100 Nodes=h[1-4] MaxTime=2-00:00:00 State=UP
"""


class Unavailable(Exception):
    """There can be no SLURM here, and why."""


@dataclass
class Cluster:
    """A cluster that is up. `own_names` says whether its nodes are machines of their own."""

    folder: Path
    own_names: bool
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"SLURM_CONF": str(self.conf)}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)

    def cancel_all(self) -> None:
        """End every job, and wait until none is left."""
        ids = self.run("squeue", "--noheader", "--format=%i").stdout.split()
        if ids:
            self.run("scancel", *ids)
        _await(
            lambda: not self.run("squeue", "--noheader", "--format=%i").stdout.strip(), 60, "jobs do not end"
        )


def require_programs() -> None:
    """Raise Unavailable where SLURM is absent and cannot be installed."""
    if fault := install(PACKAGES, _missing):
        raise Unavailable(fault)


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster whose files are all in `folder`; nothing of it is left when the block ends."""
    require_programs()
    own_names = _make_network()
    cluster = Cluster(folder, own_names)
    try:
        _configure(cluster)
        _start(cluster)
        yield cluster
    finally:
        _stop(cluster)
        if own_names:
            _remove_network()


def _missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _configure(cluster: Cluster) -> None:
    folder, host = cluster.folder, socket.gethostname()
    for name in ("state", *(f"spool-{node}" for node in (*NODES, *GPU_NODES))):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(64))
    (folder / "plugstack.conf").touch()
    for i in range(8):
        (folder / f"gpu{i}").touch()
    (folder / "gres.conf").write_text(f"NodeName=h[1-4] Name=gpu Type=h100 File={folder}/gpu[0-7]\n")
    shape = "CPUs=2 SocketsPerBoard=1 CoresPerSocket=2 RealMemory=2000 State=UNKNOWN"
    if cluster.own_names:
        address, node_port = f"{_SUBNET}.1", 27818
        nodes = f"NodeName=n[1-2] NodeAddr={_SUBNET}.1[1-2] {shape}"
        lines = ["127.0.0.1 localhost", f"{address} {host}"]
        lines += [f"{_SUBNET}.1{i} n{i}" for i in (1, 2)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
    else:
        address, node_port = "127.0.0.1", 27818
        nodes = f"NodeName=n[1-2] NodeHostname={host} NodeAddr={address} Port=[27818-27819] {shape}"
    user = "root" if os.geteuid() == 0 else os.environ.get("USER", str(os.geteuid()))
    text = _CONF.format(
        host=host, address=address, port=27817, node_port=node_port, user=user, folder=folder, nodes=nodes
    )
    cluster.conf.write_text(text)


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    places = (
        "socket=munge.sock key-file=munge.key log-file=munged.log pid-file=munged.pid seed-file=munge.seed"
    )
    options = [
        f"--{option}={folder}/{name}" for option, name in (place.split("=") for place in places.split())
    ]
    _daemon(cluster, ["munged", "--foreground", "--force", *options])
    _await((folder / "munge.sock").exists, 10, "munged does not start")
    _daemon(cluster, ["slurmctld", "-D", "-i", "-f", str(cluster.conf)])
    _await(lambda: "UP" in cluster.run("scontrol", "ping").stdout, 30, "slurmctld does not start")
    for node in (*NODES, *GPU_NODES):
        slurmd = ["slurmd", "-D", "-f", str(cluster.conf), "-N", node]
        if cluster.own_names and node in NODES:
            inside = f"hostname {node} && mount --bind {folder}/hosts /etc/hosts && exec {' '.join(slurmd)}"
            slurmd = [
                "nsenter",
                f"--net=/run/netns/{node}",
                "unshare",
                "--mount",
                "--uts",
                "--propagation",
                "private",
            ]
            slurmd += ["bash", "-c", inside]
        _daemon(cluster, slurmd)

    def idle() -> bool:
        states = cluster.run("sinfo", "--noheader", "--format=%T").stdout.split()
        return set(states) == {"idle"}

    _await(idle, 30, "the nodes do not come up")


def _daemon(cluster: Cluster, command: list[str]) -> None:
    with (cluster.folder / f"{command[0]}.out").open("ab") as out:
        env = os.environ | {"SLURM_CONF": str(cluster.conf)}
        # Even a test run that is killed takes its daemons along.
        command = ["setpriv", "--pdeathsig", "TERM", *command] if shutil.which("setpriv") else command
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    cluster.daemons.append(process)


def _stop(cluster: Cluster) -> None:
    if len(cluster.daemons) > 1:
        with contextlib.suppress(Exception):
            cluster.cancel_all()
    for process in reversed(cluster.daemons):
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _make_network() -> bool:
    """Two namespaces on a bridge; False where this is not allowed."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None:
        return False
    _remove_network()
    commands = [
        f"link add {_BRIDGE} type bridge",
        f"addr add {_SUBNET}.1/24 dev {_BRIDGE}",
        f"link set {_BRIDGE} up",
    ]
    for i, node in enumerate(NODES, start=1):
        commands += [
            f"netns add {node}",
            f"link add spellv{i} type veth peer name eth0 netns {node}",
            f"link set spellv{i} master {_BRIDGE} up",
            f"-n {node} addr add {_SUBNET}.1{i}/24 dev eth0",
            f"-n {node} link set eth0 up",
            f"-n {node} link set lo up",
        ]
    for command in commands:
        if subprocess.run(["ip", *command.split()], capture_output=True).returncode:
            _remove_network()
            return False
    return True


def _remove_network() -> None:
    for command in (*(f"netns del {node}" for node in NODES), f"link del {_BRIDGE}"):
        subprocess.run(["ip", *command.split()], capture_output=True)


def _await(true: Callable[[], bool], seconds: float, fault: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(fault)
        time.sleep(0.2)
