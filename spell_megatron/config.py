"""Configuration: typed dataclasses, YAML recipes, `key=value` overrides. No torch.

`load_config("toy", ["steps=3", "policy.optimizer.lr=1e-4"])` reads `recipes/toy.yaml`, follows its
`inherit:` chain, applies the overrides and validates the whole. An unknown key, a wrong type or a
contradiction raises `ConfigError`, which names the key and the nearest right one.

Every field has the value of the paper (arXiv 2509.23863, section 4.1) as its default where the
paper gives one.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from spell_megatron.types import SpellError

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
RECIPES = Path(__file__).parent / "recipes"
EVERY_TEXT = "*"
"""As `text_field`: every text of a row, wherever in it, is a text of its own."""

Dtype = Literal["float32", "bfloat16"]
Task = Literal["doc_general_qa", "docmath_qa", "doc_mc"]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(SpellError):
    exit_code = 2


@dataclass(frozen=True, config=_STRICT)
class Model:
    path: str = ""
    """A Hugging Face model folder, a hub id, or `toy-seed`, the model that is shipped."""
    prompts: Literal["full", "short"] = "full"
    """Prompt templates: `full` for real models, `short` for the toy model."""
    thinking: bool = False
    """The model reasons inside `<think>…</think>` before it answers."""


@dataclass(frozen=True, config=_STRICT)
class Source:
    path: str = "toy"
    """`toy` (the generated world), a folder of text, a .jsonl or .parquet file, or a hub id `org/name`."""
    domain: str = ""
    """Name of the domain in metrics; the path's last part where empty."""
    tasks: tuple[Task, ...] = ("doc_general_qa", "docmath_qa", "doc_mc")
    """Tasks that make sense on these documents."""
    clusters: int | None = Field(default=None, gt=0)
    """At most so many clusters, drawn by the run's seed: memory acts where they come again. All where not given."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the clusters drawn from this source, relative to the others."""
    group_by: Literal["given", "similarity", "random"] = "given"
    """How documents form clusters: by a given id (folder, `cluster` column), by similarity, at random."""
    text_field: str = "text"
    """Column (JSONL, Parquet) that holds a document's text; `*` for every text of a row, each by itself."""
    cluster_field: str = "cluster"
    """Column that names a document's cluster, for `group_by: given`."""
    deduplicate: Literal["near", "exact", "none"] = "near"
    """Drop repeated documents: near-duplicates too, or only texts equal up to case and white space."""


@dataclass(frozen=True, config=_STRICT)
class Corpus:
    sources: tuple[Source, ...] = (Source(),)
    benchmarks: tuple[str, ...] = ()
    """Files or folders of benchmarks: documents that repeat one of theirs, or hold a question, are left out."""
    cluster_tokens: int = Field(default=16_000, gt=0)
    """Clusters are filled up to this many tokens."""
    max_documents: int = Field(default=20, gt=0)
    """At most this many documents in one cluster."""
    toy_clusters: int = Field(default=20_000, gt=0)
    """Clusters of the toy world before it repeats."""


@dataclass(frozen=True, config=_STRICT)
class Sampling:
    temperature: float = Field(default=0.7, gt=0)
    """Of rollouts that are trained on: at 0 there would be no distribution to take log-probs of."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    questioner_tokens: int = Field(default=4096, gt=0)
    responder_tokens: int = Field(default=4096, gt=0)
    verifier_tokens: int = Field(default=4096, gt=0)


@dataclass(frozen=True, config=_STRICT)
class ExternalJudge:
    """A model behind an OpenAI-compatible endpoint that judges answers, too (paper, Table 4).

    Its key, where it wants one, is in the environment: SPELL_JUDGE_KEY. Multiple choice needs no judge.
    """

    url: str = ""
    """`https://host:8000`; empty asks nobody."""
    model: str = ""
    """The endpoint's name of the model; needed where it serves several."""
    place: Literal["rule", "beside"] = "rule"
    """`rule`: its verdict takes the place of the rule's, as in the paper. `beside`: it is one opinion more, beside rule
    and verifier; in the place of the verifier with `selfplay.judge=false`."""
    concurrency: int = Field(default=16, gt=0)
    """Questions to it at once."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Of one reply."""
    tries: int = Field(default=4, gt=0)
    """Of one question to it. What fails then is counted, and the episode is dropped where the reward hangs on it."""
    max_tokens: int = Field(default=4096, gt=0)
    """Of one reply."""


