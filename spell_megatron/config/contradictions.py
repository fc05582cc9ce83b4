"""Combinations of valid values that cannot work, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterator

from spell_megatron.base.secret import holds_secret, is_secret
from spell_megatron.config.schema import BeyondConfig, Config, SelfPlayConfig
from spell_megatron.config.yamltext import ConfigError


def check_contradictions(config: Config, where: str) -> None:
    """Raise ConfigError for combinations of valid values that cannot work."""
    faults = [
        fault for section in (_corpus, _selfplay, _rollout, _policy, _bounds) for fault in section(config)
    ]
    if faults:
        raise ConfigError(f"{where} contradicts itself:\n" + "\n".join(f"  {fault}" for fault in faults))


def untrainable(config: Config) -> str:
    """Why no run should begin with a configuration, though what it has made can be looked at; empty where it may."""
    return "\n".join(_untrainable(config))


def _untrainable(config: Config) -> Iterator[str]:
    stream, sequence = config.policy.stream_tokens, config.rollout.max_model_len
    if sequence > stream:
        yield (
            f"policy.stream_tokens={stream} cannot hold a sequence of rollout.max_model_len={sequence}: raise the"
            " first to the second at least"
        )
    optimizer, play, record = config.policy.optimizer, config.selfplay, config.record
    decay = optimizer.decay_steps
    if 0 < decay < config.steps and optimizer.min_lr == 0:
        yield (
            f"steps={config.steps} goes on after policy.optimizer.decay_steps={decay}, where the rate is"
            " policy.optimizer.min_lr=0: raise the second to the first, or the rate that it ends at"
        )
    if 0 < decay <= optimizer.warmup_steps:
        yield (
            f"policy.optimizer.decay_steps={decay} ends before warmup_steps={optimizer.warmup_steps} do: both count"
            " from the first step"
        )
    if optimizer.min_lr and not decay:
        yield (
            f"policy.optimizer.min_lr={optimizer.min_lr:g} is what a decay ends at: set policy.optimizer.decay_steps"
        )
    if play.combine == "sum" and (play.train_questioner or play.memory):
        yield (
            "selfplay.combine=sum makes rewards above 1, by which neither a question's difficulty nor what memory"
            " keeps can be told: set selfplay.combine=mean, or selfplay.train_questioner=false and selfplay.memory=0"
        )
    if play.judge and play.train_verifier and not _usable(play):
        low, high = play.verifier_agreement
        yield (
            f"selfplay.verifier_agreement=[{low:g}, {high:g}] holds no share that the majority of up to"
            f" selfplay.group_size={play.group_size} votes can have, so that no verdict would be trained on: widen the"
            " bounds, raise selfplay.group_size, or set selfplay.train_verifier=false"
        )
    if record.keep_every and (not record.checkpoint_every or record.keep_every % record.checkpoint_every):
        yield (
            f"record.keep_every={record.keep_every} keeps checkpoints that record.checkpoint_every="
            f"{record.checkpoint_every} does not write: make the first a multiple of the second"
        )


def _usable(play: SelfPlayConfig) -> bool:
    """Whether the agreement of any group of verdicts can lie within `verifier_agreement`."""
    shares = {agree / valid for valid in range(1, play.group_size + 1) for agree in range(1, valid + 1)}
    if play.verdict == "majority" and play.vote_tie != "no":
        shares = {share for share in shares if share > 0.5 or (share == 0.5 and play.vote_tie == "first")}
    low, high = play.verifier_agreement
    return any(low <= share <= high for share in shares)


def _corpus(config: Config) -> Iterator[str]:
    if not config.corpus.sources:
        yield "corpus.sources is empty: name one at least, as corpus.sources=[{path: toy}]"
    for source in config.corpus.sources:
        if not source.path or not source.tasks:
            yield (
                "corpus.sources holds a source without a path or without tasks: leave the key out for its default, or"
                " write it as [{path: toy, tasks: [doc_mc]}] (path: . is the current folder)"
            )


def _selfplay(config: Config) -> Iterator[str]:
    play, beyond = config.selfplay, config.selfplay.beyond
    if play.round_questions < play.questions and play.max_rounds * play.round_questions < play.questions:
        yield (
            f"selfplay.questions={play.questions} cannot be reached by {play.max_rounds} rounds of"
            f" {play.round_questions}: raise selfplay.max_rounds or selfplay.round_questions"
        )
    if play.max_staleness and config.policy.loss.importance_cap is None:
        yield (
            f"selfplay.max_staleness={play.max_staleness} trains on samples of older weights, which have to be"
            " weighed: set policy.loss.importance_cap (2.0 is usual)"
        )
    if beyond.peak != BeyondConfig().peak and play.questioner_reward != "gaussian":
        yield (
            f"selfplay.beyond.peak={beyond.peak:g} moves the paper's reward: leave"
            " selfplay.questioner_reward=gaussian"
        )
    if play.leftovers == "carry" and not play.max_staleness:
        yield (
            "selfplay.leftovers=carry trains on samples of the step before: set selfplay.max_staleness=1 or more"
        )
    if play.leftovers == "carry" and play.whole_rounds:
        yield (
            "selfplay.whole_rounds=true leaves nothing to selfplay.leftovers=carry: set selfplay.whole_rounds=false, or"
            " leave selfplay.leftovers=abort"
        )
    if beyond.questioner_baseline == "ema" and beyond.questioner_peers != "task":
        yield (
            "selfplay.beyond.questioner_baseline=ema compares with the past of a task, not with peers: leave"
            " selfplay.beyond.questioner_peers=task"
        )
    if beyond.std != "group" and play.advantage in ("centred", "leave_one_out"):
        yield (
            f"selfplay.beyond.std={beyond.std} says whose standard deviation divides, and"
            f" selfplay.advantage={play.advantage} divides by none: leave selfplay.beyond.std=group"
        )
    longer = [stage.tokens for stage in beyond.stages if stage.tokens > config.corpus.cluster_tokens]
    if longer:
        yield (
            f"selfplay.beyond.stages reach {longer[0]} tokens, clusters have corpus.cluster_tokens="
            f"{config.corpus.cluster_tokens} at most: raise it to the last stage"
        )
    if holds_secret(play.external_judge.url):
        yield (
            "selfplay.external_judge.url holds a user or a parameter (a key?), which would be written into the run's"
            " folder: put the key into the environment, as SPELL_JUDGE_KEY"
        )


def _rollout(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.placement == "colocated" and config.selfplay.max_staleness:
        yield (
            "rollout.placement=colocated leaves no memory for rollouts during an update: set it to disaggregated,"
            " or selfplay.max_staleness=0"
        )
    if rollout.kind != "vllm" and (rollout.servers.count or config.cluster.engine_nodes):
        yield (
            "rollout.servers.count and cluster.engine_nodes start servers of vLLM's, and rollout.kind="
            f"{rollout.kind} is an engine of your own, which rank 0 makes: leave them out"
        )
    if any(map(holds_secret, rollout.servers.urls)):
        yield (
            "rollout.servers.urls: a server is http://host:port, without a user or parameters, which would be written"
            " into the run's folder: what servers know their trainer by is in rollout.servers.secret_file"
        )
    for key in ("engine", "engine_environment"):
        for name in (name for name, value in getattr(rollout, key).items() if is_secret(name, value)):
            yield (
                f"rollout.{key}: {name} looks like a secret, and the configuration is kept in the run's folder: set"
                " it in the environment that the run is started from"
            )


def _policy(config: Config) -> Iterator[str]:
    policy = config.policy
    optimizer = policy.optimizer
    if optimizer.overlap and not optimizer.distributed:
        yield "policy.optimizer.overlap needs policy.optimizer.distributed=true"
    if optimizer.cpu_offload and not (optimizer.distributed and policy.master_weights):
        yield (
            "policy.optimizer.cpu_offload is for sharded master weights: it needs policy.optimizer.distributed=true"
            " and policy.dtype=bfloat16"
        )
    if policy.fp8 != "off" and (policy.spec == "torch" or policy.dtype != "bfloat16"):
        yield (
            "policy.fp8 is computed by Transformer Engine from bfloat16: it needs policy.spec=te (or auto) and"
            " policy.dtype=bfloat16"
        )
    if policy.recompute == "none" and policy.recompute_layers is not None:
        yield (
            f"policy.recompute_layers={policy.recompute_layers} is of what policy.recompute says, and that is none: set"
            " policy.recompute=all_but_attention or full, or leave policy.recompute_layers out"
        )
    if policy.offload_layers and policy.recompute != "none" and policy.recompute_layers is None:
        yield (
            f"policy.offload_layers={policy.offload_layers} is of layers that are not computed again, and"
            f" policy.recompute={policy.recompute} is for all: set policy.recompute_layers"
        )
    if policy.offload_layers and policy.fp8 != "off":
        yield (
            f"policy.offload_layers={policy.offload_layers} does not know the tensors of policy.fp8={policy.fp8}:"
            " leave one of them out"
        )
    if policy.layout.sequence and policy.layout.tensor == 1:
        yield "policy.layout.sequence needs policy.layout.tensor > 1"


def _bounds(config: Config) -> Iterator[str]:
    play, optimizer, record = config.selfplay, config.policy.optimizer, config.record
    for key, low, high in (
        ("selfplay.verifier_agreement", *play.verifier_agreement),
        ("selfplay.memory_range", *play.memory_range),
        ("policy.optimizer.min_lr … lr", optimizer.min_lr, optimizer.lr),
        ("record.entropy_min … entropy_max", record.entropy_min, record.entropy_max),
    ):
        if high is not None and low > high:
            yield f"{key}: the lower bound {low:g} is above the upper one {high:g}"
