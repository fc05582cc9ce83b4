"""A sentencepiece unigram model as a Hugging Face fast tokenizer, token for token, with a chat template."""

from __future__ import annotations

from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as schema
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from spell_megatron.types import SpellError
from tokenizer.train import ASSISTANT, BOS, EOS, PAD, SPACE, UNKNOWN, USER

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}" + USER + "{{ message.content }}"
    "{% else %}" + ASSISTANT + "{{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)
_NEVER = -1000.0
"""Score of byte and special pieces: they are never read off the text that spells their names."""


def convert(model: bytes, model_max_length: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer equal to the serialized sentencepiece `model`.

    Raises SpellError where the model is not unigram with identity normalization and byte fallback:
    other models have no exact counterpart here.
    """
    proto = schema.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at import
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.UNIGRAM or not trainer.byte_fallback or normalizer.name != "identity":
        raise SpellError(
            "only a unigram sentencepiece model with byte fallback and identity normalization converts"
        )
    vocabulary = [
        (piece.piece, piece.score if piece.type == piece.NORMAL else _NEVER) for piece in proto.pieces
    ]
    fast = Tokenizer(models.Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def save(model: bytes, model_max_length: int, folder: Path) -> None:
    """Write the tokenizer's files into a model folder, the sentencepiece model beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    convert(model, model_max_length).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model)
