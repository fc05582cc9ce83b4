"""The policy loss, token by token. Pure tensor arithmetic; sums and denominators are the learner's.

A surrogate of the user's own is named by its import path in `policy.loss.surrogate`.

Clipped surrogate of PPO/GRPO (arXiv 2402.03300), optionally with GSPO's sequence ratio (arXiv 2507.18071),
truncated importance weights (TIS) against the engine, a k3 KL penalty and an entropy bonus. With one
optimizer update a batch the ratio is 1 and the loss is the plain policy gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spell_megatron.base.registry import Registry
from spell_megatron.config import LossConfig


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What the loss needs of `n` response tokens; float32 `[n]` each."""

    logprobs: Tensor
    entropy: Tensor
    weights: Tensor
    """Advantages (or 1 in supervised warm-up)."""
    old: Tensor
    """Log-probs before the first update on this batch."""
    engine: Tensor | None = None
    """Log-probs of the rollout engine, where importance weights are on."""
    reference: Tensor | None = None
    """Log-probs of the reference model, where the KL penalty is on."""
    sequence_log_ratio: Tensor | None = None
    """Mean of `logprobs - old` over the token's whole response, where the ratio is by sequence."""


@dataclass(frozen=True, slots=True)
class Surrogate:
    """What of the policy is differentiated.

    `compute(terms, log_ratio, loss)` gives what is to be maximised, float `[n]`, and of every name in `metrics` a value
    a token, `[n]`, whose mean over the batch becomes `policy/<name>`. `log_ratio` is `logprobs - old`, by token or by
    sequence as `policy.loss.ratio` says.
    """

    name: str
    compute: Callable[[TokenTerms, Tensor, LossConfig], tuple[Tensor, ...]]
    metrics: tuple[str, ...] = ()


def clipped(terms: TokenTerms, log_ratio: Tensor, loss: LossConfig) -> tuple[Tensor, ...]:
    """PPO's: no gain in moving the ratio beyond the bounds. Says of each token whether it was held back."""
    ratio = log_ratio.exp()
    held = ratio.clamp(1.0 - loss.clip_low, 1.0 + loss.clip_high)
    gain = torch.minimum(ratio * terms.weights, held * terms.weights)
    return gain, (ratio * terms.weights > held * terms.weights).detach()


CLIPPED = Surrogate("clipped", clipped, metrics=("clipped",))
SURROGATES: Registry[Surrogate] = Registry("loss", Surrogate, (CLIPPED,))


def token_losses(terms: TokenTerms, loss: LossConfig, surrogate: Surrogate = CLIPPED) -> tuple[Tensor, ...]:
    """Loss of every token, and what the surrogate says of it, `[n]` each."""
    log_ratio = terms.logprobs - terms.old
    if terms.sequence_log_ratio is not None:
        # The value is the sequence's ratio; the gradient reaches every token through its own log-prob.
        log_ratio = terms.sequence_log_ratio.detach() + terms.logprobs - terms.logprobs.detach()
    gain, *said = surrogate.compute(terms, log_ratio, loss)
    if terms.engine is not None and loss.importance_cap is not None:
        gain = gain * (terms.old - terms.engine).exp().clamp(max=loss.importance_cap).detach()
    losses = -gain
    if terms.reference is not None and loss.kl > 0:
        away = terms.reference - terms.logprobs
        losses = losses + loss.kl * (away.exp() - away - 1.0)
    if loss.entropy > 0:
        losses = losses - loss.entropy * terms.entropy
    return losses, *said
