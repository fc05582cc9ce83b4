"""Texts of a source, one at a time: a corpus may be far larger than memory.

    places   which files a folder, a path or a hub id stands for
    opened   their bytes, decompressed, with an end to what a small file may become
    files    one reader for each type of file
    rows     which column of a row is a text

What cannot be used is skipped with a reason, counted, and never stops the others. Nothing that is read is whole in
memory: a text, a row or a file beyond `PART` comes in parts, each a text of the same cluster.
"""

from __future__ import annotations

from collections.abc import Iterator

from spell_megatron.config import SourceConfig
from spell_megatron.corpus.reading.files import read_file
from spell_megatron.corpus.reading.places import places
from spell_megatron.corpus.reading.text import Skipped, Text

__all__ = ["Skipped", "Text", "read"]


def read(source: SourceConfig, skipped: Skipped) -> Iterator[Text]:
    """Every text of a folder, a file or a hub data set, in a fixed order.

    Raises SpellError where the path does not exist or the hub cannot be reached.
    """
    for place in places(source.path, skipped):
        for text in read_file(place, source, skipped):
            yield text.plain()
