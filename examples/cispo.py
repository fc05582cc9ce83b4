"""A loss of one's own: CISPO (MiniMax-M1, arXiv 2506.13585).

PPO's minimum takes the gradient from every token whose ratio leaves the bounds, and rare tokens, where reasoning turns,
leave them first. Here the ratio is a bounded weight that is not differentiated, and every token keeps its gradient.
"""

from __future__ import annotations

from torch import Tensor

from spell_megatron.config import LossConfig
from spell_megatron.policy.loss import Surrogate, TokenTerms


def compute(terms: TokenTerms, log_ratio: Tensor, loss: LossConfig) -> tuple[Tensor, ...]:
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(max=1.0 + loss.clip_high)
    return weight * terms.weights * terms.logprobs, ratio > weight


CISPO = Surrogate("cispo", compute, metrics=("clipped",))
