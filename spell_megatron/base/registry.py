"""Records by their names: what is shipped, and what a recipe brings by import path. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from spell_megatron.base.imports import imported
from spell_megatron.config.explaining import nearest
from spell_megatron.types import SpellError


class Named(Protocol):
    @property
    def name(self) -> str: ...


Record = TypeVar("Record", bound=Named)


class Registry(Mapping[str, Record]):
    """Records of one kind ("task"), each under its own name, in the order that they came."""

    def __init__(self, kind: str, record: type[Record], shipped: Iterable[Record]) -> None:
        self._kind, self._record = kind, record
        self._records = {one.name: one for one in shipped}
        self._imported: dict[str, Record] = {}
        self.shipped = tuple(self._records)

    def find(self, reference: str, key: str) -> Record:
        """The record of a name, or of an import path `package.module:Name`, which has its name from then on.

        `key` is where the reference is written ("corpus.sources.tasks"). Raises SpellError for an unknown name, a path
        that leads to no record, and a record under a name that another one has.
        """
        if ":" not in reference:
            if reference in self._records:
                return self._records[reference]
            raise SpellError(
                f"{key}: no {self._kind} {reference!r}{nearest(reference, self._records, cutoff=0.4)}; there are"
                f" {', '.join(self._records)}, and your own by its import path, package.module:Name"
            )
        if reference not in self._imported:
            self._imported[reference] = self._admitted(reference, key)
        return self._imported[reference]

    def _admitted(self, reference: str, key: str) -> Record:
        found = imported(reference, self._record, key)
        known = self._records.setdefault(found.name, found)
        # What a class of the user's own makes is the same each time; of records as they come, one is one.
        alike = type(known) is type(found) is not self._record
        if found.name in self.shipped or not (known is found or alike):
            raise SpellError(
                f"{key}: {reference} calls itself {found.name!r}, and so does another {self._kind}: rename it"
            )
        return known

    def __getitem__(self, name: str) -> Record:
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)
