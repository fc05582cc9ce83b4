"""A proxy between a client and an HTTP server that lets some requests fail.

One connection carries one request (the proxy asks the server to close it), so that bytes can be passed on
unread. `strikes` is asked for every request, with its server and path, what shall become of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from spell_megatron.rollout.address import Address

Fault = Literal["", "error", "reset", "half"]
"""Pass it on; answer 500; reset the connection; let the server work, and reset before its answer is out."""


class Proxies:
    """Proxies in an event loop of their own. Use `proxies()`."""

    def __init__(self, strikes: Callable[[str, str], Fault]) -> None:
        self._strikes, self._fronts = strikes, list[asyncio.Server]()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True).start()

    def front(self, address: Address) -> Address:
        """The address of a new proxy for the server at `address`, a Unix socket as that is."""

        path = f"{address.socket}-{len(self._fronts)}.proxy"

        async def start() -> None:
            self._fronts.append(
                await asyncio.start_unix_server(
                    lambda reader, writer: self._serve(address, reader, writer), path, backlog=512
                )
            )

        self._run(start())
        return Address(address.url, path, address.secret)

    def close(self) -> None:
        self._run(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(
        self, address: Address, client: asyncio.StreamReader, answer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await client.readuntil(b"\r\n\r\n")
            line, *fields = head.decode().split("\r\n")
            length = next(
                (int(f.split(":")[1]) for f in fields if f.lower().startswith("content-length:")), 0
            )
            body = await client.readexactly(length)
            fault = self._strikes(str(address), line.split()[1])
            if fault == "error":
                answer.write(b"HTTP/1.1 500 Broken\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            elif fault != "reset":
                kept = [f for f in fields if f and not f.lower().startswith("connection:")]
                request = "\r\n".join([line, *kept, "connection: close", "", ""]).encode() + body
                await _exchange(address, request, client, answer, cut=10 if fault == "half" else None)
            if fault in ("reset", "half"):
                _reset(answer)
        with contextlib.suppress(OSError):
            answer.close()


async def _exchange(
    address: Address,
    request: bytes,
    client: asyncio.StreamReader,
    answer: asyncio.StreamWriter,
    cut: int | None,
) -> None:
    """Pass a request on and its answer back, the first `cut` bytes of it or all, until either end closes."""
    reader, writer = await asyncio.open_unix_connection(address.socket)
    try:
        writer.write(request)
        passing = asyncio.create_task(_pass_on(reader, answer, cut))
        leaving = asyncio.create_task(client.read())
        await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
        for task in (passing, leaving):
            task.cancel()
        await asyncio.gather(passing, leaving, return_exceptions=True)
    finally:
        writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: int | None) -> None:
    while data := await reader.read(cut or 1 << 16):
        writer.write(data)
        await writer.drain()
        if cut:
            return


def _reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextmanager
def proxies(strikes: Callable[[str, str], Fault]) -> Iterator[Proxies]:
    made = Proxies(strikes)
    try:
        yield made
    finally:
        made.close()
