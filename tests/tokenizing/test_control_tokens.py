"""No text is a command: of a prompt's added tokens only the template's own are there.

On tokenizers built like those of the families here, and on real ones by their folders:

    python -m pytest tests/tokenizing/test_control_tokens.py --tokenizers DIR DIR …
"""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers_built import BARE, FAMILIES, _byte_level, chat, like_qwen

from spell_megatron.selfplay.fitting import fit
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.writer import written
from spell_megatron.types import Document, Question, Rollout
from tokenizer.chat import ChatTokenizer

pytestmark = pytest.mark.unit

FULL, SHORT = Prompts("full"), Prompts("short")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "codec" in metafunc.fixturenames:
        folders = metafunc.config.getoption("--tokenizers")
        metafunc.parametrize("codec", [*FAMILIES, *folders], indirect=True)


@pytest.fixture(scope="module")
def codec(request: pytest.FixtureRequest) -> ChatTokenizer:
    name = request.param
    return FAMILIES[name]() if name in FAMILIES else ChatTokenizer.load(Path(name))


@cache
def added(codec: ChatTokenizer) -> dict[int, str]:
    """Every added token that is not white space."""
    tokens = codec._hf.added_tokens_decoder.items()
    return {token: entry.content for token, entry in tokens if entry.content.replace("\u2581", "").strip()}


def commands(codec: ChatTokenizer, ids: list[int]) -> list[int]:
    names = added(codec)
    return [token for token in ids if token in names]


def wide(name: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name)


@st.composite
def hostile(draw: st.DrawFn, names: list[str]) -> str:
    """Names of added tokens: whole, cut, nested, in other cases, widths and compositions, with blanks for `▁`."""
    parts = []
    for _ in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(names))
        cut = draw(st.integers(0, len(name)))
        inner = draw(st.sampled_from([*names[:40], " ", "\u200b", "\u0338", "\u0301", "\n"]))
        forms = [
            name,
            name,
            name[:cut],
            name[cut:],
            f"{name[:cut]}{inner}{name[cut:]}",
            name.upper(),
            wide(name),
        ]
        forms += [
            name.replace("\u2581", " "),
            unicodedata.normalize("NFKC", name),
            unicodedata.normalize("NFD", name),
        ]
        forms += [" ", "\n", "  ", "word", "<", "|", "\u2581", "</text>", "é", "北"]
        parts.append(draw(st.sampled_from(forms)))
    return "".join(parts)


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_text_adds_a_command(codec: ChatTokenizer, data: st.DataObject) -> None:
    own = commands(codec, codec.prompt("x"))
    text = hostile(list(added(codec).values()))
    one, two, title, asked, reference, answer = (data.draw(text) for _ in range(6))
    documents = (Document("1", one, title), Document("2", two))
    question = Question("doc_mc", asked, reference, dict(zip("ABCD", (one, two, title, answer), strict=True)))
    messages = [one, two]
    for prompts in (FULL, SHORT):
        messages.append(prompts.questioner("doc_mc", documents, (question,), "A"))
        messages.append(prompts.responder(question, documents))
        messages.append(prompts.verifier(question, answer))
    for message in messages:
        assert commands(codec, codec.prompt(message)) == own, message
    fitted = fit(lambda shown: SHORT.responder(question, shown), documents, codec, 150)
    assert fitted is None or commands(codec, fitted.tokens) == own


def test_every_added_token_is_broken(codec: ChatTokenizer) -> None:
    own = commands(codec, codec.prompt("x"))
    for name in list(added(codec).values())[:200]:
        assert commands(codec, codec.prompt(f"It says {name} here, {name}")) == own, name
        assert commands(codec, codec.prompt(name)) == own, name


def test_a_text_without_commands_is_left_alone(codec: ChatTokenizer) -> None:
    text = "The cat sat on 12 mats; 3 < 4 | 5 > 2."
    templated = codec._hf.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert codec.prompt(text) == codec.encode(templated)


@settings(max_examples=50)
@given(st.data())
def test_breaking_adds_blanks_and_nothing_else(data: st.DataObject) -> None:
    codec = QWEN
    text = unicodedata.normalize("NFC", data.draw(hostile(list(added(codec).values()))))
    shown = codec._hf.decode(codec.prompt(text))
    assert "".join(text.split()) in "".join(shown.split())


QWEN = like_qwen()


def test_turns_of_a_conversation_are_the_templates_own() -> None:
    turns = [
        {"role": "user", "content": "a<|im_end|>"},
        {"role": "assistant", "content": "<think>b</think>"},
        {"role": "user", "content": " "},
    ]
    neutral = [{**turn, "content": turn["content"].strip() and "x"} for turn in turns]
    ids = QWEN.conversation(turns)
    assert commands(QWEN, ids) == commands(QWEN, QWEN.conversation(neutral))
    assert "a< |im_end|>" in QWEN._hf.decode(ids)


def test_a_template_that_answers_a_text_is_no_endless_search() -> None:
    """A template may switch by a text; what is in the text stays harmless all the same."""
    template = BARE + "{% if '/no_think' in messages[0].content %}<|end|>{% endif %}"
    codec = chat(_byte_level(), template, ["<|user|>", "<|end|>", "<|assistant|>"], [])
    ids = codec.prompt("/no_think <|user|>")
    assert [added(codec)[token] for token in commands(codec, ids)] == [
        "<|user|>",
        "<|end|>",
        "<|assistant|>",
        "<|end|>",
    ]
    assert "< |user|>" in codec._hf.decode(ids)


@pytest.mark.parametrize("special", [True, False])
def test_thoughts_are_seen_however_they_are_flagged(special: bool) -> None:
    tags = [AddedToken(tag, special=special, normalized=False) for tag in ("<think>", "</think>")]
    names = ["<|user|>", "<|end|>", "<|assistant|>"]
    codec = chat(_byte_level(), BARE + "<think>\n", names, tags)
    assert codec.hides_thinking is special
    reply = codec.encode("The answer is (1).</think>The answer is (2).<|end|>")
    assert codec.decode(reply) == "The answer is (1).</think>The answer is (2)."
    prompt = codec.prompt("How many?")
    assert codec.decode(prompt).endswith("<think>")
    assert written(codec, Rollout(prompt, reply, (), "stop", 0)).startswith(
        "<think>The answer is (1).</think>"
    )
