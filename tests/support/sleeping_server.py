"""A server that knows when its memory is there: it speaks vLLM's routes and notes what touches memory that sleeps.

    python tests/support/sleeping_server.py VIOLATIONS ORDERS [vLLM's own arguments: --host, --port, --uds]

It has neither a GPU nor a model. `ORDERS` is a folder; a file in it, named after a route, says what becomes of the
next request there: `die`, `refuse` or `hang`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

ALL = frozenset({"weights", "kv_cache"})


class Engine:
    """Memory and weights of one process, as vLLM 0.32 has them."""

    def __init__(self, violations: Path) -> None:
        self._violations = violations
        self.awake = ALL
        self.whole = True
        """Whether the weights are what somebody loaded."""
        self.paused = self.updating = False
        self.version = "start"

    def needs(self, memory: frozenset[str], what: str) -> None:
        if missing := memory - self.awake:
            self.violated(f"{what} while {', '.join(sorted(missing))} sleeps")

    def violated(self, what: str) -> None:
        with self._violations.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}: {what}\n")

    async def weight_info(self, request: Request) -> dict[str, Any]:
        self.needs(frozenset({"weights"}), "a probe")
        return {"weight_version": self.version}

    async def world_size(self, request: Request) -> dict[str, Any]:
        return {"world_size": 1}

    async def pause(self, request: Request) -> dict[str, Any]:
        self.paused = True
        return {}

    async def resume(self, request: Request) -> dict[str, Any]:
        self.needs(ALL, "scheduling goes on")
        self.paused = False
        return {}

    async def sleep(self, request: Request) -> dict[str, Any]:
        if self.updating:
            self.violated("sleep in the middle of an update")
        if request.query_params.get("level") == "2":
            self.whole = False
        self.awake, self.paused = frozenset(), True
        return {}

    async def wake_up(self, request: Request) -> dict[str, Any]:
        tags = frozenset(request.query_params.getlist("tags") or ALL)
        if tags & self.awake:
            self.violated(f"{', '.join(sorted(tags & self.awake))} woken twice")
        self.awake |= tags
        if self.awake == ALL:
            self.paused = False
        return {}

    async def start_update(self, request: Request) -> dict[str, Any]:
        self.needs(frozenset({"weights"}), "an update begins")
        self.updating = True
        return {}

    async def update(self, request: Request) -> dict[str, Any]:
        self.needs(frozenset({"weights"}), "weights arrive")
        return {}

    async def finish_update(self, request: Request) -> dict[str, Any]:
        self.needs(frozenset({"weights"}), "an update ends")
        body = await request.body()
        version = json.loads(body).get("weight_version") if body else None
        self.updating = False
        if version is not None:
            self.version, self.whole = version, True
        return {}

    async def label(self, request: Request) -> dict[str, Any]:
        self.version = (await request.json())["new_version"]
        return {}

    async def nothing(self, request: Request) -> dict[str, Any]:
        return {}

    async def generate(self, request: Request) -> dict[str, Any]:
        self.needs(ALL, "a request comes")
        if not self.whole:
            self.violated("a request is answered by weights that were given up")
        while self.paused:
            await asyncio.sleep(0.01)
        return {
            "choices": [
                {
                    "finish_reason": "stop",
                    "token_ids": [1, 2],
                    "weight_versions": [{"version": self.version, "start": 0, "end": 2}],
                    "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -1.0}]},
                }
            ]
        }


ROUTES = {
    ("GET", "/health"): Engine.nothing,
    ("GET", "/weight_info"): Engine.weight_info,
    ("GET", "/get_world_size"): Engine.world_size,
    ("POST", "/pause"): Engine.pause,
    ("POST", "/resume"): Engine.resume,
    ("POST", "/sleep"): Engine.sleep,
    ("POST", "/wake_up"): Engine.wake_up,
    ("POST", "/init_weight_transfer_engine"): Engine.nothing,
    ("POST", "/shutdown_weight_transfer_engine"): Engine.nothing,
    ("POST", "/start_weight_update"): Engine.start_update,
    ("POST", "/update_weights"): Engine.update,
    ("POST", "/finish_weight_update"): Engine.finish_update,
    ("POST", "/update_weight_version"): Engine.label,
    ("POST", "/reset_prefix_cache"): Engine.nothing,
    ("POST", "/inference/v1/generate"): Engine.generate,
}


class Orders(BaseHTTPMiddleware):
    """Has a request die, fail or hang where a file says so."""

    folder: Path

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        order = self.folder / request.url.path.strip("/").replace("/", "-")
        try:
            what = order.read_text()
            order.unlink()
        except FileNotFoundError:
            return await call_next(request)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            await asyncio.sleep(60)
        return JSONResponse({"error": "as ordered"}, 500)


def app(violations: Path, orders: Path) -> Starlette:
    engine = Engine(violations)

    def endpoint(method: Any) -> Any:
        async def answer(request: Request) -> Response:
            return JSONResponse(await method(engine, request))

        return answer

    routes = [Route(path, endpoint(method), methods=[verb]) for (verb, path), method in ROUTES.items()]
    made = Starlette(routes=routes)
    Orders.folder = orders
    made.add_middleware(Orders)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("violations", type=Path)
    parser.add_argument("orders", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--uds", default=None)
    given, _ = parser.parse_known_args()
    where = {"uds": given.uds} if given.uds else {"host": given.host, "port": given.port}
    uvicorn.run(app(given.violations, given.orders), log_level="error", **where)


if __name__ == "__main__":
    main()