@dataclass(frozen=True, config=_STRICT)
class Stage:
    """From a step on, clusters of so many tokens."""

    step: int = Field(ge=0)
    tokens: int = Field(gt=0)


@dataclass(frozen=True, config=_STRICT)
class Beyond:
    """What others found and the paper does not have. All off by default; docs/recipes.md names the sources."""

    evidence: float = Field(default=0.0, ge=0)
    """Weight of naming the documents that the questioner read, in the responder's advantages; 0 does not ask for it."""
    answerability: int | None = Field(default=None, ge=0)
    """Distractors among which the questioner's documents must let a responder answer, or the question is dropped."""
    negatives_below: float | None = Field(default=None, gt=0)
    """Negative advantages count only while the batch's entropy, in nats a token, is at most this."""
    std: Literal["group", "task", "batch"] = "group"
    """Whose standard deviation divides advantages: that of the samples compared, of the task or of the role in all."""
    questioner_peers: Literal["task", "task_documents"] = "task"
    """Whom a question is compared with: those of its task, or of them those about as many documents."""
    questioner_baseline: Literal["batch", "ema"] = "batch"
    """`ema` compares a question with a running mean of its task over the steps."""
    stages: tuple[Stage, ...] = ()
    """Shorter clusters first: `[{step: 0, tokens: 16000}, {step: 40, tokens: 60000}]`."""


@dataclass(frozen=True, config=_STRICT)
class SelfPlay:
    sampling: Sampling = Sampling()
    questions: int = Field(default=128, gt=0)
    """N: kept questions that make one batch."""
    round_questions: int = Field(default=480, gt=0)
    """Questions asked per round of dynamic sampling."""
    max_rounds: int = Field(default=10, gt=0)
    """Rounds before a step gives up filling its batch."""
    group_size: int = Field(default=8, gt=1)
    """G: responses of one question, and judgements of one response."""
    documents: int = Field(default=5, gt=0)
    """m: fresh documents that the questioner reads."""
    memory: int = Field(default=3, ge=0)
    """L: remembered questions of a (task, cluster); 0 switches the curriculum off."""
    memory_questions: int = Field(default=20_000, gt=0)
    """Questions remembered over all clusters and tasks, about 1 KB each in memory and in every checkpoint. Raise it
    where a corpus has more pairs of cluster and task than a third of it: they are forgotten before they come again."""
    memory_steps: int = Field(default=2_000, gt=0)
    """Steps after which a (task, cluster) that was not asked about again is forgotten."""
    memory_form: Literal["release", "paper"] = "release"
    """What is remembered of a question. `release`, as the authors' code: all documents that its questioner read, so
    that the context only grows. `paper`, as Algorithm 1: the fresh ones alone, of questions with 0 < mean reward < 1;
    the context then holds (memory + 1) x documents at most, and the ring really forgets."""
    memory_range: tuple[Share, Share] = (0.01, 1.0)
    """A question is remembered iff its mean responder reward lies in this range."""
    grounding: bool = True
    """Drop questions that the responder answers without the documents."""
    grounding_threshold: float = Field(default=0.1, gt=0)
    """Rule reward of the answer without documents from which a question counts as ungrounded."""
    max_reference_tokens: int = Field(default=40, gt=0)
    """References of doc_general_qa over this length are dropped, unpenalised."""
    questioner_reward: Literal["gaussian", "reverse", "linear"] = "gaussian"
    questioner_sigma: float = Field(default=0.5 / 3, gt=0)
    bad_format_reward: float = Field(default=-1.0, le=0)
    bad_ground_reward: float = Field(default=-0.5, le=0)
    combine: Literal["max", "mean", "min", "sum"] = "max"
    """How rule and verifier make the responder's reward."""
    verdict: Literal["majority", "first"] = "majority"
    """What G votes on a response say: `first` is one voter's word, the ablation without a majority vote."""
    vote_tie: Literal["absent", "no", "first"] = "absent"
    """As many YES as NO: no verdict, NO as in the paper (more than half must agree), or the first vote as in the
    authors' code."""
    invalid_vote_reward: float = Field(default=-1.0, le=0)
    """Of a verdict that is neither YES nor NO: -1 as in the authors' code, 0 as in the paper."""
    verifier_consistency: Literal["maj_cons", "maj"] = "maj_cons"
    """`maj_cons` trains only verdicts whose majority agrees with the rule."""
    verifier_agreement: tuple[Share, Share] = (0.51, 0.99)
    """A verifier group is used iff the share of valid votes with the majority lies in this range."""
    verifier_share: float | None = Field(default=None, ge=0)
    """Verifier samples per responder sample; 1/G where not given."""
    failure_ratio: float = Field(default=1.0, ge=0)
    """Sampled failures of the questioner per kept question."""
    train_questioner: bool = True
    train_verifier: bool = True
    judge: bool = True
    """Ask the verifier at all; without it the rule alone rewards the responder, and no verdict is trained on."""
    external_judge: ExternalJudge = ExternalJudge()
    beyond: Beyond = Beyond()
    static_questions: bool = False
    """Train on the corpus' own fixed questions (static RLVR) instead of the questioner's."""
    concurrency: int = Field(default=64, gt=0)
    """Questions in flight at once; changes speed and memory, never what is sampled."""
    max_staleness: int = Field(default=0, ge=0)
    """k: while a step trains, the next k may be played; no sample is older than k updates. 0 is on-policy."""
    leftovers: Literal["abort", "carry"] = "abort"
    """Episodes under way when the batch is full: `abort` asks their questions anew in the next step, `carry`
    lets the next step go on with them."""


