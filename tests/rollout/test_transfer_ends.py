"""Transfers against servers that fail them, without an engine: each one ends in time, and for whom it must."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from places import free_port
from transformers import AutoConfig, AutoModelForCausalLM

from spell_megatron.config import ServersConfig
from spell_megatron.rollout import backend
from spell_megatron.rollout.address import Address
from spell_megatron.rollout.transfer.manifest import Manifest

pytestmark = pytest.mark.engine

SECONDS, GRACE, BUSY = 2.0, 0.5, 20.0
"""Of the transfer, of its end, and what a machine that is busy adds."""
WEIGHTS = {name: torch.rand(size) for name, size in {"a": (5, 7), "b": (600,), "c": (2, 2)}.items()}
MANIFEST = Manifest({name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()})


@pytest.fixture(scope="module", autouse=True)
def vllm(tmp_path_factory: pytest.TempPathFactory) -> None:
    import_vllm(tmp_path_factory.mktemp("vllm"))


def import_vllm(scratch: Path) -> None:
    backend.quiet()
    with backend.undisturbed(scratch):
        import vllm.distributed.weight_transfer
        import vllm.distributed.weight_transfer.ipc_engine
        import vllm.distributed.weight_transfer.nccl_engine  # noqa: F401


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    from spell_megatron.rollout.transfer import fanout

    monkeypatch.setattr(fanout, "_GRACE_SECONDS", GRACE)


class Server(ThreadingHTTPServer):
    """Says yes to everything, and holds the version that it was told. `at` a path it does something else."""

    daemon_threads = True

    def __init__(self, at: dict[str, Callable[[Handler], None]] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.at, self.label, self.calls = at or {}, "default", list[str]()
        self.updates: list[dict[str, Any]] = []

    def peer(self, number: int) -> Any:
        from spell_megatron.rollout.transfer.fanout import Peer

        return Peer(f"engine-{number}", Address(f"http://127.0.0.1:{self.server_port}"), 1, 1)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        path = self.path.partition("?")[0]
        self.server.calls.append(path)
        if path == "/update_weights":
            self.server.updates.append(body["update_info"])
        if path in self.server.at:
            return self.server.at[path](self)
        if path == "/finish_weight_update":
            self.server.label = body.get("weight_version") or self.server.label
        self.answer()

    def answer(self, status: int = 200) -> None:
        content = json.dumps({"weight_version": self.server.label, "error": "a worker died"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def dies(handler: Handler) -> None:
    handler.answer(500)


def stalls(_: Handler) -> None:
    time.sleep(SECONDS + 3 * GRACE + BUSY)


@contextmanager
def serving(*servers: Server) -> Iterator[list[Any]]:
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield [server.peer(number) for number, server in enumerate(servers)]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's sender over a communicator whose broadcast never ends, unless it is aborted. `deaf`, not even then."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCL_UNIQUE_ID_BYTES
    from vllm.distributed.weight_transfer import nccl_engine

    from spell_megatron.rollout.transfer import nccl

    state = SimpleNamespace(aborted=threading.Event(), deaf=False, ended=threading.Event(), hangs=True)

    def broadcast(iterator: Iterator[Any], **_: Any) -> None:
        for _ in iterator:
            pass
        if state.hangs:
            (threading.Event() if state.deaf else state.aborted).wait(60)
            state.ended.set()
            raise RuntimeError("the communicator was aborted")

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    communicator = SimpleNamespace(destroy=state.aborted.set)
    monkeypatch.setattr(nccl, "identifier", lambda: b"\1" * NCCL_UNIQUE_ID_BYTES)
    monkeypatch.setattr(nccl, "uid_init_process_group", lambda *_: communicator)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    return state


def elsewhere(seconds: float = SECONDS) -> Any:
    from spell_megatron.rollout.transfer.session import Elsewhere

    return Elsewhere("nccl", MANIFEST, ServersConfig(sync_seconds=seconds), torch.device("cpu"))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    return work(), time.monotonic() - began


@pytest.mark.parametrize("deaf", [False, True])
def test_an_engine_that_dies_in_a_broadcast_ends_it_at_once(nccl: SimpleNamespace, deaf: bool) -> None:
    nccl.deaf = deaf  # a communicator that does not even abort costs the whole time, and no more
    given = SECONDS if deaf else 10 * BUSY
    good, bad = Server(), Server({"/update_weights": dies})
    with serving(good, bad) as peers:
        sender = elsewhere(given)
        faults, seconds = timed(lambda: sender.update(peers, 1, WEIGHTS.items()))
        assert seconds <= (SECONDS + GRACE if deaf else 0) + BUSY
        assert nccl.aborted.is_set()
        assert set(faults) == {"engine-0", "engine-1"}, "they shared the communicator"
        assert "engine-1 answered 500 to /update_weights" in faults["engine-1"].message
        assert faults["engine-1"].reached in WEIGHTS
        assert not faults["engine-0"].silent and not faults["engine-1"].silent
        assert "/shutdown_weight_transfer_engine" in good.calls and "/resume" not in good.calls
        # The weights are whole all the same: the good one is given them by a new communicator.
        nccl.hangs = False
        assert sender.repeat(peers[:1], 1) == {}
        assert good.label == "1" and good.calls[-1] == "/resume"


def test_an_engine_that_says_nothing_ends_a_broadcast_in_time(nccl: SimpleNamespace) -> None:
    silent = Server(dict.fromkeys(["/update_weights", "/finish_weight_update"], stalls))
    with serving(silent) as peers:
        faults, seconds = timed(lambda: elsewhere().update(peers, 1, WEIGHTS.items()))
    assert SECONDS <= seconds <= SECONDS + 2 * GRACE + BUSY
    assert faults["engine-0"].silent
    assert nccl.ended.wait(BUSY), "the thread of the communicator is left behind"


def test_a_new_set_of_engines_frees_what_the_old_one_shared(nccl: SimpleNamespace) -> None:
    nccl.hangs = False
    first, second = Server(), Server()
    with serving(first, second) as peers:
        sender = elsewhere()
        for version, chosen in enumerate((peers, peers, peers[:1]), start=1):
            assert sender.update(chosen, version, WEIGHTS.items()) == {}
    joined = [call for call in first.calls if "transfer_engine" in call]
    start, end = "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"
    assert joined == [start, end, start]


def test_an_engine_that_was_left_out_lets_go_before_it_is_connected_anew(nccl: SimpleNamespace) -> None:
    nccl.hangs = False
    first, second = Server(), Server()
    with serving(first, second) as peers:
        sender = elsewhere()
        for version, chosen in enumerate((peers, peers[:1], peers), start=1):
            assert sender.update(chosen, version, WEIGHTS.items()) == {}
    start, end = "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"
    for server, expected in ((first, [start, end, start, end, start]), (second, [start, end, start])):
        assert [call for call in server.calls if "transfer_engine" in call] == expected


def test_an_engine_that_fails_nearby_fails_alone() -> None:
    from spell_megatron.rollout.transfer.session import Nearby

    good, dying = Server(), Server({"/update_weights": dies})
    silent = Server(dict.fromkeys(["/update_weights", "/finish_weight_update"], stalls))
    with serving(good, dying, silent) as peers:
        sender = Nearby("shm", MANIFEST, ServersConfig(sync_seconds=SECONDS))
        faults, seconds = timed(lambda: sender.update(peers, 1, WEIGHTS.items()))
        sender.close()
    assert seconds <= SECONDS + 2 * GRACE + BUSY
    assert good.label == "1" and good.calls[-1] == "/resume"
    assert {name: fault.silent for name, fault in faults.items()} == {"engine-1": False, "engine-2": True}
    assert all(fault.reached in WEIGHTS for fault in faults.values())
    assert "engine-2 (rank 3) did not answer" in faults["engine-2"].message
    assert len(good.updates) >= 1 and len(dying.updates) == len(silent.updates) == 1


def test_a_stream_that_breaks_off_is_the_trainers_fault_and_nobody_serves_it() -> None:
    from spell_megatron.rollout.transfer.session import Nearby

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", WEIGHTS["a"]
        raise ArithmeticError("a rank is gone")

    server = Server()
    with serving(server) as peers, pytest.raises(ArithmeticError):
        Nearby("shm", MANIFEST, ServersConfig(sync_seconds=SECONDS)).update(peers, 1, broken())
    assert server.label == "default" and "/resume" not in server.calls
    assert "/finish_weight_update" in server.calls


# vLLM's own IPC sender, on two ranks whose CUDA calls are stood in for.


def _stand_in_for_cuda(rank: int) -> SimpleNamespace:
    """Buffers in host memory, whose handle is (rank, number)."""
    from vllm.distributed.weight_transfer import ipc_engine, packed_tensor

    state = SimpleNamespace(buffers=[], synchronized=0)
    empty = torch.empty

    def on_host(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return empty(*size, device=None if device == "cuda" else device, **options)

    def reduce(buffer: torch.Tensor) -> tuple[None, tuple[int, int]]:
        state.buffers.append(buffer)
        return None, (rank, len(state.buffers) - 1)

    def synchronize(*_: Any) -> None:
        state.synchronized += 1

    torch.empty = on_host  # type: ignore[assignment]
    torch.cuda.synchronize = synchronize
    torch.cuda.ipc_collect = lambda: None
    torch.cuda.current_stream = lambda: SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment,return-value]
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid=f"GPU-{rank}")  # type: ignore[assignment,return-value]
    torch.accelerator.current_device_index = lambda: rank
    ipc_engine.reduce_tensor = packed_tensor.reduce_tensor = reduce
    return state


def _ipc_rank(rank: int, port: int, urls: list[int], scratch: str) -> None:
    """One rank of the trainer: two transfers of growing values; the second of two servers fails the first one."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    import_vllm(Path(scratch))
    state = _stand_in_for_cuda(rank)
    from spell_megatron.rollout.transfer import fanout, local
    from spell_megatron.rollout.transfer.session import Nearby

    fanout._GRACE_SECONDS = GRACE
    local.STAGED_BYTES = 256  # less than the largest tensor
    peers = [
        fanout.Peer(f"engine-{i}", Address(f"http://127.0.0.1:{url}"), 1, 1) for i, url in enumerate(urls)
    ]
    main = Nearby("ipc", MANIFEST, ServersConfig()) if rank == 0 else None
    other = local.LocalSender("ipc", MANIFEST) if main is None else None
    for version in (1, 2):
        weights = {name: tensor * version for name, tensor in WEIGHTS.items()}
        if main is not None:
            faults = main.update(peers, version, weights.items())
            assert set(faults) == {"engine-1"}, faults
        else:
            assert other is not None
            other.send(weights.items())
        assert state.synchronized, "the device was not synchronised before it was read"
        last = state.buffers[-1][: WEIGHTS["c"].nbytes].view(torch.float32).view(2, 2)
        assert torch.equal(last, weights["c"]), "the last bucket is not what was left to send"
        share = [None, None]
        dist.all_gather_object(share, version)  # whoever is ahead waits: both are here
        assert share == [version] * 2
    dist.destroy_process_group()


