"""Train a sentencepiece model that keeps given strings whole and can spell every other text in bytes.

A unigram model segments by the best sum of scores. The strings to keep are therefore ordinary pieces
with a score near zero, not sentencepiece's "user defined symbols": Hugging Face has no counterpart
of the latter, and a model of ordinary pieces alone converts exactly (see `convert`).
"""

from __future__ import annotations

import io
import string
from collections.abc import Iterable, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as schema

SPACE = "\u2581"
"""Sentencepiece's visible blank."""
PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT = (
    "<|pad|>",
    "<|unknown|>",
    "<|begin|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
)
_CHARACTERS = SPACE + string.ascii_letters + string.digits + string.punctuation + "\n"
_KEPT_SCORE = -0.1
"""Score of every string to keep: far above any trained piece, below zero so that fewer pieces win."""


def train(texts: Iterable[str], keep: Sequence[str], vocab_size: int) -> bytes:
    """A serialized sentencepiece model.

    `keep` are strings that shall be one piece each; a leading blank stands for the start of a word.
    `vocab_size` is an upper bound and counts the 256 bytes, the special pieces and `keep`.
    """
    kept = [piece.replace(" ", SPACE) for piece in keep]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        user_defined_symbols=[piece for piece in kept if len(piece) > 1],
        required_chars=_CHARACTERS,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        character_coverage=1.0,
        num_threads=1,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece=PAD,
        unk_piece=UNKNOWN,
        bos_piece=BOS,
        eos_piece=EOS,
        control_symbols=[USER, ASSISTANT],
        minloglevel=2,
    )
    return _as_ordinary(model.getvalue())


def _as_ordinary(model: bytes) -> bytes:
    """Turn user defined symbols into ordinary pieces that always win."""
    proto = schema.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at import
    for piece in proto.pieces:
        if piece.type == piece.USER_DEFINED:
            piece.type, piece.score = piece.NORMAL, _KEPT_SCORE
    made: bytes = proto.SerializeToString()
    return made