@dataclass(frozen=True, config=_STRICT)
class Servers:
    """A fleet of vLLM servers instead of the engine inside the trainer's process."""

    count: int = Field(default=0, ge=0)
    """Servers started on this node; 0 (and no `urls`) keeps the engine in the trainer's process, or starts one
    where that cannot be: with several ranks, or `selfplay.max_staleness` above 0."""
    urls: tuple[str, ...] = ()
    """Servers that somebody else started, besides."""
    secret_file: str = ""
    """A file with the secret that the servers of `urls` ask for, readable by its user alone."""
    tensor: int = Field(default=1, gt=0)
    """Tensor-parallel size of each started server."""
    host: str = "127.0.0.1"
    """Address that started servers, and the trainer's end of a transfer, listen on."""
    transfer: Literal["auto", "gloo", "nccl", "ipc", "shm"] = "auto"
    """How weights travel. From every rank to the engines on its own device: `ipc` on a GPU, `shm` on a CPU. From rank 0
    to engines anywhere: `nccl` between GPUs, `gloo` between CPUs."""
    in_flight: Literal["finish", "restart", "continue"] = "finish"
    """At a resync, running requests end on the old weights, start over on the new ones, or go on under them."""
    start_seconds: float = Field(default=1800.0, gt=0)
    """A server that is not ready by then is started again."""
    probe_seconds: float = Field(default=30.0, gt=0)
    """A server that does not answer a probe for so long is suspected."""
    request_seconds: float = Field(default=3600.0, gt=0)
    """A completion that takes longer is replayed elsewhere."""
    sync_seconds: float = Field(default=300.0, gt=0)
    """A transfer of weights that takes longer fails; running requests may end before it begins."""
    verify: Literal["version", "checksum"] = "version"
    """After a resync every engine must name its version; `checksum` compares each tensor that it was given, too."""
    max_restarts: int = Field(default=5, ge=0)
    """Restarts in a row, without a healthy moment between, after which a server is given up."""


