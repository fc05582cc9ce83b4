"""The texts of questions: of every kind, with so many links as are wanted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from spell_megatron.corpus.hard import reading as forms
from spell_megatron.corpus.hard.grammar import LINKS, MEASURES, PRICE, RELATIONS, TRAITS
from spell_megatron.corpus.hard.reading import Knowledge, Stated, solve

_TRIES = 8
"""Ways that are looked at for one with a fact of the wanted kind at its end."""


@dataclass(frozen=True)
class Way:
    """A subject by way of links: `the owner of Acorn Books`, and who that is."""

    text: str
    end: str


class Texts:
    """Writes questions about what was read; a method gives None where nothing of its kind can be asked.

    Of several subjects one is at the end of a way with all the links, and the others are named.
    """

    def __init__(self, reading: Knowledge, rng: random.Random, links: int) -> None:
        self._reading, self._rng, self._links = reading, rng, links

    def value(self) -> str | None:
        """A trait, or a further link."""
        way, fact = self._last([relation.name for relation in (*TRAITS, *LINKS)])
        if fact is None:
            return None
        relation = RELATIONS[fact.relation]
        form = self._rng.choice([forms.WHAT, *relation.questions])
        return form.format(r=self._rng.choice(relation.nouns), s=way.text)

    def number(self) -> str | None:
        way, fact = self._last(self._measures)
        return f"What is {_quantity(way, fact)}?" if fact else None

    def sum(self) -> str | None:
        """The sum of two or three numbers of a kind, or the difference of two, which is never zero."""
        way, fact = self._last(self._measures)
        if fact is None:
            return None
        kind, differs = fact.relation.split()[0], self._rng.random() < 0.5
        alike = [one for one in self._reading.facts.values() if one.relation.split()[0] == kind]
        others = self._some(
            [one for one in alike if one != fact and not (differs and one.value == fact.value)],
            1 if differs else 2,
        )
        if not others:
            return None
        quantities = [
            _quantity(way, fact),
            *(_quantity(Way(one.subject, one.subject), one) for one in others),
        ]
        form = self._rng.choice(forms.DIFFERENCES if differs else forms.SUMS)
        return form.format(q=self._listed(quantities, "and"))

    def comparison(self) -> str | None:
        """Who of two to four has the most or the least of something."""
        way, fact = self._last(self._measures)
        if fact is None:
            return None
        others = self._some([one for one in self._reading.of(fact.relation) if one.subject != way.end], 3)
        if not others:
            return None
        form = self._rng.choice((forms.HIGHEST, forms.LOWEST))
        members = [way.text, *(one.subject for one in others)]
        return form.format(m=fact.relation, l=self._listed(members, "or"))

    def keys(self) -> str | None:
        """A key that is as many links from the answer to its question."""
        texts = [forms.KEYS.format(k=key) for key in self._reading.keys]
        met = [text for text in texts if (found := solve(self._reading, text)) and found.links == self._links]
        return self._rng.choice(met) if met else None

    @cached_property
    def _ways(self) -> list[Way]:
        """Every way from a subject to one with facts, one link less than wanted, through no subject twice."""

        def onward(way: Way, met: tuple[str, ...]) -> Iterator[Way]:
            if len(met) == self._links:
                yield way
                return
            for link in LINKS:
                fact = self._reading.facts.get((way.end, link.name))
                if fact and fact.value in self._reading.subjects and fact.value not in met:
                    text = f"the {self._rng.choice(link.nouns)} of {way.text}"
                    yield from onward(Way(text, fact.value), (*met, fact.value))

        return [way for s in self._reading.subjects for way in onward(Way(s, s), (s,))]

    @cached_property
    def _measures(self) -> list[str]:
        """Names of the relations that are numbers; a price is one for every item."""
        named = dict.fromkeys(relation for _, relation in self._reading.facts)
        return [
            *(measure.name for measure in MEASURES),
            *(name for name in named if name.startswith(PRICE.name)),
        ]

    def _last(self, relations: Sequence[str]) -> tuple[Way, Stated] | tuple[Way, None]:
        """A way and a fact of one of the relations at its end."""
        for way in self._rng.sample(self._ways, min(len(self._ways), _TRIES)):
            facts = [fact for name in relations if (fact := self._reading.facts.get((way.end, name)))]
            if facts:
                return way, self._rng.choice(facts)
        return Way("", ""), None

    def _some(self, facts: Sequence[Stated], most: int) -> list[Stated]:
        return self._rng.sample(facts, min(self._rng.randint(1, most), len(facts)))

    def _listed(self, parts: list[str], word: str) -> str:
        self._rng.shuffle(parts)
        return f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def _quantity(way: Way, fact: Stated) -> str:
    return f"the {fact.relation} {'at' if fact.relation.startswith(PRICE.name) else 'of'} {way.text}"
