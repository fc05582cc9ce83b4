"""Evaluation: the paper's benchmarks against any OpenAI-compatible endpoint.

evaluate(["docmath"], models=["runs/mine/hf"], data=Path("data"), max_input=[16_384, 100_000])
"""

from eval.benchmarks import list_benchmarks
from eval.comparison import Comparison, compare
from eval.endpoint import EndpointDied, RequestLimits
from eval.live import live_benchmarks
from eval.report import Report, read_report
from eval.reward import reward_judge
from eval.run import Evaluation, JudgeSettings, evaluate
from eval.runner import Settings

__all__ = [
    "Comparison",
    "EndpointDied",
    "Evaluation",
    "JudgeSettings",
    "Report",
    "RequestLimits",
    "Settings",
    "compare",
    "evaluate",
    "list_benchmarks",
    "live_benchmarks",
    "read_report",
    "reward_judge",
]