@dataclass(frozen=True, config=_STRICT)
class Rollout:
    dtype: Dtype = "bfloat16"
    max_model_len: int = Field(default=22_528, gt=0)
    max_num_seqs: int = Field(default=256, gt=0)
    max_batched_tokens: int = Field(default=16_384, gt=0)
    kv_cache_mib: int | None = Field(default=None, gt=0)
    """KV cache in MiB; where not given, the share of GPU memory below."""
    gpu_memory: float = Field(default=0.85, gt=0, le=1)
    eager: bool = False
    placement: Literal["auto", "colocated", "disaggregated"] = "auto"
    """`colocated`: trainer and engine take turns in the memory of the same GPUs. `disaggregated`: the engines have GPUs
    of their own, a part of each node's where no nodes are theirs (`cluster.engine_nodes`). `auto`: colocated on GPUs
    that both would use, unless rollouts overlap with training (`selfplay.max_staleness`)."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further engine arguments of vLLM, by its own names: `{enable_expert_parallel: true, moe_backend: triton}`."""
    engine_environment: dict[str, str] = Field(default_factory=dict)
    """Further environment variables of vLLM's (`VLLM_…`) for the servers that are started."""
    servers: Servers = Servers()


@dataclass(frozen=True, config=_STRICT)
class Layout:
    tensor: int = Field(default=1, gt=0)
    sequence: bool = False
    """Sequence parallel: activations outside attention and MLP are sharded over the TP group."""
    pipeline: int = Field(default=1, gt=0)
    virtual_pipeline: int | None = Field(default=None, gt=0)
    """Model chunks per pipeline rank (interleaved schedule)."""
    context: int = Field(default=1, gt=0)
    expert: int = Field(default=1, gt=0)
    expert_tensor: int = Field(default=1, gt=0)


@dataclass(frozen=True, config=_STRICT)
class Optimizer:
    lr: float = Field(default=2e-6, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    """Cosine decay to `min_lr` that ends at this step; 0 keeps the rate constant."""
    min_lr: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, gt=0)
    max_growth: float = Field(default=2.0, gt=1)
    """Times the norm of a rank's weights may grow in one update, which is a wreck beyond that and never saved; training
    changes it by thousandths."""
    distributed: bool = False
    """Shard optimizer state over data-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction and parameter gathering with computation."""
    cpu_offload: bool = False
    """Keep optimizer state and float32 master weights in host memory, and step there."""


@dataclass(frozen=True, config=_STRICT)
class Loss:
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.2, gt=0)
    ratio: Literal["token", "sequence"] = "token"
    """`token` is PPO/GRPO; `sequence` is GSPO: one length-normalised ratio a response."""
    normalisation: Literal["token_mean", "group_mean", "sequence_length"] = "token_mean"
    """How tokens of long answers count. `token_mean`: every token of the batch alike, so that long answers weigh more.
    `group_mean`, the paper's E.3: every group (prompt) alike, and within it every token. `sequence_length` is Dr. GRPO:
    a constant denominator, `max_response_tokens` a response."""
    max_response_tokens: int = Field(default=4096, gt=0)
    importance_cap: float | None = Field(default=None, gt=0)
    """Truncated importance weights: engine-learner probability ratio capped at this value."""
    kl: float = Field(default=0.0, ge=0)
    """Coefficient of KL(policy ‖ reference), k3 estimator; the reference is loaded only if > 0."""
    entropy: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, config=_STRICT)
class Policy:
    layout: Layout = Layout()
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    dtype: Dtype = "bfloat16"
    """Of the weights in computation; gradients and master weights are float32."""
    spec: Literal["auto", "torch", "te"] = "auto"
    """Layers from torch or from Transformer Engine; `auto` takes TE on CUDA where it is installed."""
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = "off"
    """Products of the layers' matrices in FP8, scaled by this recipe of Transformer Engine."""
    recompute: Literal["none", "selective", "full"] = "none"
    stream_tokens: int = Field(default=32_768, gt=0)
    """Token budget of one packed stream (microbatch), over all context-parallel ranks."""
    share_prompts: bool = True
    """Compute a group's prompt once for all its responses."""
    head_chunk: int = Field(default=1024, gt=0)
    """Response tokens whose logits exist at the same time."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer updates per batch; 1 is strictly on-policy."""
    freeze_router: bool = False
    router_dtype: Literal["model", "float32"] = "model"
    """Router logits are computed in float32, and `model` rounds them to `dtype` as vLLM does, which decides by them."""
    router_replay: bool = False
    """Send tokens to the experts that the engine chose. It must tell them, which vLLM does on CUDA alone."""
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """A collective that takes longer fails."""

    @property
    def master_weights(self) -> bool:
        """The optimizer has float32 weights of its own, beside those in computation."""
        return self.dtype != "float32"


