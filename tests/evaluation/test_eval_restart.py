"""A run that is killed in the middle and started again: the same table, and nothing asked twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from eval_standin import StandIn, right
from places import ROOT, SUPPORT

from eval.report import read_report

pytestmark = pytest.mark.distributed
CONCURRENCY = 3
PROGRAM = f"""
import asyncio, sys
from pathlib import Path
from spell_megatron.base.terminal import Terminal
from eval_standin import Unjudged, WordCodec
from eval.data import Data
from eval.endpoint import Endpoint
from eval.measure import measure, plan
from eval.runner import Settings

async def main(url, home):
    async with Endpoint(url) as source:
        settings = Settings(samples=8, concurrency={CONCURRENCY})
        plans = plan([(Unjudged(), Unjudged().load(Data(None)), {{}})], [1000], WordCodec(), settings)
        await measure(source, WordCodec(), plans, settings, Path(home), "m", console=Terminal(stderr=True))

asyncio.run(main(*sys.argv[1:]))
"""


def start(url: str, home: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(SUPPORT), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, url, str(home)], env={**os.environ, "PYTHONPATH": path}
    )


def test_kill_and_restart(tmp_path):
    def slowly(kind, body, number):
        time.sleep(0.02)
        return right(kind, body, number)

    with StandIn(right) as standin:
        assert start(standin.url, tmp_path / "whole").wait(120) == 0

    with StandIn(slowly) as standin:
        for enough in (10, 30, 50):
            process = start(standin.url, tmp_path / "killed")
            while len(standin.answered) < enough and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        journal = tmp_path / "killed" / "journal.jsonl"
        with journal.open("ab") as stream:  # as if the last kill had hit in the middle of a line
            stream.write(b'{"key": "half')
        answered_before = set(standin.answered)
        asked_before = standin.asked.copy()
        assert start(standin.url, tmp_path / "killed").wait(120) == 0

    # Only what was in flight at a kill may be asked again: at most one request a worker and kill.
    assert len(standin.asked) == 80
    assert standin.asked.total() <= 80 + 3 * CONCURRENCY
    assert len(answered_before) >= 50
    again = [key for key in answered_before if standin.asked[key] > asked_before[key]]
    assert len(again) <= CONCURRENCY
    assert read_report(tmp_path / "killed") == read_report(tmp_path / "whole")
