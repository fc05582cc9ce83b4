"""Entropy-gated negative advantages: a policy that is already unsure is not pushed away from what it wrote.

AEPO of QwenLong-L1.5 (arXiv 2512.12967) masks the samples of negative advantage while the entropy of the batch is above
a bound, where penalties spread probability over ever more tokens. The entropy is estimated from what was sampled: minus
the mean log-probability of the tokens, which needs no pass of the model and is the same for a resumed run.
"""

from __future__ import annotations

from dataclasses import replace

from spell_megatron.types import Group, TrainBatch


def sampled_entropy(batch: TrainBatch) -> float:
    """An unbiased estimate, in nats a token, of the entropy of the distributions that a batch was sampled from."""
    total = sum(sum(sample.logprobs) for group in batch.groups for sample in group.samples)
    return -total / max(batch.response_tokens, 1)


def without_negatives(batch: TrainBatch) -> TrainBatch:
    """The batch with every negative weight at 0. Its tokens still count where a mean is taken."""
    return TrainBatch(tuple(map(_masked, batch.groups)))


def _masked(group: Group) -> Group:
    samples = (replace(one, weights=[max(weight, 0.0) for weight in one.weights]) for one in group.samples)
    return replace(group, samples=tuple(samples))