def test_every_rank_hands_over_its_own_memory_through_vllms_ipc_sender(tmp_path: Path) -> None:
    import pickle

    import pybase64

    good, dying = Server(), Server({"/update_weights": dies})
    with serving(good, dying):
        ports = [good.server_port, dying.server_port]
        mp.spawn(_ipc_rank, (free_port("127.0.0.1"), ports, str(tmp_path)), 2)
    assert good.label == "2"
    assert [name for update in good.updates for name in update["names"]] == list(WEIGHTS) * 2
    assert len(good.updates) > 2, "everything went in one bucket"
    for update in good.updates:
        handles = pickle.loads(pybase64.b64decode(update["ipc_handles_pickled"]))
        assert {gpu: handle[0] for gpu, handle in handles.items()} == {"GPU-0": 0, "GPU-1": 1}
        assert update["tensor_sizes"] == [WEIGHTS[name].nbytes for name in update["names"]]
    assert len(dying.updates) == 2, "who failed was asked again in the same transfer"


def catalogue() -> list[Path]:
    import spell_megatron.tools.plan

    return sorted((Path(spell_megatron.tools.plan.__file__).parent / "models").iterdir())


@pytest.mark.parametrize("folder", catalogue(), ids=lambda folder: folder.name)
def test_the_largest_tensor_of_every_planned_model_fits_its_buffer(folder: Path) -> None:
    from spell_megatron.rollout.transfer.local import staging_bytes

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    tensors = model.state_dict()
    manifest = Manifest({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert staging_bytes(manifest, torch.bfloat16) >= max(tensor.nbytes for tensor in tensors.values())
