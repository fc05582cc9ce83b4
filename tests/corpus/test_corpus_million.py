"""A million documents cluster in bounded memory: what grows is on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytestmark = pytest.mark.distributed

DOCUMENTS = 1_000_000
BOUND_MIB = 160

CHILD = """
import sys, time
from pathlib import Path
from spell_megatron.config import CorpusConfig, SourceConfig
from spell_megatron.corpus import ClusterSampler

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10

before = peak()
corpus = CorpusConfig(sources=(SourceConfig(path=sys.argv[1], group_by=sys.argv[2]),), cluster_tokens=1000)
sampler = ClusterSampler(corpus, lambda text: len(text) // 4, 0, Path(sys.argv[3]))
drawn = sampler.draw(300)
assert all(2 <= len(cluster.documents) <= 20 for cluster, _ in drawn)
sys.stdout.write(f"{sampler.domains['docs']} {peak() - before}")
"""


def test_a_million_documents_cluster_in_bounded_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "docs.jsonl"
    with path.open("w") as file:
        for i in range(DOCUMENTS):
            words = " ".join(f"word{i * k % 99_991}" for k in range(1, 20))
            file.write(
                json.dumps({"text": f"Document {i}. {words}", "cluster": i * 7919 % (DOCUMENTS // 10)}) + "\n"
            )
    root = str(ROOT)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), "given", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    clusters, mib = map(int, child.stdout.split())
    with capsys.disabled():
        size = path.stat().st_size >> 20
        sys.stdout.write(
            f"\n{DOCUMENTS:,} documents ({size} MiB): {clusters:,} clusters, {mib} MiB more memory\n"
        )
    assert clusters == DOCUMENTS // 10
    assert mib < BOUND_MIB < size
