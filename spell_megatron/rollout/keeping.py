"""What a fleet and those who keep its servers up on other nodes tell each other: files of the run's folder.

Such a server is no child of the trainer's, which can neither end one that hangs nor learn that one is given up.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

_PATIENCE_SECONDS = 90.0
"""For an end that is asked for: a process takes some seconds, and NFS shows another node's files a minute late."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Keeping:
    """One server of an attempt at the run, by its URL. The fleet has `end`, the keeper `asked_to_end` and `ended`;
    either may give it up."""

    folder: Path
    attempt: str
    url: str

    async def end(self) -> bool:
        """Have it ended, and another started in its place when there is room; whether the keeper did so in time."""
        self._asked.touch()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._asked.exists():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    @property
    def given_up(self) -> bool:
        """Whether it will not be started again."""
        return self._lost.exists()

    @property
    def asked_to_end(self) -> bool:
        return self._asked.exists()

    def ended(self) -> None:
        """What was asked is done; or was about a process that has ended by itself."""
        self._asked.unlink(missing_ok=True)

    def give_up(self) -> None:
        self._lost.touch()

    @property
    def _asked(self) -> Path:
        return self._file("end")

    @property
    def _lost(self) -> Path:
        return self._file("lost")

    def _file(self, word: str) -> Path:
        return self.folder / f".engine-{self.attempt}-{urlsplit(self.url).netloc.replace(':', '-')}.{word}"
