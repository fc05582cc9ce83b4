"""The step's finished episodes, written down the moment they finish.

What is in the journal is never generated twice: a resumed step reads it and goes on from there, unless it is another
run's by then (`record/stale.py`).
"""

from __future__ import annotations

import json

from spell_megatron.run.record.folder import JsonLines, RunFolder, read_lines, replace_text
from spell_megatron.selfplay.episode import Episode


class Journal:
    """Episodes of one step, one JSON object a line. Raises SpellError where it cannot be written."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        self.path = folder.rollouts(step)
        self._lines = JsonLines(self.path)

    def append(self, episode: Episode) -> None:
        """Survives the end of this process; `sync` makes it survive the machine's."""
        self._lines.append(episode.to_dict())

    def read(self) -> list[Episode]:
        """Episodes in the order of their completion; one that was cut short is dropped with a warning."""
        return [Episode.from_dict(row) for row in read_lines(self.path)]

    def forget(self, outcome: str) -> None:
        """Have the episodes that ended so asked anew."""
        rows = list(read_lines(self.path))
        kept = [row for row in rows if row.get("outcome") != outcome]
        if len(kept) < len(rows):
            replace_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def sync(self) -> None:
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()
