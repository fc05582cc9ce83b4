"""HotpotQA (LongBench): questions that bridge or compare two Wikipedia articles."""

from eval.benchmarks.longbench import LongBench


class HotpotQA(LongBench):
    name = "hotpotqa"
    title = "HotpotQA"
    config = "hotpotqa"
