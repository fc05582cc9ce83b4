"""The transfers of our own without servers: both ends in one process, or one of them silent or elsewhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spell_megatron.base.rendezvous import RendezvousError
from spell_megatron.rollout import backend
from spell_megatron.rollout.address import Address
from spell_megatron.rollout.engine import EngineError

pytestmark = pytest.mark.engine

SECONDS = 2.0


class Worker:
    """An engine with one worker, reached by calls instead of HTTP. `deaf`, it answers and takes nothing."""

    def __init__(self) -> None:
        from spell_megatron.rollout.transfer.gloo import GlooReceiver

        self.got: dict[str, torch.Tensor] = {}
        self.deaf = threading.Event()
        self.receiver = GlooReceiver.__new__(GlooReceiver)
        self.receiver.parallel_config = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        self.receiver.model = SimpleNamespace(load_weights=self.got.update)

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self.receiver.init_transfer_engine(self.receiver.parse_init_info(info))

    def start_weight_update(self) -> None: ...

    def update_weights(self, info: dict[str, Any]) -> None:
        if not self.deaf.is_set():
            self.receiver.receive_weights(self.receiver.parse_update_info(info))

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def vllm(tmp_path_factory: pytest.TempPathFactory) -> None:
    backend.quiet()
    with backend.undisturbed(tmp_path_factory.mktemp("vllm")):
        import vllm.distributed.weight_transfer  # noqa: F401


def connected(worker: Worker, weights: dict[str, torch.Tensor]) -> Any:
    from spell_megatron.rollout.transfer.gloo import GlooTrainer, GlooTrainerInit

    init = GlooTrainerInit("127.0.0.1", 2, SECONDS, rank=0)
    return GlooTrainer.trainer_init(init, client=worker, source=list(weights.items()))  # type: ignore[arg-type]


def within(call: Future[None], seconds: float) -> BaseException:
    error = call.exception(timeout=seconds)
    assert error is not None
    return error


def test_what_is_sent_arrives() -> None:
    worker, weights = Worker(), {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    connected(worker, weights).send_weights()
    assert all(torch.equal(worker.got[name], tensor) for name, tensor in weights.items())


def test_weights_do_not_flow_to_an_engine_that_does_not_know_the_key() -> None:
    worker = Worker()
    meant = worker.init_weight_transfer_engine
    worker.init_weight_transfer_engine = lambda info: meant({**info, "key": "0" * 64})  # type: ignore[method-assign]
    with pytest.raises(RendezvousError, match="somebody who does not know the key"):
        connected(worker, {"a": torch.zeros(3)})
    assert not worker.got


def test_a_worker_that_takes_nothing_is_found_out_in_time() -> None:
    worker, weights = Worker(), {"lm_head.weight": torch.zeros(64, 1024)}
    trainer = connected(worker, weights)
    worker.deaf.set()
    with ThreadPoolExecutor(1) as pool:
        error = within(pool.submit(trainer.send_weights), SECONDS + 20)
    assert isinstance(error, EngineError)
    assert "lm_head.weight [64, 1024] did not leave rank 0 within 2 s" in str(error)


def test_a_trainer_that_sends_nothing_is_found_out_in_time() -> None:
    worker = Worker()
    _trainer = connected(worker, {})
    update = {"names": ["lm_head.weight"], "dtype_names": ["float32"], "shapes": [[4, 8]]}
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        error = within(pool.submit(worker.update_weights, update), SECONDS + 20)
    assert time.monotonic() - start >= SECONDS / 2
    assert "lm_head.weight [4, 8] did not reach rank 1 in time" in str(error)


class Neighbour:
    """A worker that is handed weights in memory, `number` of all workers from 1."""

    def __init__(self, number: int = 1) -> None:
        from spell_megatron.rollout.transfer.shm import ShmReceiver

        self.got: dict[str, torch.Tensor] = {}
        self.number, self.updates, self.kept = number, 0, 0
        self.receiver = ShmReceiver.__new__(ShmReceiver)
        self.receiver.device = torch.device("cpu")
        self.receiver.parallel_config = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        self.receiver.model = SimpleNamespace(load_weights=self._load)
        self.receiver._reload = SimpleNamespace(keep_from=self._keep)

    def _load(self, weights: Any) -> None:
        self.got |= {name: tensor.clone() for name, tensor in weights}

    def _keep(self, memory: torch.Tensor) -> None:
        self.kept += 1

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        info = {**info, "rank_offset": self.number}
        self.receiver.init_transfer_engine(self.receiver.parse_init_info(info))

    def start_weight_update(self) -> None: ...

    def update_weights(self, info: dict[str, Any]) -> None:
        self.updates += 1
        self.receiver.update_weights(json.loads(json.dumps(info)))  # as over HTTP

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def test_what_is_handed_over_in_memory_arrives_bucket_by_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    from spell_megatron.rollout.transfer import shm
    from spell_megatron.rollout.transfer.local import LocalSender
    from spell_megatron.rollout.transfer.manifest import Manifest

    monkeypatch.setattr(shm, "_BUCKET_BYTES", 1024)
    shapes = {"a": (3, 5), "large": (40, 40), "b": (7,), "c": (9, 9), "d": (200,)}
    sender, worker = LocalSender("shm", Manifest(shapes)), Neighbour()
    for _ in range(2):
        weights = {name: torch.randn(shape) for name, shape in shapes.items()}
        weights["b"] = weights["b"].bfloat16()
        weights["large"] = weights["large"].T  # in the memory of another order
        sender.send(weights.items(), worker)
        assert all(torch.equal(worker.got[name], tensor) for name, tensor in weights.items())
    assert worker.updates == worker.kept == 2 * 4
    sender.close()


def test_a_bucket_stands_while_the_next_one_is_staged_and_what_was_gathered_for_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from spell_megatron.rollout.transfer import shm

    monkeypatch.setattr(shm, "_BUCKET_BYTES", 1024)
    gathered: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for number in range(40):
            most = max(most, sum(ref() is not None for ref in gathered))
            tensor = torch.full((25 + 7 * (number % 5),), float(number))
            gathered.append(weakref.ref(tensor))
            yield str(number), tensor
            del tensor

    buffer = shm.Buffer(8)
    before: list[tuple[str, torch.Tensor]] = []
    seen = []
    for bucket, offsets in buffer.stage(stream()):
        for name, tensor in before + bucket:
            assert torch.equal(tensor, torch.full_like(tensor, float(name)))
        assert [tensor.storage_offset() * 4 for _, tensor in bucket] == offsets
        seen += [name for name, _ in bucket]
        before = bucket
    assert seen == [str(number) for number in range(40)]
    assert most <= 1
    buffer.close()


def test_every_worker_takes_the_memory_of_its_own_rank_and_else_of_one_on_its_node() -> None:
    from spell_megatron.rollout.transfer.shm import Buffer

    buffers = [Buffer(8), Buffer(8)]
    for rank, buffer in enumerate(buffers):
        list(buffer.stage([("a", torch.full((2,), float(rank)))]))

    def taken(number: int, names: list[tuple[str, str]]) -> float:
        worker = Neighbour(number)
        worker.init_weight_transfer_engine({})
        update = {
            "names": ["a"],
            "dtype_names": ["float32"],
            "shapes": [[2]],
            "offsets": [0],
            "buffers": names,
        }
        worker.update_weights(update)
        return float(worker.got["a"][0])

    names = [buffer.name for buffer in buffers]
    assert [taken(number, names) for number in (1, 2, 3, 4)] == [0, 1, 0, 1]
    elsewhere = (names[1][0], "a file that somebody else has there")
    assert [taken(number, [names[0], elsewhere]) for number in (1, 2)] == [0, 0]
    buffers[1].close()
    assert taken(2, names) == 0
    buffers[0].close()
    with pytest.raises(EngineError, match="no rank of the trainer shares memory"):
        taken(1, names)


def test_who_waits_for_a_message_of_vllms_leaves_the_core_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    from spell_megatron.rollout.cpu_start import sleep_soon

    patched = (
        (shm_broadcast.SpinCondition, "__init__"),
        (shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS"),
    )
    for owner, name in patched:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    sleep_soon()
    queue = shm_broadcast.MessageQueue(1, 1, [0], max_chunk_bytes=4096, max_chunks=4)
    thread: Future[int] = Future()

    def read() -> list[int]:
        reader = shm_broadcast.MessageQueue.create_from_handle(queue.export_handle(), 0)
        thread.set_result(threading.get_native_id())
        reader.wait_until_ready()
        return [reader.dequeue(timeout=60) for _ in range(21)]

    def taken() -> float:
        """Seconds of a core that the reader has had."""
        stat = Path(f"/proc/self/task/{thread.result()}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")  # as proc(5) counts, 14 and 15

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        queue.wait_until_ready()
        for number in range(20):
            queue.enqueue(number)
            time.sleep(0.001 * (number % 4))
        began, before = time.monotonic(), taken()
        time.sleep(0.4)
        share = (taken() - before) / (time.monotonic() - began)
        queue.enqueue(20)
        assert reading.result() == list(range(21))
    assert share < 0.5


def test_the_extension_sums_what_a_model_is_given() -> None:
    from spell_megatron.rollout.transfer.checksum import checksum
    from spell_megatron.rollout.transfer.extension import Extension

    class Model(torch.nn.Module):
        def load_weights(self, weights: Any) -> set[str]:
            return {name for name, _ in weights}

    model = Model()

    class Workplace(Extension):
        def get_model(self) -> Model:
            return model

    worker, tensor = Workplace(), torch.randn(4, 4)
    worker.watch_weights()
    assert model.load_weights([("a", tensor)]) == {"a"}
    assert worker.given_weights() == {"a": checksum(tensor)}
    model.load_weights([("b", tensor)])
    assert worker.given_weights() == {"a": checksum(tensor)}


class Labelled(BaseHTTPRequestHandler):
    """A server that says which weights it holds."""

    label = "default"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        content = json.dumps({"weight_version": self.label}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.mark.parametrize(
    ("label", "backwards"), [("default", False), ("6", False), ("7", False), ("8", True)]
)
def test_no_server_is_taken_back_to_an_older_version(
    monkeypatch: pytest.MonkeyPatch, label: str, backwards: bool
) -> None:
    from spell_megatron.rollout.transfer.fanout import FanOut, Peer

    monkeypatch.setattr(Labelled, "label", label)
    with HTTPServer(("127.0.0.1", 0), Labelled) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = FanOut(
            [Peer("remote-0", Address(f"http://127.0.0.1:{server.server_port}"), 1, 0)], 7, SECONDS
        )
        refusal = (
            pytest.raises(EngineError, match=r"remote-0 .* holds version 8, and 7")
            if backwards
            else nullcontext()
        )
        with refusal:
            client.greet()
        client.close()
        server.shutdown()


@pytest.mark.parametrize("named", ["127.0.1.1", "192.0.2.7"])
def test_engines_elsewhere_are_told_an_address_that_is_not_this_machines_alone(
    monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    from spell_megatron.rollout.transfer.session import _reachable

    monkeypatch.setattr(socket, "gethostbyname", lambda _: named)
    assert _reachable("10.1.2.3") == "10.1.2.3"
    if not named.startswith("127."):
        assert _reachable("0.0.0.0") == named
        return
    with suppress(EngineError):  # a machine without any network has no other
        assert not _reachable("0.0.0.0").startswith("127.")


def test_a_server_starts_without_torchs_compiler_which_can_be_had_later() -> None:
    lines = (
        "import sys",
        "from spell_megatron.rollout.cpu_start import _COMPILER, without_compiler",
        "with without_compiler():",
        "    import vllm.entrypoints.launchers.api_server.entry",
        "assert _COMPILER not in sys.modules",
        "import torch._inductor.lowering",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=300)
