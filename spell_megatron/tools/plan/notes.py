"""What a plan says besides numbers: what the user must see to, and what a recipe sets and the plan leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spell_megatron.config import Config
from spell_megatron.tools.plan.assumptions import GIB
from spell_megatron.tools.plan.engine import EngineMemory
from spell_megatron.weights.shape import ModelShape


def notes(config: Config, shape: ModelShape, engine: EngineMemory) -> Iterator[str]:
    """Nothing of it keeps the recipe from running."""
    limit, length = shape.max_positions, config.rollout.max_model_len
    if length > limit:
        yield (
            f"sequences of {length} tokens exceed the model's {limit} positions: its config.json needs a YaRN"
            f" rope_scaling of factor {math.ceil(length / limit)} or more"
        )
    if engine.fitting < 1:
        yield (
            f"a KV cache of {engine.kv_cache / GIB:.1f} GiB is below the {engine.kv_wanted / GIB:.1f} GiB of"
            f" selfplay.concurrency={config.selfplay.concurrency}: vLLM has {1 - engine.fitting:.0%} of the questions"
            " wait (raise rollout.kv_cache_mib)"
        )
    for what, is_set in _unplanned(config).items():
        if is_set:
            yield f"not planned: {what}"


def _unplanned(config: Config) -> dict[str, bool]:
    """What no formula here has of keys that cost or save something, and whether they are set."""
    policy, play, rollout, heldout = config.policy, config.selfplay, config.rollout, config.heldout
    measured = heldout.every and (heldout.questions or heldout.benchmarks)
    return {
        f"policy.fp8={policy.fp8}; products take time and memory as in bfloat16": policy.fp8 != "off",
        "policy.dtype=float32, its attention's blocks of scores": policy.dtype == "float32",
        "policy.spec=te with policy.dtype=float32; products take time as by torch": (
            policy.spec == "te" and policy.dtype == "float32"
        ),
        "policy.router_replay, the way of its choices to the trainer's GPUs": policy.router_replay,
        "policy.deterministic, its slower kernels": policy.deterministic,
        "selfplay.beyond.stages; documents have their full length": bool(play.beyond.stages),
        "selfplay.beyond.answerability, its responses": play.beyond.answerability is not None,
        "selfplay.external_judge, the wait for its verdicts": bool(play.external_judge.url),
        "selfplay.static_questions; a questioner asks them": play.static_questions,
        "record.mismatch_action=drop, its forward pass": config.record.mismatch_action == "drop",
        f"heldout.every={heldout.every}, its measurements": bool(measured),
        f"rollout.kind={rollout.kind}; the engine is vLLM": rollout.kind != "vllm",
        "rollout.eager, its slower tokens": rollout.eager,
        f"rollout.engine: {', '.join(rollout.engine)}": bool(rollout.engine),
    }
