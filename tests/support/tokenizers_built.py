"""Small tokenizers with the added tokens, normalisers and templates of the families that people train."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenizer.chat import ChatTokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
HEADERS = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
TURNS = (
    "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "<start_of_turn>model\n"
)
WIDE = "<｜begin▁of▁sentence｜>{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}<｜Assistant｜>"
BARE = "<|user|>{{ messages[0].content }}<|end|><|assistant|>"


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return built


def _with_blanks_shown() -> Tokenizer:
    """Blanks are `▁`, and other characters are spelled in bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", *map(chr, range(33, 127))]
    built = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    built.normalizer = normalizers.Replace(" ", "\u2581")
    built.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return built


def chat(
    built: Tokenizer, template: str, special: Sequence[str | AddedToken], plain: Sequence[str | AddedToken]
) -> ChatTokenizer:
    """A chat tokenizer with added tokens, flagged special or not; a name alone is matched before normalisation."""
    for names, is_special in ((special, True), (plain, False)):
        built.add_tokens(
            [
                name
                if isinstance(name, AddedToken)
                else AddedToken(name, special=is_special, normalized=False)
                for name in names
            ]
        )
    hf = PreTrainedTokenizerFast(
        tokenizer_object=built, chat_template=template, clean_up_tokenization_spaces=False
    )
    return ChatTokenizer(hf, ())


def like_qwen() -> ChatTokenizer:
    built = _byte_level()
    built.normalizer = normalizers.NFC()
    tools = ["tool_call", "tool_response", "think"]
    plain = [f"<{slash}{name}>" for name in tools for slash in ("", "/")]
    plain += ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|repo_name|>", "<|file_sep|>"]
    return chat(built, CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"], plain)


def like_llama() -> ChatTokenizer:
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
    return chat(_byte_level(), HEADERS, [*names, *(f"<|reserved_special_token_{n}|>" for n in range(40))], [])


def like_gemma() -> ChatTokenizer:
    html = [f"<{slash}{name}>" for name in ("table", "td", "b", "h1", "code") for slash in ("", "/")]
    blanks = ["\n", "\n\n", "\t", "\u2581\u2581", "\u2581\u2581\u2581"]
    return chat(
        _with_blanks_shown(),
        TURNS,
        ["<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"],
        ["[multimodal]", *(f"<unused{n}>" for n in range(40)), *html, *blanks],
    )


def like_deepseek() -> ChatTokenizer:
    """Control tokens that are not special and are matched behind the normaliser, where a blank is `▁`."""
    names = [
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜fim▁hole｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜begin▁of▁sentence｜>",
    ]
    return chat(_with_blanks_shown(), WIDE, [], [AddedToken(name, normalized=True) for name in names])


def folding() -> ChatTokenizer:
    """Text is folded before added tokens are looked for; some take blanks with them, one is a whole word."""
    built = _byte_level()
    built.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    plain = [
        AddedToken("[cmd]", normalized=True, lstrip=True, rstrip=True),
        AddedToken("sudo", normalized=True, single_word=True),
        AddedToken("\u2020", normalized=True),
    ]
    names = ("<|user|>", "<|end|>", "<|assistant|>")
    return chat(built, BARE, [AddedToken(name, special=True, normalized=True) for name in names], plain)


def joining() -> ChatTokenizer:
    """Tokens that the end of a text makes with the template's next characters."""
    return chat(
        _byte_level(), BARE, ["<|user|>", "<|end|>", "<|assistant|>"], ["<<|", "|>>", ">x", "|>|", "end|><"]
    )


FAMILIES: dict[str, Callable[[], ChatTokenizer]] = {
    build.__name__: build for build in (like_qwen, like_llama, like_gemma, like_deepseek, folding, joining)
}