@dataclass(frozen=True, config=_STRICT)
class HeldOut:
    every: int = Field(default=0, ge=0)
    """Measure every n steps, besides before and after the run; 0 only there."""
    questions: int = Field(default=0, ge=0)
    """Held-out questions; 0 switches the measurement off."""
    path: str = "toy"
    """`toy` (the generated world's own), or a JSONL file of task, question, answer, options, documents."""
    samples: int = Field(default=8, gt=0)
    seed: int = 12345
    benchmarks: tuple[str, ...] = ()
    """Benchmarks of `spell-megatron eval` to measure besides, on the live engines, as often."""
    data: str = ""
    """Folder of the benchmarks' data sets; downloaded where empty."""
    max_input: int = Field(default=16_384, ge=16)
    """Tokens to which long-context benchmarks are truncated."""
    limit: int | None = Field(default=None, gt=0)
    """The first items of each benchmark alone."""


@dataclass(frozen=True, config=_STRICT)
class Record:
    group_readable: bool = False
    """Whether the run's files are open to their group; to others they never are."""
    wandb: str = ""
    """A Weights & Biases project; empty switches it off."""
    checkpoint_every: int = Field(default=1, ge=0)
    """Steps between checkpoints; 0 writes only the last."""
    keep_last: int = Field(default=2, gt=0)
    keep_every: int = Field(default=0, ge=0)
    """Besides the last ones, checkpoints of every n-th step are kept for good; 0 keeps none."""
    async_save: bool = True
    """Write checkpoints while the next step goes on; a rank's state is then in host memory once more."""
    mismatch_bound: float = Field(default=0.1, gt=0)
    """Mean engine-learner log-prob difference that is too much: in nats, over samples of the newest weights."""
    mismatch_action: Literal["stop", "drop"] = "stop"
    """Beyond the bound, `stop` ends the run; `drop` leaves the groups that are beyond it out of the update,
    for which the batch is computed once more (a forward pass)."""
    keep_rollouts: int = Field(default=100, gt=0)
    """Steps whose rollouts stay as they were written; never fewer than a resume from a kept checkpoint may need."""
    old_rollouts: Literal["compress", "remove"] = "compress"
    """What becomes of the rollouts of steps before: gzip files beside, or nothing."""
    bad_step: Literal["stop", "skip"] = "stop"
    """An update of numbers that are not finite, or beyond the bounds below, is never made: `stop` ends the run with the
    state of before; `skip` goes on with the next step, but not after three in a row."""
    entropy_min: float = Field(default=0.0, ge=0)
    """Mean entropy of the policy on its responses, in nats, below which it has collapsed; 0 allows any."""
    entropy_max: float | None = Field(default=None, gt=0)
    """Mean entropy above which nothing is left of the model; the logarithm of the vocabulary is pure chance."""
    reward_min: float | None = Field(default=None, le=1)
    """Mean reward of the responder below which a step is bad; any where not given."""


@dataclass(frozen=True, config=_STRICT)
class Cluster:
    """The machines that a recipe is meant for: read by the planner and the launchers, not by the loop."""

    nodes: int = Field(default=1, gt=0)
    """Nodes of the trainer."""
    gpus_per_node: int = Field(default=8, gt=0)
    gpu_memory_gib: float = Field(default=79.6, gt=0)
    """Of one GPU; an H100-80GB reports 79.6."""
    engine_nodes: int = Field(default=0, ge=0)
    """Nodes of the rollout engine alone; 0 places its servers on the trainer's GPUs."""

    @property
    def gpus(self) -> int:
        """Of the trainer."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, config=_STRICT)
class Config:
    """A whole run."""

    name: str = "run"
    runs: str = "runs"
    """Folder in which the run's folder is made."""
    seed: int = 0
    steps: int = Field(default=100, gt=0)
    model: Model = Model()
    corpus: Corpus = Corpus()
    selfplay: SelfPlay = SelfPlay()
    rollout: Rollout = Rollout()
    policy: Policy = Policy()
    heldout: HeldOut = HeldOut()
    record: Record = Record()
    cluster: Cluster = Cluster()


