"""What every template must show, tried before a run starts: with samples of all that it will be asked to insert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from spell_megatron.types import Document

DOCUMENTS = (Document("1", "what-document-one-says", "its-title"), Document("2", "what-document-two-says"))
TEXTS = tuple(document.text for document in DOCUMENTS)


class Trial(NamedTuple):
    """A message made for a trial, what it is made of, and the texts that it must show."""

    of: str
    message: str
    wanted: Sequence[str]
