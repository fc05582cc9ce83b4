"""Renders chat templates: in a process of its own (`chat`), since a template is a stranger's program.

Where the environment says USE_TORCH=0, transformers does without torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_TODAY = datetime(2024, 7, 26)
"""The date that the templates of Llama 3 take where nobody tells them one."""
_SPARE, _TIMES = 1 << 20, 4
"""A prompt is no longer than its contents, so many times, and these characters."""


def render(
    template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any], goes_on: bool
) -> str:
    """A conversation; up to where the model starts to write, where it `goes_on`. Raises ValueError where that is
    absurdly long.

    A template that asks for today's date gets `_TODAY`: a run that goes on tomorrow goes on with the same prompts.
    """
    rendered, _ = render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=goes_on,
        strftime_now=_TODAY.strftime,
        **variables,
    )
    text = str(rendered[0])
    if len(text) > (longest := _SPARE + _TIMES * sum(len(message["content"]) for message in messages)):
        raise ValueError(f"it makes {len(text):,} characters, more than {longest:,}")
    return text
