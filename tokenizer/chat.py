"""The chat format of any Hugging Face tokenizer folder, as self-play uses it (`selfplay.ports.Codec`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spell_megatron.base.bounded import Bounded, TooMuch, WorkFailed
from spell_megatron.types import SpellError, Tokens
from tokenizer.control import Commands
from tokenizer.ends import end_tokens

THINKING = frozenset(("<think>", "</think>"))
"""Tags that are part of what a model wrote, however a tokenizer flags them."""
_SECONDS, _MEMORY = 10.0, 1 << 30
"""What rendering one conversation may take."""
_LONGEST_TEMPLATE = 1 << 20
_PROBE = "The cat sat on 12 mats."


class ChatTokenizer:
    """Text to token ids and back.

    `thinking` is handed to the chat template (`enable_thinking`), which templates of hybrid models
    read and others ignore. Where a template leaves the opening `<think>` to the prompt, the model
    writes only the rest; `decode` gives what the model wrote.
    """

    def __init__(self, hf: PreTrainedTokenizerBase, eos_ids: tuple[int, ...], thinking: bool = False) -> None:
        self._hf = hf
        self._thinking = thinking
        self.eos_ids = eos_ids
        """Ids that end a completion."""
        self.vocab_size = len(hf)
        self._commands = Commands(hf)
        special = {token: added.content for token, added in hf.added_tokens_decoder.items() if added.special}
        self.hides_thinking = not THINKING.isdisjoint(special.values())
        """Whether the tags of thought are flagged special, so that whoever leaves special tokens out loses them."""
        self._hidden = frozenset(token for token, name in special.items() if name not in THINKING)

    @classmethod
    def load(cls, folder: str | Path, thinking: bool = False) -> ChatTokenizer:
        """The tokenizer of a model folder; SpellError where it is missing, broken or has no chat template."""
        folder = Path(folder)
        if not folder.is_dir():
            raise SpellError(f"no model folder {folder}: give the path of a folder with tokenizer files")
        try:
            hf = _faithful(folder)
        except Exception as error:  # transformers raises many kinds for one broken file
            raise SpellError(f"cannot read the tokenizer in {folder}: {error}") from error
        if not hf.chat_template:
            raise SpellError(
                f"the tokenizer in {folder} has no chat template: use an instruction-tuned model, or write the template"
                " of one into chat_template.jinja of a copy of the folder"
            )
        if len(template := str(hf.chat_template)) > _LONGEST_TEMPLATE:
            raise SpellError(
                f"the chat template in {folder} has {len(template):,} characters: that is no template"
            )
        made = cls(hf, end_tokens(folder, (hf.eos_token_id, *_turn_end(hf))), thinking)
        try:
            shown = made._templated([{"role": "user", "content": _PROBE}])
        except Exception as error:  # whatever a template raises
            raise SpellError(f"the chat template of {folder} fails on a user's message: {error}") from error
        if _PROBE not in shown or not made.encode(_PROBE):
            raise SpellError(f"the tokenizer of {folder} loses a user's message: copy the model folder again")
        return made

    def prompt(self, message: str) -> list[int]:
        return self.conversation([{"role": "user", "content": message}])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a whole exchange of `role` and `content`, up to where the model starts to write.

        What a `content` spells of added tokens is broken by a blank: a text cannot end its turn (see `control`).
        """

        def encode(contents: Sequence[str]) -> list[int]:
            return self.encode(
                self._templated(
                    [
                        {**message, "content": content}
                        for message, content in zip(messages, contents, strict=True)
                    ]
                )
            )

        return self._commands.safe([message["content"] for message in messages], encode)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, nothing added."""
        return list(self._hf.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, tokens: Tokens) -> str:
        """Text of generated ids, special tokens dropped but for the tags of thought."""
        shown = [token for token in tokens if token not in self._hidden]
        return str(self._hf.decode(shown, skip_special_tokens=False))

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def _templated(self, messages: Sequence[Mapping[str, str]]) -> str:
        return _rendered(self._hf, messages, goes_on=True, enable_thinking=self._thinking)


def _rendered(
    hf: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, goes_on: bool, **variables: bool
) -> str:
    """What the template makes of a conversation. Raises SpellError where it fails, or takes too much."""
    plain = [dict(message) for message in messages]
    try:
        return str(
            _renderer()(hf.get_chat_template(), plain, {**hf.special_tokens_map, **variables}, goes_on)
        )
    except (TooMuch, WorkFailed, ValueError) as error:
        raise SpellError(
            f"the chat template of the tokenizer in {hf.name_or_path} cannot be used: {error}"
        ) from None


@cache
def _renderer() -> Bounded:
    """Templates are programs of whoever made the folder: no tokenizer of this process renders one in it."""
    return Bounded(
        "tokenizer.rendering:render", seconds=_SECONDS, memory=_MEMORY, environment={"USE_TORCH": "0"}
    )


def _faithful(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer as its own files have it.

    The class that `tokenizer_config.json` names can differ from `tokenizer.json`: DeepSeek's files name Llama's, which
    transformers 5 builds anew and which then drops every blank. The file itself is right in that case.
    """
    hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if _round_trips(hf) or not (folder / "tokenizer.json").is_file():
        return hf
    plain = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return plain if _round_trips(plain) else hf


def _round_trips(hf: PreTrainedTokenizerBase) -> bool:
    return str(hf.decode(hf.encode(_PROBE, add_special_tokens=False))).strip() == _PROBE


def _turn_end(hf: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special token that the template puts behind what the model wrote, if any.

    Base models with a template (Qwen2.5's) name another one as their end, and would go on with a next turn.
    """
    exchange = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = _rendered(hf, exchange, goes_on=False)
    except SpellError:  # one for single messages has no such token
        return ()
    _, written, behind = text.rpartition(_PROBE)
    ids = hf.encode(behind.lstrip(), add_special_tokens=False) if written else []
    return tuple(
        token for token in ids[:1] if (added := hf.added_tokens_decoder.get(token)) and added.special
    )
