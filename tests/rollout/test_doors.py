"""Nobody without the secret is answered by an engine server, and no other user reaches it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import traps
import uvicorn
from models import make_model
from places import free_port

from spell_megatron.base.secret import read_secret, write_secret
from spell_megatron.config import RolloutConfig, ServersConfig
from spell_megatron.rollout import door, private_folder
from spell_megatron.rollout.address import Address, Unproven
from spell_megatron.rollout.client import Client, TurnedAway, Unavailable
from spell_megatron.rollout.server import Launch, Server
from spell_megatron.types import SpellError

UNLISTED = (
    "/openapi.json",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
    "/metrics",
    "/health",
    "/nowhere",
    "/",
)


SECRET = "the-secret"
PATIENCE = 60.0
"""Seconds that nobody here is expected to take."""
SOCKET, PORT = ("/tmp/http", None), ("127.0.0.1", 8000)


def through(scope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a door sends; an application behind it says 'inside'."""
    monkeypatch.setenv(door.VARIABLE, SECRET)
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "inside"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        raise AssertionError("the request of a stranger was read")

    asyncio.run(door.Door(application)(scope, receive, send))
    return sent


@pytest.mark.unit
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"the-secret")],
        [(b"authorization", b"Bearer the-secre")],
        [(b"authorization", b"Bearer the-secret ")],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"authorization", b"Bearer no"), (b"authorization", b"Bearer the-secret")],
        [(b"x-api-key", b"the-secret")],
        [(b"authorization", b"Spell")],
        [(b"authorization", b"Spell a nonce and more")],
        [(b"authorization", b"Spell " + b"n" * 1000)],
        [(b"authorization", b"Spell nonce the_secret")],
        [(b"authorization", b"Spell nonce \xff\xfe")],
    ],
)
@pytest.mark.parametrize("where", [SOCKET, PORT])
def test_the_door_is_shut_to_strangers(
    headers: list[tuple[bytes, bytes]], where: tuple[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = through({"type": "http", "headers": headers, "server": where}, monkeypatch)
    assert sent[0]["status"] == 401


@pytest.mark.unit
def test_the_door_opens_to_the_secret_and_to_nothing_but_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [(b"authorization", b"Bearer the-secret")]
    for where in (SOCKET, PORT):
        assert through({"type": "http", "headers": known, "server": where}, monkeypatch) == [
            {"type": "inside"}
        ]
    assert through({"type": "websocket", "headers": known}, monkeypatch)[0]["type"] == "websocket.close"
    with pytest.raises(ValueError, match="not served"):
        through({"type": "unheard of", "headers": known}, monkeypatch)
    monkeypatch.delenv(door.VARIABLE)
    with pytest.raises(ValueError, match="open to everybody"):
        door.Door(lambda *_: None)  # type: ignore[arg-type,return-value]


@pytest.mark.unit
def test_a_secret_is_its_users_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    write_secret(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(read_secret(file)) >= 32
    with pytest.raises(FileExistsError):
        write_secret(file)
    assert read_secret(file) not in repr(Address("http://a", secret=read_secret(file)))
    file.chmod(0o640)
    with pytest.raises(SpellError, match="by others"):
        read_secret(file)
    file.chmod(0o600)
    for text in ("", "short", "two lines of it\nare not one secret", "ü" * 40):
        file.write_text(text)
        with pytest.raises(SpellError, match="secret"):
            read_secret(file)


@pytest.mark.unit
def test_only_where_something_is_encrypted_certificates_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise PermissionError("the machine's certificates")

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", read)
    for address in (Address("http://engine", "/tmp/socket"), Address("http://127.0.0.1:80")):
        address.client(trust_env=False).close()
        asyncio.run(address.async_client(trust_env=False).aclose())
    with pytest.raises(PermissionError):
        Address("https://engine.example").client(trust_env=False)


@pytest.mark.unit
def test_another_runs_server_at_our_port_is_told_from_one_that_is_not_there_yet() -> None:
    class Theirs(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: Any) -> None: ...

    async def ask(url: str) -> None:
        client = Client(Address(url, secret="0" * 64), PATIENCE)
        try:
            await client.version(PATIENCE)
        finally:
            await client.close()

    with HTTPServer(("127.0.0.1", 0), Theirs) as theirs:
        threading.Thread(target=theirs.serve_forever, daemon=True).start()
        with pytest.raises(TurnedAway, match="another run's server may have this port"):
            asyncio.run(ask(f"http://127.0.0.1:{theirs.server_port}"))
        theirs.shutdown()
    with pytest.raises(Unavailable) as absent:
        asyncio.run(ask(f"http://127.0.0.1:{theirs.server_port}"))
    assert not isinstance(absent.value, TurnedAway)


@contextmanager
def guarded(host: str = "127.0.0.1", path: str | None = None) -> Iterator[Address]:
    """A server behind a door that answers with what it was sent."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", scope["type"] == "http"
        while more:  # a large one comes in pieces
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(door.VARIABLE, SECRET)
        server = uvicorn.Server(
            uvicorn.Config(door.Door(echo), host, 0, uds=path, log_level="error", lifespan="off")
        )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = 0 if path else server.servers[0].sockets[0].getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        yield Address(f"http://{name}:{port}" if port else "http://engine", path or "", SECRET)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def stranger(answer: Callable[[bytes], bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """Somebody else at a port, who keeps what he is sent, and answers it so; his URL."""
    heard: list[bytes] = []

    def listen() -> None:
        while True:
            with suppress(OSError), listener.accept()[0] as line:
                if stop.is_set():
                    return
                line.settimeout(PATIENCE)
                heard.append(b"")
                with suppress(TimeoutError):
                    while not heard[-1].endswith(b"\r\n\r\n") and (data := line.recv(1 << 16)):
                        heard[-1] += data
                line.sendall(answer(heard[-1]))

    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
        finally:
            stop.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join()


def ours_at(url: str) -> httpx.Client:
    """A client that takes whoever is there for a server of ours."""
    return Address(url, secret=SECRET).client(timeout=PATIENCE)


@pytest.mark.unit
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "socket"])
def test_whoever_knows_the_secret_is_let_in_without_telling_it(host: str, tmp_path: Path) -> None:
    path = str(tmp_path / "http") if host == "socket" else None

    async def post(address: Address) -> str:
        async with address.async_client(timeout=PATIENCE) as client:
            answers = await asyncio.gather(*(client.post("/", content=f"{n}") for n in range(20)))
            return " ".join(answer.text for answer in answers)

    with guarded("127.0.0.1" if path else host, path) as address:
        with address.client(timeout=PATIENCE) as client:
            assert client.post("/weights?x=y", content=b"w" * 100_000).content == b"w" * 100_000
        assert asyncio.run(post(address)) == " ".join(map(str, range(20)))
        if not path:
            unknowing = Address(address.url, secret="another")
            with unknowing.client(timeout=PATIENCE) as client, pytest.raises(Unproven):
                client.get("/")


@pytest.mark.unit
@pytest.mark.parametrize(
    "answer",
    [
        b'HTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n{"weight_version": "1"}',
        b"HTTP/1.1 401 No\r\nwww-authenticate: Spell 00 00\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 401 No\r\nwww-authenticate: Bearer\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 401 No\r\nwww-authenticate: Spell \xff \xff \xff\r\ncontent-length: 0\r\n\r\n",
    ],
)
def test_a_stranger_at_the_port_learns_nothing(answer: bytes) -> None:
    with stranger(lambda _: answer) as (url, heard), ours_at(url) as client:
        for _ in range(2):
            with pytest.raises(Unproven, match="another run's server may have this port"):
                client.post("/init_weight_transfer_engine?to=there", content=b"the key of a group")
    assert len(heard) == 2
    assert len({_authorization(one) for one in heard}) == 2, "a nonce that is used again"
    for word in (SECRET.encode(), b"the key", b"init_weight", b"there"):
        assert word not in b"".join(heard)


@pytest.mark.unit
def test_a_stranger_who_asks_the_true_server_is_found_out() -> None:
    def relayed(request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0)) as line:
            line.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            return b"".join(iter(lambda: line.recv(1 << 16), b""))

    with guarded() as server, stranger(relayed) as (url, heard):
        with server.client(timeout=PATIENCE) as client:
            assert client.get("/").status_code == 200
        with ours_at(url) as client, pytest.raises(Unproven):
            client.get("/")
    assert heard


@pytest.mark.unit
def test_what_opened_one_door_opens_no_other() -> None:
    used: list[str] = []

    def keep(request: httpx.Request) -> None:
        used.append(request.headers["Authorization"])

    def again(address: Address) -> int:
        told = {"Authorization": used[-1]}
        return httpx.get(address.url, headers=told, trust_env=False, timeout=PATIENCE).status_code

    with guarded() as server, guarded() as other:
        with server.client(timeout=PATIENCE, event_hooks={"request": [keep]}) as client:
            client.get("/")
        assert used[-1].count(" ") == 2
        assert (again(server), again(other)) == (200, 401)


def _authorization(request: bytes) -> bytes:
    (found,) = re.findall(rb"(?i)\r\nauthorization: (.*?)\r\n", request)
    return found


@pytest.mark.unit
def test_folders_of_killed_servers_are_swept_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_folder, "_root", lambda: tmp_path)
    (tmp_path / "spell-notes").mkdir()
    (tmp_path / "spell-notes" / "thesis").write_text("mine")
    holder = subprocess.Popen(["sleep", "60"])
    try:
        with private_folder.make() as (dead, _):
            pass  # nobody inherited it
        with private_folder.make() as (living, lock):
            holder.kill()
            holder.wait()
            holder = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
        assert stat.S_IMODE(living.stat().st_mode) == 0o700
        private_folder.sweep()
        assert living.exists()
        assert not dead.exists()
        assert (tmp_path / "spell-notes" / "thesis").exists()
    finally:
        holder.kill()
        holder.wait()
    private_folder.sweep()
    assert not living.exists()


@pytest.mark.unit
@pytest.mark.parametrize("length", [40, 55, 56, 200])
def test_a_socket_fits_into_the_folder_whatever_the_temporary_one_is_called(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        temporary = Path(short, "x" * (length - len(short) - 1))
        temporary.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        with private_folder.make() as (folder, _), socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(folder / str(uuid.uuid4())))  # as vLLM names its own
        assert folder.is_relative_to(temporary) == (length <= 55)
        shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["socket", "port"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("doors")
    settings = RolloutConfig(
        dtype="float32", max_model_len=256, max_num_seqs=2, kv_cache_mib=32, servers=ServersConfig(count=1)
    )
    launch = Launch(
        make_model("qwen3", scratch / "model"), settings, scratch / "vllm", scratch / "log", "gloo", threads=1
    )
    port = 0 if request.param == "socket" else free_port("127.0.0.1")
    patch = pytest.MonkeyPatch()
    patch.chdir(traps.lay(scratch / "work"))
    started = Server.start(launch, port)
    patch.undo()
    try:
        with started.address.client(timeout=5.0) as client:
            while started.running() and not _healthy(client):
                pass
        assert started.running(), started.tail()
        assert not traps.sprung(scratch / "work"), "a file of the folder where the user works was imported"
        yield started
    finally:
        started.stop()


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").is_success
    except httpx.HTTPError:
        return False


@pytest.mark.engine
def test_no_route_answers_without_the_secret(server: Server) -> None:
    with server.address.client(timeout=30.0) as client:
        listed = client.get("/openapi.json").json()["paths"]
        assert client.get("/weight_info").json()["weight_version"]
        assert {"/collective_rpc", "/update_weights", "/inference/v1/generate"} <= set(listed)
    routes = [(method.upper(), path) for path, methods in listed.items() for method in methods]
    routes += [(method, path) for path in UNLISTED for method in ("GET", "POST", "OPTIONS")]
    for headers in ({}, {"Authorization": f"Bearer {'0' * 64}"}, {"Authorization": "Spell 00"}):
        nobody = Address(server.address.url, server.address.socket)
        with nobody.client(timeout=30.0, headers=headers) as client:
            for method, path in routes:
                answer = client.request(method, re.sub(r"{\w+}", "x", path))
                assert (answer.status_code, answer.content) == (401, b""), (method, path)
    assert server.running()


@pytest.mark.engine
def test_the_secret_is_on_no_command_line_and_in_no_log(server: Server) -> None:
    secret = server.address.secret.encode()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert secret not in process.read_bytes()
        except OSError:
            continue
    log = server.log.read_bytes()
    assert secret not in log
    assert b"GET /weight_info" not in log  # no line a request


@pytest.mark.engine
def test_another_user_reaches_neither_socket_nor_secret(server: Server) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    if not server.address.socket:
        pytest.skip("a port is there for all: its secret guards it")
    reach = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "def denied(what):\n"
        "    try: what()\n"
        "    except PermissionError: return True\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "print(denied(lambda: s.connect(sys.argv[1])), denied(lambda: os.listdir(os.path.dirname(sys.argv[1]))),"
        " denied(lambda: open(f'/proc/{sys.argv[2]}/environ').read()))"
    )
    command = [sys.executable, "-c", reach, server.address.socket, str(server.group)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3, done.stderr