_ADAPTER = TypeAdapter(Config)


def load_config(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe (a name in `recipes/` or a path), apply `key=value` overrides, validate."""
    values = _read(_find(recipe))
    for override in overrides:
        _set(values, override)
    return parse_config(values, where=recipe)


def parse_config(values: Mapping[str, Any], where: str = "config") -> Config:
    try:
        config = _ADAPTER.validate_python(values)
    except ValidationError as error:
        problems = "\n".join(_explain(e["loc"], e["type"], e["msg"]) for e in error.errors())
        raise ConfigError(f"{where} is not a valid configuration:\n{problems}") from None
    _contradictions(config, where)
    return config


def dump_config(config: Config) -> str:
    """YAML of every key, defaults included: `parse_config(yaml.safe_load(text)) == config`."""
    return yaml.safe_dump(_ADAPTER.dump_python(config, mode="json"), sort_keys=False)


def _contradictions(config: Config, where: str) -> None:
    """Combinations of valid values that cannot work."""
    play, faults = config.selfplay, []
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
    if play.leftovers == "carry" and not play.max_staleness:
        faults.append(
            "selfplay.leftovers=carry trains on samples of the step before: set selfplay.max_staleness=1 or more"
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
    if config.policy.layout.sequence and config.policy.layout.tensor == 1:
        faults.append("policy.layout.sequence needs policy.layout.tensor > 1")
    if play.beyond.questioner_baseline == "ema" and play.beyond.questioner_peers != "task":
        faults.append(
            "selfplay.beyond.questioner_baseline=ema compares with the past of a task, not with peers: leave"
            " selfplay.beyond.questioner_peers=task"
        )
    if longer := [
        stage.tokens for stage in play.beyond.stages if stage.tokens > config.corpus.cluster_tokens
    ]:
        faults.append(
            f"selfplay.beyond.stages reach {longer[0]} tokens, clusters have corpus.cluster_tokens="
            f"{config.corpus.cluster_tokens} at most: raise it to the last stage"
        )
    if "@" in play.external_judge.url:
        faults.append(
            "selfplay.external_judge.url holds a password, which would be written into the run's folder: put the key"
            " into the environment, as SPELL_JUDGE_KEY"
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


def _find(recipe: str) -> Path:
    for path in (RECIPES / f"{recipe}.yaml", Path(recipe)):
        if path.is_file():
            return path
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise ConfigError(
        f"no recipe {recipe!r}{_nearest(recipe, names)}; recipes: {', '.join(names)} (or give a path)"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, found {type(values).__name__}")
    base = values.pop("inherit", None)
    if base is None:
        return values
    return _merge(
        _read(path.parent / f"{base}.yaml" if (path.parent / f"{base}.yaml").is_file() else _find(base)),
        values,
    )


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        old = base.get(key)
        base[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return base


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override is key=value, found {override!r}")
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {parent!r} is a value, not a section")
    try:
        values[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {error}") from None


def _explain(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(map(str, loc))
    if kind == "unexpected_keyword_argument":
        *parents, leaf = loc
        return f"  unknown key {key!r}{_nearest(str(leaf), _fields(parents), _prefix(parents))}"
    return f"  {key}: {message[0].lower()}{message[1:]}"


def _fields(parents: Iterable[int | str]) -> list[str]:
    """Field names of the section that a path of keys leads to."""
    node: Any = Config()
    for parent in parents:
        node = node[0] if isinstance(parent, int) else getattr(node, parent, None)
    return [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []


def _prefix(parents: Iterable[int | str]) -> str:
    return "".join(f"{parent}." for parent in parents)


def _nearest(word: str, words: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""
