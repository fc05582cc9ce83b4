"""What several test files start from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from hypothesis import settings
from imports import HEAVY, loads

if TYPE_CHECKING:
    from spell_megatron.policy.world import World

# The same examples in every run, so that a red one is of the change that it is seen on; `make explore` draws others.
# How long one takes says more of the machine's load than of the code.
settings.register_profile("explore", deadline=None, derandomize=False)
settings.register_profile("repeated", deadline=None, derandomize=True)
settings.register_profile("few", deadline=None, derandomize=True, max_examples=10)
settings.load_profile("repeated")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tokenizers", nargs="+", default=[], metavar="DIR", help="folders of tokenizers to test as well"
    )
    parser.addoption(
        "--light", action="store_true", help=f"leave out files that load {', '.join(sorted(HEAVY))}"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    light = config.getoption("light") and collection_path.suffix == ".py"
    return True if light and HEAVY & loads(collection_path) else None


LONGEST = (
    *("test_launchers_slurm", "test_corpus_million", "test_waiting"),
    *("test_resync_fleet", "test_gpu_check", "test_rollout_fleet", "test_durability", "test_training"),
    *("test_chaos", "test_layouts", "test_checkpoint", "test_sleep", "test_staleness_run", "test_doors"),
    *("test_plan_measured", "test_cuda", "test_rollout_inprocess"),
)
"""Files of a minute or more; first those that wait or keep to one core, beside which others compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two workers none is left with one when the other is through."""
    first = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """What an engine in this process says to it by variables, the next file's engines do not hear."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Megatron's parallel state for one process."""
    from spell_megatron.config import LayoutConfig
    from spell_megatron.policy.world import start_world, stop_world

    yield start_world(LayoutConfig(), seed=0, timeout_seconds=60)
    stop_world()
