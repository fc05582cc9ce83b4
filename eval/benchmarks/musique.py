"""MuSiQue (LongBench): questions composed of two to four single-hop questions."""

from eval.benchmarks.longbench import LongBench


class MuSiQue(LongBench):
    name = "musique"
    title = "MuSiQue"
    config = "musique"
