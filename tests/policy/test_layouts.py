"""The fast half of the layout matrix (see layouts.py; the whole by `python tests/support/layouts.py --table`)."""

from __future__ import annotations

import pytest
from layouts import CASES, Result, launch

pytestmark = pytest.mark.distributed


@pytest.fixture(
    scope="module", params=sorted({case.world for case in CASES if case.fast}), ids="{} ranks".format
)
def results(request: pytest.FixtureRequest) -> list[Result]:
    world = request.param
    return launch(world, [case.name for case in CASES if case.fast and case.world == world])


def test_every_layout_equals_hugging_face(results: list[Result]) -> None:
    assert results
    assert [result for result in results if not result.passed] == []
