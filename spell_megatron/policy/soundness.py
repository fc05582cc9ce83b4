"""Whether an update may be made, and whether it was one: numbers that would poison every later step.

One NaN among log-probs, advantages or gradients is in every weight after the optimizer's step; a finite step may be so
large that nothing is left of the model. The first is seen before the step, the second right after it, and neither
state is ever saved.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from spell_megatron.policy.scores import PerSample
from spell_megatron.types import SpellError, TrainBatch


class UnsoundError(SpellError):
    """An update that must not be made, or should not have been. Raised on every rank."""

    def __init__(self, what: str, *, group: int | None = None, touched: bool = False) -> None:
        super().__init__(what)
        self.group = group
        """The first offending group of the batch, where it is known."""
        self.touched = touched
        """Whether weights have changed since the update began, so that they are not to be saved."""


def unsound_batch(batch: TrainBatch, vocabulary: int) -> UnsoundError | None:
    """What is not finite in a batch, or no token of the model: on a GPU an id too large ends the process."""
    for place, group in enumerate(batch.groups):
        if not group.prompt:
            return UnsoundError("a prompt is empty: nothing predicts the first token after it", group=place)
        for ids in (group.prompt, *(sample.tokens for sample in group.samples)):
            if len(ids) and not 0 <= min(ids) <= max(ids) < vocabulary:
                return UnsoundError(
                    f"token ids reach from {min(ids)} to {max(ids)}, and the model's from 0 to {vocabulary - 1}",
                    group=place,
                )
        for sample in group.samples:
            for what, values in (
                ("log-probs of the engine", sample.logprobs),
                ("advantages", sample.weights),
            ):
                if not np.isfinite(np.asarray(values, np.float64)).all():
                    return UnsoundError(f"{what} are not finite", group=place)
    return None


def unsound_scores(logprobs: PerSample, entropy: PerSample) -> UnsoundError | None:
    """What is not finite among a model's log-probs and entropies, `[group][sample]` -> `[tokens]`."""
    for place, parts in enumerate(zip(logprobs, entropy, strict=True)):
        for what, samples in zip(("log-probs", "entropies"), parts, strict=True):
            if not all(np.isfinite(sample).all() for sample in samples):
                return UnsoundError(f"{what} of the policy are not finite", group=place)
    return None


def entropy_beyond(entropy: PerSample, low: float, high: float | None) -> UnsoundError | None:
    """Whether the mean entropy of all response tokens, in nats, lies outside of a range."""
    every = [sample for group in entropy for sample in group if len(sample)]
    if not every:
        return None
    mean = float(np.concatenate(every).mean())
    if mean >= low and (high is None or mean <= high):
        return None
    bound = f"below record.entropy_min={low}" if mean < low else f"above record.entropy_max={high}"
    return UnsoundError(f"the mean entropy of the policy is {mean:.3g} nats, {bound}")


def norms(tensors: Iterable[Tensor]) -> Tensor:
    """Norm of each tensor, float32 `[n]`, on their device: nothing is waited for."""
    return torch.stack([torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in tensors])


def first_unsound(named: Iterable[tuple[str, Tensor]]) -> str:
    """The first name whose tensor has no finite norm; empty where all have."""
    return next((name for name, tensor in named if not norms([tensor]).isfinite().all()), "")
