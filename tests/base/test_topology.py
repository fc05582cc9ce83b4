"""Which GPU serves what: no recipe, cluster or launch puts two things on one GPU that may not be there together."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.job import prepare
from launchers.machines import machines
from launchers.profile import load_profile
from spell_megatron.base.topology import LOCAL, Seat, Topology, topology, visible
from spell_megatron.config import (
    ClusterConfig,
    Config,
    ConfigError,
    RolloutConfig,
    SelfPlayConfig,
    ServersConfig,
    load_config,
    model_recipes,
)
from spell_megatron.policy.layout import LayoutError
from spell_megatron.run.record.folder import RunFolder
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.estimate import estimate

pytestmark = pytest.mark.unit


def config(
    servers: ServersConfig | None = None,
    cluster: ClusterConfig | None = None,
    staleness: int = 0,
    placement: str = "auto",
) -> Config:
    return Config(
        rollout=RolloutConfig(servers=servers or ServersConfig(), placement=placement),  # type: ignore[arg-type]
        selfplay=SelfPlayConfig(max_staleness=staleness),
        cluster=cluster or ClusterConfig(),
    )


def gpus(seats: tuple[Seat, ...]) -> set[tuple[int, int]]:
    return {(seat.node, gpu) for seat in seats for gpu in seat.gpus}


def check(found: Topology) -> None:
    """What holds wherever anything runs on GPUs."""
    trainer, engines = gpus(found.trainer), gpus(found.engines)
    assert len(trainer) == len(found.trainer), "each rank has a GPU of its own"
    assert len(engines) == sum(len(seat.gpus) for seat in found.engines), "and so has each worker of a server"
    if found.engines:
        assert found.colocated == bool(trainer & engines), "colocated where GPUs are shared, and nowhere else"
    if found.transfer == "nccl":
        assert not trainer & engines, "NCCL takes no two ranks on one GPU"
    if found.transfer in LOCAL:
        assert engines <= trainer, "who hands over weights has to be there"


@given(
    count=st.integers(0, 9),
    tensor=st.sampled_from([1, 2, 4, 8]),
    nodes=st.integers(1, 3),
    engine_nodes=st.integers(0, 2),
    per_node=st.sampled_from([1, 2, 4, 8]),
    staleness=st.integers(0, 1),
    placement=st.sampled_from(["auto", "colocated", "disaggregated"]),
    addressed=st.booleans(),
    ranks=st.none() | st.integers(1, 8),
)
def test_whatever_is_asked_for_is_refused_or_has_no_clash(
    count: int,
    tensor: int,
    nodes: int,
    engine_nodes: int,
    per_node: int,
    staleness: int,
    placement: str,
    addressed: bool,
    ranks: int | None,
) -> None:
    urls = ("http://a:1",) if addressed else ()
    asked = config(
        ServersConfig(count=count, tensor=tensor, urls=urls),
        ClusterConfig(nodes=nodes, engine_nodes=engine_nodes),
        staleness,
        placement,
    )
    try:
        found = topology(asked, cuda=True, gpus=per_node, ranks=ranks)
    except ConfigError:
        return
    check(found)
    assert all(gpu < per_node for _, gpu in gpus(found.trainer) | gpus(found.engines))
    if staleness and found.engines:
        assert not found.colocated or placement == "colocated"


def test_one_gpu_takes_turns_with_the_engine_in_the_process() -> None:
    found = topology(config(), cuda=True, gpus=1)
    assert found.colocated and not found.engines


def test_servers_on_shared_gpus_are_handed_weights_by_the_rank_that_is_there() -> None:
    found = topology(config(ServersConfig(count=2, tensor=4)), cuda=True, gpus=8)
    assert (found.colocated, found.transfer, found.ranks) == (True, "ipc", 8)
    assert [seat.gpus for seat in found.engines] == [(0, 1, 2, 3), (4, 5, 6, 7)]


@pytest.mark.parametrize("asked", [{"placement": "disaggregated"}, {"staleness": 1}])
def test_on_one_node_engines_of_their_own_get_a_part_of_it(asked: dict[str, object]) -> None:
    found = topology(config(ServersConfig(count=2, tensor=2), **asked), cuda=True, gpus=8)  # type: ignore[arg-type]
    assert (found.colocated, found.transfer, found.ranks) == (False, "nccl", 4)
    assert [seat.gpus for seat in found.engines] == [(4, 5), (6, 7)]


def test_addresses_on_the_trainers_other_nodes_are_shared_gpus_all_the_same() -> None:
    servers = ServersConfig(count=2, tensor=4, urls=("http://n1:1", "http://n1:2"))
    found = topology(config(servers, ClusterConfig(nodes=2)), cuda=True, gpus=8)
    assert (found.colocated, found.transfer) == (True, "ipc")
    elsewhere = topology(config(ServersConfig(urls=("http://far:1",))), cuda=True, gpus=8)
    assert (elsewhere.colocated, elsewhere.transfer, elsewhere.engines) == (False, "nccl", ())


def test_a_cpu_has_no_gpus_to_clash_on() -> None:
    found = topology(config(ServersConfig(count=2)), cuda=False, gpus=0, ranks=2)
    assert (found.colocated, found.transfer) == (False, "gloo")
    assert found.engines == (Seat(0), Seat(0))
    together = topology(config(ServersConfig(count=2), placement="colocated"), cuda=False, gpus=0, ranks=2)
    assert (together.colocated, together.transfer) == (True, "shm")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (config(ServersConfig(count=1, tensor=8, transfer="nccl")), "NCCL takes no two ranks on one GPU"),
        (
            config(ServersConfig(count=1, transfer="ipc"), placement="disaggregated"),
            "the engines have their own",
        ),
        (config(ServersConfig(count=1, tensor=8), staleness=1), "leave none of 8 GPU"),
        (
            config(cluster=ClusterConfig(engine_nodes=1), placement="colocated"),
            "gives the engines GPUs of their own",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(asked: Config, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        topology(asked, cuda=True, gpus=8)


def test_fewer_ranks_than_engine_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="GPU 2 of node 0 would have an engine and no rank"):
        topology(config(ServersConfig(count=1, tensor=8)), cuda=True, gpus=8, ranks=2)


@pytest.mark.parametrize(
    ("parent", "shown"),
    [(None, "2,3"), ("4,5,6,7", "6,7"), ("GPU-a,GPU-b, GPU-c ,MIG-d", "GPU-c,MIG-d")],
)
def test_a_servers_gpus_are_among_those_of_its_parent(parent: str | None, shown: str) -> None:
    assert visible((2, 3), parent) == shown


def test_gpus_beyond_those_of_the_parent_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"GPU 3 .* shows 2"):
        visible((2, 3), "0,1")


@pytest.mark.parametrize("placement", ["auto", "colocated", "disaggregated"])
@pytest.mark.parametrize(("cuda", "per_node"), [(True, 8), (False, 0)])
@pytest.mark.parametrize("staleness", [0, 1])
def test_for_an_engine_of_ones_own_nothing_is_started_and_no_gpu_kept_back(
    placement: str, cuda: bool, per_node: int, staleness: int
) -> None:
    if staleness and placement == "colocated":
        return
    asked = config(placement=placement, staleness=staleness)
    own = replace(asked, rollout=replace(asked.rollout, kind="my_package.engines:MINE"))
    found = topology(own, cuda=cuda, gpus=per_node)
    assert found.engines == ()
    assert len(found.trainer) == max(per_node, 1)
    assert found.transfer not in LOCAL, "the stream of weights passes through rank 0"


def test_servers_of_vllm_beside_an_engine_of_ones_own_are_refused() -> None:
    for more in ("rollout.servers.count=2", "cluster.engine_nodes=1"):
        with pytest.raises(ConfigError, match="an engine of your own, which rank 0 makes"):
            load_config("toy", ["rollout.kind=my_package.engines:MINE", more])


MODELS = model_recipes()
LAUNCHES = list(itertools.product(MODELS, (1, 4, 8), (0, 2)))


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "nodes", "engine_nodes"), LAUNCHES)
def test_every_launch_of_every_recipe(tmp_path: Path, recipe: str, nodes: int, engine_nodes: int) -> None:
    """What the batch file starts where, and what that makes of its own configuration when it gets there."""
    from launchers import nemo  # which takes torch along

    keys = [f"runs={tmp_path}", f"cluster.nodes={nodes}", f"cluster.engine_nodes={engine_nodes}"]
    asked, profile = load_config(recipe, keys), load_profile("h100")
    on = machines(profile, asked)
    job = prepare(asked, profile, on)
    text = nemo.write(job)
    steps = [
        {key: int(value) for key, value in re.findall(r"--(relative|nodes|ntasks-per-node)=(\d+)", line)}
        for line in text.splitlines()
        if line.startswith("srun")
    ]
    trainer = steps[0]
    ranks = trainer.get("ntasks-per-node", int(re.findall(r"#SBATCH --ntasks-per-node=(\d+)", text)[0]))
    assert trainer.get("relative", 0) == 0 and trainer.get("nodes", on.allocated) == nodes
    assert "#SBATCH --gpus-per-node=8" in text
    # The configuration as rank 0 has it: the folder's, and what the batch file adds.
    urls = [f"http://n{node}:1" for node in on.serving for _ in range(on.servers)]
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("srun")))
    resumes, _, told = words[words.index("-c") + 1].partition(f" resume {job.run}")
    assert resumes
    known = {"$ENGINES": json.dumps(urls), "$MASTER_ADDR": "n0"}
    added = [
        re.sub(r"\$[A-Z_]+", lambda name: known[name[0]], word)
        for word in shlex.split(told.partition(";")[0])
    ]
    assert bool(added) == bool(urls)
    written = str(job.run / "config.yaml")
    config_at_rank_0 = load_config(written, added)
    assert config_at_rank_0.rollout.servers.urls == tuple(urls)
    at_rank_0 = topology(config_at_rank_0, cuda=True, gpus=8, ranks=ranks)
    used = [("trainer", node, gpu) for node in range(nodes) for gpu in range(ranks)]
    used += [("engine", 0, gpu) for seat in at_rank_0.servers(0) for gpu in seat.gpus]
    if len(steps) > 1:
        served = range(steps[1]["relative"], steps[1]["relative"] + steps[1]["nodes"])
        assert served == on.serving
        there = topology(load_config(written), cuda=True, gpus=8)
        assert there.colocated == at_rank_0.colocated, "both know whether the servers have to wait"
        last = there.servers(there.engines[-1].node)
        assert len(last) == on.servers
        used += [("engine", node, gpu) for node in served for seat in last for gpu in seat.gpus]
    # Of all that, the next attempt and the servers' own nodes find nothing in the folder; of what the user adds, all.
    for more in ([], ["steps=7", "rollout.servers.tensor=2"]):
        now = load_config(written, [*added, *more])
        assert RunFolder(job.run).lasting(now, load_config(written)) == load_config(written, more)
    assert len(used) == len(set(used))
    shared = {key[1:] for key in used if key[0] == "trainer"} & {
        key[1:] for key in used if key[0] == "engine"
    }
    assert bool(shared) == at_rank_0.colocated == (engine_nodes == 0)
    assert at_rank_0.transfer == ("ipc" if shared else "nccl")
    with suppress(LayoutError):  # some layouts do not fit one node; the planner says so
        assert estimate(asked, Assumptions()).engine.colocated == at_rank_0.colocated, "the planner agrees"
