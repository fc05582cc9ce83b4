"""No text is a command: added tokens of a tokenizer, and texts in which none of them is read.

A tokenizer reads its added tokens off any text that spells them, whether they are flagged special or not: a
document could open a turn (`<｜User｜>`), a thought (`<think>`) or a tool call. Which texts spell one depends on the
tokenizer's own normalisation (NFKC, lower case, blanks as `▁`) and on what stands beside them. So nothing is
compared here: the tokenizer itself is asked, and what it reads as a command is broken by a blank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

_ROUNDS = 8
"""Tries to break a text by blanks; what is read as a command after that is taken out."""
_PADS = ("{}", " {} ", ". {} .")
"""What keeps the ends of a text apart from a template that joins with them; the first that does is used."""


class Commands:
    """`ids` are the added tokens of a tokenizer that are not white space."""

    def __init__(self, hf: PreTrainedTokenizerBase) -> None:
        self._hf = hf
        self._names = {
            token: added.content
            for token, added in hf.added_tokens_decoder.items()
            if added.content.replace("\u2581", " ").strip()
        }
        self.ids = frozenset(self._names)

    def of(self, tokens: Sequence[int]) -> list[int]:
        """The commands among tokens, in order."""
        return [token for token in tokens if token in self.ids]

    def safe(self, contents: Sequence[str], encode: Callable[[Sequence[str]], list[int]]) -> list[int]:
        """`encode(contents)`, with the texts changed where they would add commands to those of the template.

        The template's own commands are those that it renders around texts without any. A template that itself
        answers a text with commands gets the texts in which none is read.
        """
        wanted = self.of(encode(["x" if content.strip() else "" for content in contents]))
        tokens = encode(contents)
        if self.of(tokens) == wanted:
            return tokens
        broken = [self.broken(content) for content in contents]
        attempts = (encode([pad.format(content) for content in broken]) for pad in _PADS)
        first = next(attempts)
        return next((found for found in (first, *attempts) if self.of(found) == wanted), first)

    def broken(self, text: str) -> str:
        """The text with a blank in everything that the tokenizer reads as a command."""
        for number in range(2 * _ROUNDS):
            spans = list(self._spans(text))
            if not spans:
                break
            parts, behind = [], 0
            for start, end in spans:
                kept = text[start:end] if number < _ROUNDS and end - start > 1 else ""
                parts += [text[behind:start], kept[:1], " ", kept[1:]]
                behind = end
            text = "".join([*parts, text[behind:]])
        return text

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where commands stand in a text, in order and apart from each other."""
        if self._hf.is_fast:
            read = self._hf(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            places = zip(read["input_ids"], read["offset_mapping"], strict=True)
            found = [span for token, span in places if token in self.ids]
        else:  # no offsets: their names, longest first
            names = sorted(self._names.values(), key=len, reverse=True)
            found = [match.span() for match in re.finditer("|".join(map(re.escape, names)), text)]
        behind = 0
        for start, end in found:
            start += len(text[start:end]) - len(
                text[start:end].lstrip()
            )  # blanks that the token takes with it
            if start >= behind and end > start:
                behind = end
                yield start, end
