"""A run, watched while it goes on: one page from the run's files alone, served to this machine.

It changes nothing and knows nothing that is not in the folder, so it may start and end at any time, beside a run or
after it. Model output is shown: it is text, escaped, and the page may run one script, its own, and fetch from nowhere
else. Whoever does not know the secret in the address is shown nothing, since other users reach this machine, too.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from tokenizers import Tokenizer

from spell_megatron.config import Config, load_config
from spell_megatron.run.record.folder import RunFolder
from spell_megatron.run.record.metrics import Row, read_metrics
from spell_megatron.run.record.newest import Newest
from spell_megatron.run.record.panels import Section, sections
from spell_megatron.run.record.report import page_environment, tiles
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.roles import ROLES
from spell_megatron.selfplay.tasks import TASKS
from spell_megatron.types import SpellError
from spell_megatron.weights.locate import local_folder

SHOWN = 12
"""Episodes on the page."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_SCRIPT = Path(__file__).with_name("watch.js")


@dataclass
class Watched:
    """What there is to see of a run. `page` looks anew each time, and draws the curves only after a new step."""

    folder: RunFolder
    config: Config
    newest: Newest = field(init=False)
    _sections: list[Section] = field(default_factory=list)
    _drawn: tuple[int, float | None] = (0, None)
    _drawing: threading.Thread | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.newest = Newest(self.folder)

    def page(self, role: str = "", task: str = "", outcome: str = "") -> str:
        with self._lock:  # requests come on several threads
            self.newest.read()
            rows = read_metrics(self.folder)
            episodes = [e for e in reversed(self.newest.episodes) if _fits(e, role, task, outcome)]
            roles = dict.fromkeys((*ROLES, *(turn.role for e in self.newest.episodes for turn in e.turns)))
            outcomes = sorted({episode.outcome for episode in self.newest.episodes} | {outcome} - {""})
            return (
                page_environment()
                .get_template("watch.html.j2")
                .render(
                    name=self.folder.path.name,
                    tiles=tiles(rows),
                    sections=self._curves(rows),
                    progress=self._progress(int(rows[-1]["step"] or 0) if rows else 0),
                    episodes=[(episode, self._evidence(episode)) for episode in episodes[:SHOWN]],
                    roles=[role] if role else roles,
                    chosen={"role": role, "task": task, "outcome": outcome},
                    filters=[
                        ("Role", "role", roles),
                        ("Task", "task", dict.fromkeys((*TASKS, *(e.task for e in self.newest.episodes)))),
                        ("Outcome", "outcome", outcomes),
                    ],
                )
            )

    def _curves(self, rows: list[Row]) -> list[Section]:
        """The curves as they were drawn last. New ones are begun, which takes seconds, and are there another time."""
        mark = (len(rows), rows[-1]["time"] if rows else None)
        if mark != self._drawn and not (self._drawing and self._drawing.is_alive()):
            self._drawn = mark
            self._drawing = threading.Thread(target=self._draw, args=(rows,), daemon=True)
            self._drawing.start()
        return self._sections

    def _draw(self, rows: list[Row]) -> None:
        self._sections = sections(rows) if rows else []

    def _progress(self, done: int) -> dict[str, Any]:
        steps = self.config.steps
        step = min(steps, max([done + (done < steps), *self.newest.folder.recorded_steps[-1:]]))
        outcomes = self.newest.outcomes(step)
        return {
            "step": step,
            "steps": steps,
            "done": done,
            "needed": self.config.selfplay.questions,
            "kept": outcomes["kept"],
            "asked": outcomes.total(),
            "heard": _heard(self.folder),
        }

    def _evidence(self, episode: Episode) -> str:
        """What the questioner read; empty where the run's tokenizer is not here."""
        tokenizer = _tokenizer(self.config.model.path)
        if tokenizer is None or episode.asked is None:
            return ""
        return str(tokenizer.decode(list(episode.asked.prompt), skip_special_tokens=False))


def application(watched: Watched, secret: str, hosts: Sequence[str]) -> Starlette:
    """The pages, below `/<secret>/`; asked for by one of these host names alone, which no foreign page can forge."""

    def page(request: Request) -> Response:
        asked = {key: request.query_params.get(key, "") for key in ("role", "task", "outcome")}
        return HTMLResponse(watched.page(**asked), headers=_HEADERS)

    def script(request: Request) -> Response:
        return Response(_SCRIPT.read_bytes(), media_type="text/javascript", headers=_HEADERS)

    return Starlette(
        routes=[Route(f"/{secret}/", page), Route(f"/{secret}/watch.js", script)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )


def names_of(host: str) -> list[str]:
    """What stands in the address of a page that is served at `host`: where that is all addresses, the machine's names
    and what they stand for."""
    if host not in ("0.0.0.0", "::"):
        return [_literal(host)]
    name = socket.gethostname()
    with suppress(OSError):
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
        return [name, socket.getfqdn(), *sorted(map(_literal, found))]
    return [name, socket.getfqdn()]


def _literal(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def watch(run: Path, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve a run's page until interrupted; `tell` gets its address. Raises SpellError."""
    import uvicorn

    folder = RunFolder.open(run)
    secret = secrets.token_urlsafe(16)
    names = names_of(host)
    app = application(
        Watched(folder, load_config(str(folder.config))), secret, ["localhost", "127.0.0.1", "[::1]", *names]
    )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, port))
        except OSError as error:
            raise SpellError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
            ) from None
        tell(f"http://{names[0]}:{door.getsockname()[1]}/{secret}/")
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        )
        server.run(sockets=[door])


def _fits(episode: Episode, role: str, task: str, outcome: str) -> bool:
    spoke = {"", *(name for name, _ in episode.rollouts())}
    return role in spoke and task in ("", episode.task) and outcome in ("", episode.outcome)


def _heard(folder: RunFolder) -> str:
    """How long ago the run wrote something."""
    written = [folder.metrics, folder.log, *(folder.rollouts(step) for step in folder.recorded_steps[-1:])]
    times = [path.stat().st_mtime for path in written if path.exists()]
    if not times:
        return "Nothing was written yet."
    minutes = (time.time() - max(times)) / 60
    return "Heard of within the last minute." if minutes < 1 else f"Not heard of for {minutes:.0f} minutes."


@cache
def _tokenizer(model: str) -> Tokenizer | None:
    """By itself, without transformers: the page is there at once."""
    folder = local_folder(model)
    file = folder / "tokenizer.json" if folder else None
    return Tokenizer.from_file(str(file)) if file and file.is_file() else None
