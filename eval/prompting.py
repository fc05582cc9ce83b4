"""From an item to the token ids that are sent, within an input limit.

The middle cut is the paper's: the first and the last half of the TEMPLATED prompt's ids, with no mark
at the seam. HELMET drops the tail of the context instead, and its authors never cut MRCR's conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from eval.benchmark import Cut, Item, Message
from spell_megatron.selfplay.reading.thoughts import opens_thought


class ChatCodec(Protocol):
    """What is needed of a tokenizer (`tokenizer.chat.ChatTokenizer`)."""

    def conversation(self, messages: Sequence[Message]) -> list[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def count(self, text: str) -> int: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids to send, None where the item does not fit; `whole` is the length before any cut."""

    ids: list[int] | None
    whole: int


def build(cut: Cut, item: Item, codec: ChatCodec, limit: int | None) -> Prompt:
    """Template, encode and cut one item. `limit` is in tokens, None for no limit."""
    ids = codec.conversation(item.messages)
    if limit is None or len(ids) <= limit:
        return Prompt(ids, len(ids))
    if cut == "middle":
        return Prompt(middle_cut(ids, limit), len(ids))
    return Prompt(_head_cut(item, codec, limit) if cut == "head" else None, len(ids))


def middle_cut(ids: Sequence[int], limit: int) -> list[int]:
    """The first and the last half of `limit` ids; of an odd limit the end has one more."""
    if len(ids) <= limit:
        return list(ids)
    front = limit // 2
    return [*ids[:front], *ids[len(ids) - (limit - front) :]]


def prefills_thinking(codec: ChatCodec) -> bool:
    """Whether the chat template itself opens `<think>` at the end of a prompt."""
    return opens_thought(codec.conversation(({"role": "user", "content": "?"},)), codec.decode)


def _head_cut(item: Item, codec: ChatCodec, limit: int) -> list[int] | None:
    """Drop tokens from the end of the context until the prompt fits; None if the rest alone is too long."""
    context = codec.encode(item.context)
    ids = codec.conversation(item.messages)
    keep = len(context)
    while len(ids) > limit:
        keep -= len(ids) - limit
        if keep <= 0:
            return None
        *before, last = item.messages
        content = last["content"].replace(item.context, codec.decode(context[:keep]), 1)
        ids = codec.conversation((*before, {**last, "content": content}))
    return ids
