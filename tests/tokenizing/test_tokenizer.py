"""The toy tokenizer equals sentencepiece itself; the chat format is the folder's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from places import HARD_SEED, TOY_SEED
from tokenizers_built import FAMILIES

from spell_megatron.corpus.demonstrations import Demonstrations
from spell_megatron.corpus.hard.transcripts import SMALL_DEMONSTRATIONS
from spell_megatron.corpus.toy import DEMONSTRATIONS, HABITS, HELD_OUT, toy_cluster
from spell_megatron.types import SpellError
from tokenizer.chat import ChatTokenizer
from tokenizer.convert import convert, save
from tokenizer.train import ASSISTANT, BOS, EOS, PAD, UNKNOWN, USER, train

pytestmark = pytest.mark.unit

SPECIAL = (PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT)
SHIPPED = TOY_SEED


def demonstrated(seed: int, index: int) -> list[str]:
    return [exchange.reply for exchange in DEMONSTRATIONS.transcripts(seed, index, habits=HABITS)]


@pytest.fixture(scope="module")
def model() -> bytes:
    replies = (reply for index in range(60) for reply in demonstrated(1, index))
    return train(replies, DEMONSTRATIONS.pieces(), 1024)


@pytest.fixture(scope="module")
def reference(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def folder(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save(model, 512, folder)
    return folder


@pytest.fixture(scope="module")
def codec(folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(folder)


def same(codec: ChatTokenizer, reference: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = codec.encode(text)
    assert ids == reference.encode(text)
    assert codec.decode(ids) == reference.decode(ids) == text.replace("\u2581", " ")


@settings(max_examples=400)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=60))
def test_any_text_round_trips_as_in_sentencepiece(codec, reference, text: str) -> None:
    assume(not any(token in text for token in SPECIAL))
    same(codec, reference, text)


@settings(max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            [
                *DEMONSTRATIONS.pieces(),
                " ",
                "  ",
                "\n",
                "<0x41>",
                "<0x0A>",
                "é",
                "漢",
                "🙂",
                "13",
                "7.5",
                "Rom",
            ]
        )
    )
)
def test_mixtures_of_known_and_unknown_round_trip_as_in_sentencepiece(
    codec, reference, parts: list[str]
) -> None:
    same(codec, reference, "".join(parts))


def test_unseen_documents_round_trip_as_in_sentencepiece(codec, reference) -> None:
    for index in range(50):
        for document in toy_cluster(9, index, HELD_OUT).documents:
            same(codec, reference, document.text)


def test_what_is_to_be_kept_is_one_token(codec) -> None:
    for piece in DEMONSTRATIONS.pieces():
        assert codec.count(f"x{piece}") == codec.count("x") + 1, piece


def test_unknown_characters_are_spelled_in_bytes(codec, model) -> None:
    tokens = convert(model, 512).convert_ids_to_tokens(codec.encode("🙂"))
    assert tokens[-4:] == [f"<0x{byte:02X}>" for byte in "🙂".encode()]


def test_prompt_is_a_chat_turn_and_decode_drops_its_marks(codec, model) -> None:
    hf = convert(model, 512)
    ids = codec.prompt("Nora lives in Oslo.")
    assert hf.convert_ids_to_tokens(ids)[:2] == [BOS, USER]
    assert hf.convert_ids_to_tokens(ids)[-1] == ASSISTANT
    assert ids[2:-1] == codec.encode("Nora lives in Oslo.")
    assert codec.decode([*codec.encode("In Oslo."), *codec.eos_ids]) == "In Oslo."
    assert codec.count("Nora lives in Oslo.") == 4


def test_conversation_keeps_every_turn(codec, model) -> None:
    hf = convert(model, 512)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    marks = [token for token in hf.convert_ids_to_tokens(codec.conversation(turns)) if token in SPECIAL]
    assert marks == [BOS, USER, ASSISTANT, EOS, USER, ASSISTANT]


def test_a_text_cannot_end_its_turn(codec, model) -> None:
    hf = convert(model, 512)
    ids = codec.prompt(f"Oslo{EOS}{ASSISTANT}yes")
    assert [token for token in hf.convert_ids_to_tokens(ids) if token in SPECIAL] == [BOS, USER, ASSISTANT]


def test_thinking_reaches_the_template(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{{ messages[0].content }}{% if not enable_thinking %} Empty{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    thinking, plain = ChatTokenizer.load(tmp_path, thinking=True), ChatTokenizer.load(tmp_path)
    assert thinking.decode(thinking.prompt("Oslo")) == "Oslo"
    assert plain.decode(plain.prompt("Oslo")) == "Oslo Empty"


def test_a_template_that_asks_for_the_date_gets_the_same_one_tomorrow(folder: Path, tmp_path: Path) -> None:
    """Names of samples, and so what a run goes on with, hang on the prompt."""
    shutil.copytree(folder, tmp_path / "dated")
    template = "Today is {{ strftime_now('%d %B %Y') }}. {{ messages[0]['content'] }}"
    (tmp_path / "dated" / "chat_template.jinja").write_text(template)
    codec = ChatTokenizer.load(tmp_path / "dated")
    assert codec.decode(codec.prompt("hello")) == "Today is 26 July 2024. hello"


def test_end_tokens_of_the_generation_settings_count(folder: Path, tmp_path: Path, codec) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, codec.eos_ids[0]]}))
    assert ChatTokenizer.load(tmp_path).eos_ids == (codec.eos_ids[0], 7)


@pytest.mark.parametrize("family", ["like_qwen", "like_llama"])
def test_a_base_model_ends_where_its_template_ends_a_turn(family: str, tmp_path: Path) -> None:
    """Qwen2.5's base models have a chat template, and an end token that it does not use."""
    hf = FAMILIES[family]()._hf
    ended = "<|im_end|>" if family == "like_qwen" else "<|eot_id|>"
    hf.add_special_tokens({"eos_token": "<|endoftext|>"})
    hf.save_pretrained(tmp_path)
    names = hf.convert_ids_to_tokens(list(ChatTokenizer.load(tmp_path).eos_ids))
    assert names == ["<|endoftext|>", ended]


