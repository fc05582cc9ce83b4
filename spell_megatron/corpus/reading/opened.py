"""The bytes of a file, decompressed, with an end to what a small file may become.

A few kilobytes can unfold to any size. Text shrinks by a factor of two to twenty, logs by a hundred; what unfolds to
more than that is no text.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

FREE = 64 << 20
"""Bytes that any file may unfold to."""
RATIO = 200
"""Beyond that, at most so many times its size."""
_BUFFER = 1 << 20
_XZ_MEMORY = 256 << 20
"""Bytes of dictionary that an .xz file may ask for; `xz -9` asks for 65 MiB."""

BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
"""What damaged data raise, besides OSError."""


_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class UnfoldsTooFar(Exception):
    """A compressed file grows beyond measure."""


def split_compression(name: str) -> tuple[str, str]:
    """A file's name without the ending of its compression, and that ending: `a.JSONL.GZ` is `a.JSONL`, `.gz`."""
    suffix = Path(name).suffix.lower()
    return (name[: -len(suffix)], suffix) if suffix in _OPENERS else (name, "")


def opened(path: Path) -> io.BufferedReader:
    """A file for reading from its start. Raises what `BROKEN` names, OSError, or UnfoldsTooFar, while it is read."""
    _, suffix = split_compression(path.name)
    if not suffix:
        return io.BufferedReader(io.FileIO(path), _BUFFER)
    bound = max(FREE, RATIO * path.stat().st_size)
    return io.BufferedReader(_Bounded(_OPENERS[suffix](path), bound), _BUFFER)


def encoding(start: bytes) -> str:
    """Of a text that begins so: UTF-16 where it has that byte-order mark, else UTF-8."""
    wide = start.startswith(_UTF16) and not start.startswith(codecs.BOM_UTF32_LE)
    return "utf-16" if wide else "utf-8-sig"


class _Bounded(io.RawIOBase):
    """A stream that ends with an error behind so many bytes."""

    def __init__(self, stream: BinaryIO, bound: int) -> None:
        self._stream, self._bound = stream, bound

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        block = self._stream.read(len(view := memoryview(cast(bytearray, buffer))))
        view[: len(block)] = block
        self._bound -= len(block)
        if self._bound < 0:
            raise UnfoldsTooFar
        return len(block)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Xz(io.RawIOBase):
    """`lzma.open` with a limit on the memory that the data ask for."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decompressor = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        while True:
            if self._decompressor.eof:  # perhaps another stream follows
                rest = self._decompressor.unused_data or self._file.read(1 << 16)
                if not rest.strip(b"\0"):
                    return 0
                self._decompressor = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
                block = self._decompressor.decompress(rest, len(view))
            else:
                more = self._file.read(1 << 16) if self._decompressor.needs_input else b""
                if not more and self._decompressor.needs_input:
                    raise EOFError("the file ends in the middle of its data")
                block = self._decompressor.decompress(more, len(view))
            if block:
                view[: len(block)] = block
                return len(block)

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstd(path: Path) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": _Xz,
    ".zst": _zstd,
}
