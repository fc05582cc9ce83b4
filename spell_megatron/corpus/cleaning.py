"""Text made clean, and the two signs by which a repeated text is known."""

from __future__ import annotations

import re
import unicodedata
import zlib
from functools import cache
from hashlib import blake2b

import numpy as np

_BREAK = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
"""Whatever some system ends a line, a page or a record with."""
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x9f\ufeff]")
_BLANK = re.compile(r"\n{3,}")
_INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
"""What says where a word may be broken, or which way it runs."""

SHINGLE = 5
BANDS, ROWS = 4, 6
MIN_SHINGLES = 50
"""Shorter texts are only compared exactly: two price lists that differ in one figure are not the same."""

_MULTIPLIERS = np.random.default_rng(20250923).integers(1, 2**63, BANDS * ROWS, dtype=np.uint64) | np.uint64(
    1
)


TOGETHER = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Scripts that put no blank between words: Thai, Lao, Burmese, Khmer, kana and Chinese characters."""
_WORD = re.compile(rf"[{TOGETHER}]|[^\s{TOGETHER}]+")


def folded(text: str) -> str:
    """The same for texts that look alike but for case: composed, of one width, without what is invisible."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _marks().sub(r"\1", _INVISIBLE.sub("", text)))
    return text.casefold()


@cache
def _marks() -> re.Pattern[str]:
    """Thirty marks on one letter and more: no language writes so many, and sorting them takes the square of their
    number (Unicode Standard Annex 15, "stream-safe")."""
    marks = "".join(char for char in map(chr, range(0x300, 0x20000)) if unicodedata.combining(char))
    return re.compile(f"([{marks}]{{30}})[{marks}]+")


def split_words(text: str) -> list[str]:
    """What stands between blanks, as it looks; each character of a script that has none."""
    return _WORD.findall(folded(text))


def clean(text: str) -> str:
    """Unix line ends, no control characters, no trailing spaces, at most one blank line in a row."""
    text = _BREAK.sub("\n", text.encode("utf-8", "replace").decode("utf-8")).replace("\x1f", " ")
    text = _CONTROL.sub("", text)
    return _BLANK.sub("\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip("\n")


def fingerprint(text: str) -> int:
    """64 bits that are equal for texts that look alike but for case and white space."""
    normal = " ".join(folded(text).split())
    return int.from_bytes(blake2b(normal.encode(), digest_size=8).digest(), "big", signed=True)


def sketch(text: str) -> list[int]:
    """MinHash bands over shingles of five words; texts that share one band are near-duplicates.

    With 4 bands of 6 rows, texts of Jaccard similarity 0.95 / 0.9 / 0.8 / 0.5 share a band with
    probability 0.995 / 0.95 / 0.70 / 0.06 (Broder 1997). Empty for short texts.
    """
    plain = split_words(text)
    count = len(plain) - SHINGLE + 1
    if count < MIN_SHINGLES:
        return []
    words = np.array([zlib.crc32(word.encode()) for word in plain], dtype=np.uint64)
    shingles = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE):
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + count]
    shingles ^= shingles >> np.uint64(29)
    minima = np.array([((shingles * m) >> np.uint64(20)).min() for m in _MULTIPLIERS], dtype=np.uint64)
    return [
        int.from_bytes(
            blake2b(
                minima[band * ROWS : (band + 1) * ROWS].tobytes(), digest_size=8, salt=bytes([band])
            ).digest(),
            "big",
            signed=True,
        )
        for band in range(BANDS)
    ]
