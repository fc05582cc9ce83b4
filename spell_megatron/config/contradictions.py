"""Combinations of valid values that cannot work, each with its remedy."""

from __future__ import annotations

import re

from spell_megatron.config.schema import BeyondConfig, Config
from spell_megatron.config.yamltext import ConfigError

_SECRET = re.compile(r"(?i)(^|[_-])(key|token|secret|passw(or)?d|credentials?)$|secret_access_key")


def names_secret(name: str) -> bool:
    """Whether what goes by this name is nobody else's to read: HF_TOKEN, WANDB_API_KEY, api-key."""
    return _SECRET.search(name) is not None


def check_contradictions(config: Config, where: str) -> None:
    """Raise ConfigError for combinations of valid values that cannot work."""
    play, faults = config.selfplay, []
    if not config.corpus.sources:
        faults.append("corpus.sources is empty: name one at least, as corpus.sources=[{path: toy}]")
    for source in config.corpus.sources:
        if not source.path or not source.tasks:
            faults.append(
                "corpus.sources holds a source without a path or without tasks: leave the key out for its default, or"
                " write it as [{path: toy, tasks: [doc_mc]}] (path: . is the current folder)"
            )
    if play.round_questions < play.questions and play.max_rounds * play.round_questions < play.questions:
        faults.append(
            f"selfplay.questions={play.questions} cannot be reached by {play.max_rounds} rounds of"
            f" {play.round_questions}: raise selfplay.max_rounds or selfplay.round_questions"
        )
    if play.max_staleness and config.policy.loss.importance_cap is None:
        faults.append(
            f"selfplay.max_staleness={play.max_staleness} trains on samples of older weights, which have to be"
            " weighed: set policy.loss.importance_cap (2.0 is usual)"
        )
    if play.beyond.peak != BeyondConfig().peak and play.questioner_reward != "gaussian":
        faults.append(
            f"selfplay.beyond.peak={play.beyond.peak:g} moves the paper's reward: leave"
            " selfplay.questioner_reward=gaussian"
        )
    if play.leftovers == "carry" and not play.max_staleness:
        faults.append(
            "selfplay.leftovers=carry trains on samples of the step before: set selfplay.max_staleness=1 or more"
        )
    if play.leftovers == "carry" and play.whole_rounds:
        faults.append(
            "selfplay.whole_rounds=true leaves nothing to selfplay.leftovers=carry: set selfplay.whole_rounds=false, or"
            " leave selfplay.leftovers=abort"
        )
    if config.rollout.placement == "colocated" and play.max_staleness:
        faults.append(
            "rollout.placement=colocated leaves no memory for rollouts during an update: set it to disaggregated,"
            " or selfplay.max_staleness=0"
        )
    if config.policy.optimizer.overlap and not config.policy.optimizer.distributed:
        faults.append("policy.optimizer.overlap needs policy.optimizer.distributed=true")
    if config.policy.optimizer.cpu_offload and not (
        config.policy.optimizer.distributed and config.policy.master_weights
    ):
        faults.append(
            "policy.optimizer.cpu_offload is for sharded master weights: it needs policy.optimizer.distributed=true"
            " and policy.dtype=bfloat16"
        )
    if config.policy.fp8 != "off" and (config.policy.spec == "torch" or config.policy.dtype != "bfloat16"):
        faults.append(
            "policy.fp8 is computed by Transformer Engine from bfloat16: it needs policy.spec=te (or auto) and"
            " policy.dtype=bfloat16"
        )
    policy = config.policy
    if policy.recompute == "none" and policy.recompute_layers is not None:
        faults.append(
            f"policy.recompute_layers={policy.recompute_layers} is of what policy.recompute says, and that is none: set"
            " policy.recompute=all_but_attention or full, or leave policy.recompute_layers out"
        )
    if policy.offload_layers and policy.recompute != "none" and policy.recompute_layers is None:
        faults.append(
            f"policy.offload_layers={policy.offload_layers} is of layers that are not computed again, and"
            f" policy.recompute={policy.recompute} is for all: set policy.recompute_layers"
        )
    if policy.offload_layers and policy.fp8 != "off":
        faults.append(
            f"policy.offload_layers={policy.offload_layers} does not know the tensors of policy.fp8={policy.fp8}:"
            " leave one of them out"
        )
    if config.policy.layout.sequence and config.policy.layout.tensor == 1:
        faults.append("policy.layout.sequence needs policy.layout.tensor > 1")
    if play.beyond.questioner_baseline == "ema" and play.beyond.questioner_peers != "task":
        faults.append(
            "selfplay.beyond.questioner_baseline=ema compares with the past of a task, not with peers: leave"
            " selfplay.beyond.questioner_peers=task"
        )
    if play.beyond.std != "group" and play.advantage in ("centred", "leave_one_out"):
        faults.append(
            f"selfplay.beyond.std={play.beyond.std} says whose standard deviation divides, and"
            f" selfplay.advantage={play.advantage} divides by none: leave selfplay.beyond.std=group"
        )
    longer = [stage.tokens for stage in play.beyond.stages if stage.tokens > config.corpus.cluster_tokens]
    if longer:
        faults.append(
            f"selfplay.beyond.stages reach {longer[0]} tokens, clusters have corpus.cluster_tokens="
            f"{config.corpus.cluster_tokens} at most: raise it to the last stage"
        )
    if "@" in play.external_judge.url:
        faults.append(
            "selfplay.external_judge.url holds a password, which would be written into the run's folder: put the key"
            " into the environment, as SPELL_JUDGE_KEY"
        )
    if config.rollout.kind != "vllm" and (config.rollout.servers.count or config.cluster.engine_nodes):
        faults.append(
            "rollout.servers.count and cluster.engine_nodes start servers of vLLM's, and rollout.kind="
            f"{config.rollout.kind} is an engine of your own, which rank 0 makes: leave them out"
        )
    for key in ("engine", "engine_environment"):
        for name in filter(names_secret, getattr(config.rollout, key)):
            faults.append(
                f"rollout.{key}: {name} looks like a secret, and the configuration is kept in the run's folder: set"
                " it in the environment that the run is started from"
            )
    optimizer, record = config.policy.optimizer, config.record
    for key, low, high in (
        ("selfplay.verifier_agreement", *play.verifier_agreement),
        ("selfplay.memory_range", *play.memory_range),
        ("policy.optimizer.min_lr … lr", optimizer.min_lr, optimizer.lr),
        ("record.entropy_min … entropy_max", record.entropy_min, record.entropy_max),
    ):
        if high is not None and low > high:
            faults.append(f"{key}: the lower bound {low:g} is above the upper one {high:g}")
    if faults:
        raise ConfigError(f"{where} contradicts itself:\n" + "\n".join(f"  {fault}" for fault in faults))
