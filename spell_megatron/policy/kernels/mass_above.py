"""Triton kernel of the nucleus: a row of logits is read once, and weighed above several thresholds."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def kernel(logits, peak, thresholds, masses, vocabulary, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    best = tl.load(peak + row)
    several = tl.arange(0, K)
    floors = tl.load(thresholds + row * K + several)
    sums = tl.zeros([K], dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(logits + row * vocabulary + columns, mask=columns < vocabulary, other=-float("inf"))
        weights = tl.exp(values - best)
        sums += tl.sum(tl.where(values[:, None] > floors[None, :], weights[:, None], 0.0), axis=0)
    tl.store(masses + row * K + several, sums)