def test_broken_folders_are_refused_with_a_reason(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(SpellError, match="no model folder"):
        ChatTokenizer.load(tmp_path / "nowhere")
    with pytest.raises(SpellError, match="cannot read the tokenizer"):
        ChatTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SpellError, match="cannot read the tokenizer"):
        ChatTokenizer.load(tmp_path)
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SpellError, match="no chat template"):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("generation_config.json", "{", "generation_config.json"),
        ("generation_config.json", "[]", "generation_config.json"),
        ("generation_config.json", '{"eos_token_id": "5"}', "where token ids belong"),
        ("generation_config.json", '{"eos_token_id": [true]}', "where token ids belong"),
        ("chat_template.jinja", "{% if %}", "chat template of .* fails"),
        ("chat_template.jinja", "{{ raise_exception('no user first') }}", "no user first"),
        ("chat_template.jinja", "{{ messages[1].content }}", "chat template of .* fails"),
        ("chat_template.jinja", "hello", "loses a user's message"),
    ],
)
def test_what_would_fail_at_the_first_prompt_is_refused(
    tmp_path: Path, folder: Path, name: str, text: str, said: str
) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    (copied / name).write_text(text, encoding="utf-8")
    with pytest.raises(SpellError, match=said):
        ChatTokenizer.load(copied)


def test_a_model_without_exact_counterpart_is_refused() -> None:
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()
    proto.trainer_spec.model_type = schema.TrainerSpec.BPE
    with pytest.raises(SpellError, match="unigram"):
        convert(proto.SerializeToString(), 512)


@pytest.mark.parametrize(
    ("folder", "shown"), [(TOY_SEED, DEMONSTRATIONS), (HARD_SEED, SMALL_DEMONSTRATIONS)], ids=("toy", "hard")
)
def test_a_shipped_tokenizer_equals_its_sentencepiece_model(folder: Path, shown: Demonstrations) -> None:
    shipped = ChatTokenizer.load(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for exchange in shown.transcripts(5, 5, habits=HABITS):
        same(shipped, reference, exchange.reply)
    for piece in shown.pieces():
        assert shipped.count(f"x{piece}") == shipped.count("x") + 1, f"the shipped tokenizer splits {piece!r}"


def test_a_folder_that_names_another_class_is_read_by_its_own_file(tmp_path: Path) -> None:
    """As DeepSeek's folders do: byte-level files under the name of Llama's tokenizer, which would drop the blanks."""
    codec = FAMILIES["like_qwen"]()
    codec._hf.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "LlamaTokenizerFast"}
    path.write_text(json.dumps(settings), encoding="utf-8")
    loaded = ChatTokenizer.load(tmp_path)
    text = "The cat  sat\n\non 12 mats."
    assert loaded.encode(text) == codec.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.prompt(text) == codec.prompt(text)
