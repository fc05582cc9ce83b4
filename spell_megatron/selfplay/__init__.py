"""The algorithm: pure Python and asyncio. No torch, no vLLM, no megatron; never sees a tensor.

SelfPlay.play(step) -> Play       one step's episodes and the batch made of them
accuracy(...)       -> HeldOutScore   the rule's verdict on questions that nobody trains on
"""

from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.heldout import HeldOutScore, accuracy, known
from spell_megatron.selfplay.metrics import step_metrics
from spell_megatron.selfplay.play import Play, SelfPlay, StarvedError
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.roles import prompts_of

__all__ = [
    "Episode",
    "HeldOutScore",
    "Play",
    "Prompts",
    "SelfPlay",
    "StarvedError",
    "accuracy",
    "known",
    "prompts_of",
    "step_metrics",
]
