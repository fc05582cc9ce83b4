"""An append-only JSON Lines file of everything that was answered, so that nothing is asked twice.

A line is written the moment an answer arrives. A run that is killed leaves at most one half line,
which the next run cuts off. Two runs cannot write to one journal at the same time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any

from spell_megatron.types import SpellError

Record = dict[str, Any]
_log = logging.getLogger(__name__)


def key_of(*parts: Any) -> str:
    """A short digest of JSON values that names one request with everything that its answer depends on."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:24]


class KeyedJournal:
    """Records by key. Use as a context manager; `damaged` counts lines that could not be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self._records: dict[str, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise SpellError(
                f"{path} is being written by another run: wait for it, or give another --out"
            ) from None
        except OSError as error:  # some file servers have no locks
            _log.warning("%s cannot be locked (%s): let no other run write to it", path, error.strerror)
        self._read()

    def __enter__(self) -> KeyedJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def append(self, key: str, record: Record) -> None:
        line = json.dumps({"key": key, **record}, ensure_ascii=False)
        self._file.write(line.encode("utf-8", "replace") + b"\n")
        self._file.flush()
        self._records[key] = record

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                record = json.loads(line)
                self._records[record.pop("key")] = record
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                self.damaged += 1
        self._file.truncate(whole)
