"""Work on hostile input ends, and takes no more than it may: chat templates above all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tokenizers_built import FAMILIES

from spell_megatron.base.bounded import Bounded, TooMuch, WorkFailed
from spell_megatron.types import SpellError
from tokenizer import chat

pytestmark = pytest.mark.unit

MESSAGES = [{"role": "user", "content": "Which year?"}]
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a huge string": "{{ ('a' * 300000000)[:2] }}{{ ('a' * 3000000000)[:2] }}",
    "a width": "{{ ('%2000000000d' % 1)[:2] }}",
    "a long prompt": "{{ 'a' * 9000000 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "no template": "{% for %}",
    "a refusal": "{{ raise_exception('only for friends') }}",
    "a way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an import": "{% include '/etc/passwd' %}",
}


@pytest.fixture(scope="module")
def render() -> Iterator[Bounded]:
    work = Bounded(
        "tokenizer.rendering:render", seconds=2.0, memory=256 << 20, environment={"USE_TORCH": "0"}
    )
    yield work
    work.close()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_is_refused_by_name(
    kind: str, render: Bounded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_renderer", lambda: render)
    codec = FAMILIES["like_qwen"]()
    codec._hf.chat_template, codec._hf.name_or_path = HOSTILE[kind], "/models/strangers"
    with pytest.raises(
        SpellError, match="chat template of the tokenizer in /models/strangers cannot be used: "
    ):
        codec.conversation(MESSAGES)
    codec._hf.chat_template = "{{ messages[0].content }}"
    assert codec.decode(codec.conversation(MESSAGES)) == "Which year?"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_makes_what_transformers_makes(family: str) -> None:
    codec = FAMILIES[family]()
    talk = [
        *MESSAGES,
        {"role": "assistant", "content": " <think>a</think> 1997 "},
        {"role": "user", "content": "\ud800 ok"},
    ]
    for messages in (MESSAGES, talk):
        here = codec._hf.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert codec._templated(messages) == here


def test_a_template_that_hangs_over_an_answer_does_not_hold_up_the_loading_of_its_folder(
    tmp_path: Path, render: Bounded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_renderer", lambda: render)
    FAMILIES["like_qwen"]()._hf.save_pretrained(tmp_path)
    hanging = "{{ messages[0].content }}{% if messages|length > 1 %}" + HOSTILE["loops"] + "{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(hanging)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    codec = chat.ChatTokenizer.load(tmp_path)
    assert codec.decode(codec.conversation(MESSAGES)) == "Which year?"


def test_an_absurdly_long_template_is_not_even_tried(tmp_path: Path) -> None:
    FAMILIES["like_qwen"]()._hf.save_pretrained(tmp_path)
    assert chat.ChatTokenizer.load(tmp_path).prompt("a")
    (tmp_path / "chat_template.jinja").write_text("{# " + "a" * (2 << 20) + " #}")
    with pytest.raises(SpellError, match="that is no template"):
        chat.ChatTokenizer.load(tmp_path)


def test_work_is_ended_and_goes_on() -> None:
    work = Bounded("work_to_bound:take", seconds=0.5, memory=64 << 20)
    assert work(0, 10) == 10
    with pytest.raises(TooMuch, match=r"longer than 0\.5 s$"):
        work(60, 10)
    with pytest.raises(TooMuch, match="more than 64 MiB of memory"):
        work(0, 1 << 30)
    assert work(0, 20) == 20
    work.close()
    with pytest.raises(TooMuch, match="was ended"):
        Bounded("work_to_bound:die", seconds=60, memory=64 << 20)()
    with pytest.raises(WorkFailed, match=r"^ValueError: odd$"):
        Bounded("work_to_bound:fail", seconds=60, memory=64 << 20)("odd")


def test_time_in_which_the_work_does_not_run_does_not_count_but_has_an_end() -> None:
    work = Bounded("work_to_bound:rest", seconds=0.1, memory=64 << 20)
    assert work(0.5) == 0.5
    with pytest.raises(TooMuch, match="mostly idle"):
        work(600)


def test_nobody_is_left_behind() -> None:
    work = Bounded("work_to_bound:take", seconds=60, memory=64 << 20)
    work(0, 1)
    children = psutil.Process().children()  # one that has ended says no command
    left = [
        child for child in children if "work_to_bound:take" in (child.as_dict(["cmdline"])["cmdline"] or ())
    ]
    assert len(left) == 1 and os.getpid() == left[0].ppid()
    del work
    deadline = time.monotonic() + 60
    while left[0].is_running() and left[0].status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
