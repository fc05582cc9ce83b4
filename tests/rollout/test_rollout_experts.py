"""The experts that an engine tells: shared by prompt, checked, and refused where none can be told."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from spell_megatron.config import parse_config
from spell_megatron.rollout import backend
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.experts import PromptExperts, check_replay

pytestmark = pytest.mark.unit

PROMPT = [7, 8, 9, 10]
REPLAY = {"policy": {"router_replay": True}}


def told(tokens: int, first: int = 0) -> np.ndarray:
    """Two layers of three experts each, whose first names the token."""
    rows = np.arange(first, first + tokens)[:, None, None]
    return (np.zeros((tokens, 2, 3)) + rows).astype(np.uint8)


def test_all_completions_of_a_prompt_share_its_experts() -> None:
    known = PromptExperts()
    assert known.of(PROMPT) is None
    first = known.split(PROMPT, None, told(6), 3)
    np.testing.assert_array_equal(first[0], told(4))
    np.testing.assert_array_equal(first[1], told(2, first=4))  # the last token went through no layer
    later = known.split(PROMPT, known.of(PROMPT), told(4, first=4), 5)
    at_once = known.split(PROMPT, None, told(4), 1)  # was asked when nobody had them
    assert later[0] is at_once[0] is first[0]
    np.testing.assert_array_equal(later[1], told(4, first=4))
    assert at_once[1].shape == (0, 2, 3)
    assert known.of([7, 8, 9]) is None


def test_they_go_with_the_last_rollout_and_with_the_weights() -> None:
    known = PromptExperts()
    first = known.split(PROMPT, None, told(6), 3)
    assert first[1].base is None, "the answer as a whole would be kept"
    known.forget()
    assert known.of(PROMPT) is None
    again = known.split(PROMPT, None, told(6), 3)
    assert again[0] is not first[0]
    del again
    gc.collect()
    assert known.of(PROMPT) is None


@pytest.mark.parametrize("wrong", [None, told(5), told(7), told(6)[..., 0], told(6).astype(np.float32)])
def test_an_answer_that_does_not_fit_is_refused(wrong: np.ndarray | None) -> None:
    with pytest.raises(EngineError, match=r"experts of 6 tokens, and told .*--enable-return-routed-experts"):
        PromptExperts().split(PROMPT, None, wrong, 3)


def test_where_no_engine_could_tell_the_run_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(REPLAY)
    with pytest.raises(EngineError, match=r"policy\.router_replay=true needs .* GPU"):
        check_replay(config)
    check_replay(parse_config({}))
    check_replay(parse_config({**REPLAY, "rollout": {"servers": {"urls": ["http://elsewhere:8000"]}}}))
    monkeypatch.setattr(backend, "current", lambda: backend.CUDA)
    check_replay(config)
