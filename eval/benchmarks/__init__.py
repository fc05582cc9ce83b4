"""The benchmarks, one file each: the paper's six tasks, what else it reports, and the toy world's own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from eval.benchmark import Benchmark
from eval.benchmarks.aime24 import Aime24
from eval.benchmarks.aime25 import Aime25
from eval.benchmarks.amc23 import Amc23
from eval.benchmarks.docmath import DocMath
from eval.benchmarks.frames import Frames
from eval.benchmarks.gsm8k import Gsm8k
from eval.benchmarks.helmet import Helmet
from eval.benchmarks.helmet_icl import HelmetIcl
from eval.benchmarks.helmet_rag import HelmetRag
from eval.benchmarks.hotpotqa import HotpotQA
from eval.benchmarks.longbench_v2 import LongBenchV2
from eval.benchmarks.math500 import Math500
from eval.benchmarks.mmlu_pro import MmluPro
from eval.benchmarks.mrcr import Mrcr
from eval.benchmarks.musique import MuSiQue
from eval.benchmarks.toy import Toy
from eval.benchmarks.wikimqa import WikiMQA
from spell_megatron.types import SpellError

PUBLIC: Sequence[type[Benchmark]] = (
    DocMath,
    Frames,
    WikiMQA,
    HotpotQA,
    MuSiQue,
    LongBenchV2,
    Aime24,
    Aime25,
    Amc23,
    MmluPro,
    Helmet,
    Mrcr,
    Math500,
    Gsm8k,
    HelmetRag,
    HelmetIcl,
)
_KINDS: Sequence[type[Benchmark]] = (*PUBLIC, Toy)
_BY_NAME = {kind.name: kind for kind in _KINDS}


def list_benchmarks() -> list[str]:
    """Names of the public benchmarks, in the paper's order."""
    return [kind.name for kind in PUBLIC]


def find(names: Iterable[str] = ()) -> list[Benchmark]:
    """The named benchmarks, every public one where none is named. Raises SpellError for an unknown name."""
    chosen = list(dict.fromkeys(names)) or list_benchmarks()
    for name in chosen:
        if name not in _BY_NAME:
            close = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SpellError(f"no benchmark {name!r}{hint} Benchmarks: {' '.join(_BY_NAME)}")
    return [_BY_NAME[name]() for name in chosen]
