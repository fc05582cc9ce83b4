"""2WikiMultihopQA (LongBench): questions that join facts of two to four Wikipedia articles."""

from eval.benchmarks.longbench import LongBench


class WikiMQA(LongBench):
    name = "2wikimqa"
    title = "2WikiMultihopQA"
    config = "2wikimqa"
