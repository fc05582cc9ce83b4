"""The chat format of any Hugging Face tokenizer folder, as self-play uses it (`selfplay.ports.Codec`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spell_megatron.types import SpellError, Tokens


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
        self._control = [token.content for token in hf.added_tokens_decoder.values() if token.special]

    @classmethod
    def load(cls, folder: str | Path, thinking: bool = False) -> ChatTokenizer:
        """The tokenizer of a model folder; SpellError where it is missing, broken or has no chat template."""
        folder = Path(folder)
        if not folder.is_dir():
            raise SpellError(f"no model folder {folder}: give the path of a folder with tokenizer files")
        try:
            hf = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for one broken file
            raise SpellError(f"cannot read the tokenizer in {folder}: {error}") from error
        if not hf.chat_template:
            raise SpellError(
                f"the tokenizer in {folder} has no chat template: use an instruction-tuned model"
            )
        return cls(hf, _eos_ids(folder, hf), thinking)

    def prompt(self, message: str) -> list[int]:
        return self.conversation([{"role": "user", "content": message}])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a whole exchange of `role` and `content`, up to where the model starts to write.

        The names of control tokens inside a `content` are broken by a blank: a text cannot end its turn.
        """
        text = self._hf.apply_chat_template(
            [{**message, "content": self._harmless(message["content"])} for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self._thinking,
        )
        return self.encode(str(text))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, nothing added."""
        return list(self._hf.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, tokens: Tokens) -> str:
        return str(self._hf.decode(list(tokens), skip_special_tokens=True))

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def _harmless(self, content: str) -> str:
        for name in self._control:
            content = content.replace(name, f"{name[0]} {name[1:]}")
        return content


def _eos_ids(folder: Path, hf: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's end token, and those that the model's generation settings add (Llama, Qwen)."""
    path = folder / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", []) if path.is_file() else []
    ids = [hf.eos_token_id, *(named if isinstance(named, list) else [named])]
    return tuple(dict.fromkeys(token for token in ids if token is not None))
