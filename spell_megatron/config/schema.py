"""Every key, with its type, its range and its meaning. No torch.

Defaults are the values of the paper's section 4.1 (arXiv 2509.23863). Where the paper and its authors' code differ,
docs/recipes.md says which one is the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from spell_megatron.config.reading import Location, RecordName

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
EVERY_TEXT = "*"
"""As `text_field`: every text of a row, wherever in it, is a text of its own."""

Dtype = Literal["float32", "bfloat16"]
TaskName = Annotated[str, RecordName("task", ("doc_general_qa", "docmath_qa", "doc_mc"))]
RoleName = Annotated[str, RecordName("role", ("questioner", "responder", "verifier"))]
SchemeName = Annotated[str, RecordName("scheme of advantages", ("standardised", "centred", "leave_one_out"))]
SurrogateName = Annotated[str, RecordName("loss", ("clipped",))]
EngineName = Annotated[str, RecordName("engine", ("vllm",))]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The model that is trained, and how it is asked."""

    path: Location = ""
    """A Hugging Face model folder, a hub id, or `toy-seed` or `hard-seed`, the models that are shipped."""
    families: tuple[str, ...] = ()
    """Your own families of models, by import path: `[my_package.families:MINE]` (docs/models.md)."""
    prompts: Location = "full"
    """Prompt templates: `full` for real models, `short` for the toy model, or your own folder (docs/prompts.md)."""
    language: str = "English"
    """In which the questioner is to write; the documents' own where empty."""
    answer_form: Literal["sentence", "box", "tag"] = "sentence"
    """How the responder is to state its answer: "The correct answer is (…).", `\\boxed{…}` or `<answer>…</answer>`."""
    thinking: bool = False
    """The model reasons inside `<think>…</think>` before it answers."""


@dataclass(frozen=True, config=_STRICT)
class SourceConfig:
    """Documents of one kind, and what is asked about them."""

    path: Location = "toy"
    """`toy`, `hard` or `hard-small` (generated worlds), a folder or a file of texts or rows (docs/corpora.md has the
    types), or a hub id `org/name`, `org/name:pattern`."""
    domain: str = ""
    """Name of the domain in metrics; the path's last part where empty."""
    tasks: tuple[TaskName, ...] = ("doc_general_qa", "docmath_qa", "doc_mc")
    """Tasks that make sense on these documents; one of your own by its import path, `my_package.tasks:Table`."""
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
class CorpusConfig:
    """What the questioner reads."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    """Where documents come from; at least one."""
    benchmarks: tuple[str, ...] = ()
    """Files or folders of benchmarks: documents that repeat one of theirs, or hold a question, are left out."""
    cluster_tokens: int = Field(default=16_000, gt=0)
    """Clusters are filled up to this many tokens."""
    max_documents: int = Field(default=20, gt=0)
    """At most this many documents in one cluster."""
    toy_clusters: int = Field(default=20_000, gt=0)
    """Clusters of a generated world (`toy`, `hard`, `hard-small`) before it repeats."""


@dataclass(frozen=True, config=_STRICT)
class SamplingConfig:
    """How rollouts are drawn; the learner computes log-probs of the same distribution."""

    temperature: float = Field(default=0.7, gt=0)
    """Temperature of rollouts that are trained on: at 0 there would be no distribution to take log-probs of."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Share of the probability that the sampled nucleus holds; 1 samples from everything."""
    questioner_tokens: int = Field(default=4096, gt=0)
    """Tokens of its longest reply."""
    responder_tokens: int = Field(default=4096, gt=0)
    """The same of the responder."""
    verifier_tokens: int = Field(default=4096, gt=0)
    """The same of the verifier."""


@dataclass(frozen=True, config=_STRICT)
class ExternalJudgeConfig:
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
    """Seconds that one reply may take."""
    tries: int = Field(default=4, gt=0)
    """Attempts at one question to it. What fails then is counted, and an episode that needs it is dropped."""
    max_tokens: int = Field(default=4096, gt=0)
    """Tokens of one reply at most."""


@dataclass(frozen=True, config=_STRICT)
class StageConfig:
    """From a step on, clusters of so many tokens."""

    step: int = Field(default=0, ge=0)
    """Its first step."""
    tokens: int = Field(default=16_384, gt=0)
    """Tokens of its clusters, instead of `corpus.cluster_tokens`."""


@dataclass(frozen=True, config=_STRICT)
class BeyondConfig:
    """What others found and the paper does not have. All off by default; docs/recipes.md names the sources."""

    evidence: float = Field(default=0.0, ge=0)
    """Weight of naming the documents that the questioner read, in the responder's advantages; 0 does not ask for it."""
    answerability: int | None = Field(default=None, ge=0)
    """Distractors among which the questioner's documents must let a responder answer, or the question is dropped."""
    noted: bool = False
    """A question is malformed where its questioner did not write down the answer before it: it was not looked up."""
    quoted: bool = False
    """A question is malformed where its answer was not quoted: where a sentence that its questioner wrote first, or a
    name in it, is not in the documents. For questioners that quote, and think between <think> tags if at all."""
    outvoting: bool = False
    """A question earns nothing, and its responses are not trained on, where most of them agree on another answer than
    its reference."""
    peak: float = Field(default=0.5, gt=0, lt=1)
    """Mean reward of its responses at which a question earns most; the paper's is 0.5. The higher, the more of the
    questions that pay have a true reference."""
    negatives_below: float | None = Field(default=None, gt=0)
    """Negative advantages count only while the batch's entropy, in nats a token, is at most this."""
    std: Literal["group", "task", "batch"] = "group"
    """Whose standard deviation divides advantages: that of the samples compared, of the task or of the role in all."""
    questioner_peers: Literal["task", "task_documents"] = "task"
    """Whom a question is compared with: those of its task, or of them those about as many documents."""
    questioner_baseline: Literal["batch", "ema"] = "batch"
    """`ema` compares a question with a running mean of its task over the steps."""
    stages: tuple[StageConfig, ...] = ()
    """Shorter clusters first: `[{step: 0, tokens: 16000}, {step: 40, tokens: 60000}]`."""


@dataclass(frozen=True, config=_STRICT)
class SelfPlayConfig:
    """The algorithm: who plays, what is kept, what it earns."""

    sampling: SamplingConfig = SamplingConfig()
    roles: tuple[RoleName, ...] = ("questioner", "responder", "verifier")
    """Who takes part in an episode, in the order of play; one of your own by its import path."""
    advantage: SchemeName = "standardised"
    """How rewards of comparable samples become advantages: `standardised` (GRPO), `centred` (Dr. GRPO, undivided),
    `leave_one_out` (RLOO), or your own by its import path."""
    questions: int = Field(default=128, gt=0)
    """N: kept questions that make one batch."""
    round_questions: int = Field(default=480, gt=0)
    """Questions asked per round of dynamic sampling."""
    max_rounds: int = Field(default=10, gt=0)
    """Rounds before a step gives up filling its batch."""
    whole_rounds: bool = False
    """Ask all questions of the round that fills the batch, as the authors' code does: those kept beyond `questions` are
    remembered and not trained on. Else a step ends with the question that fills it, and the next goes on from there."""
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
    """The questioner's reward by its responders' mean reward r: `gaussian` is highest at `beyond.peak`,
    `reverse` is 1 - r, `linear` is 1 - 2 abs(r - 0.5)."""
    questioner_sigma: float = Field(default=0.5 / 3, gt=0)
    """Width of `gaussian`."""
    bad_format_reward: float = Field(default=-1.0, le=0)
    """The questioner's, for a reply that holds no question."""
    bad_ground_reward: float = Field(default=-0.5, le=0)
    """The questioner's, for a question that is answered without the documents."""
    combine: Literal["max", "mean", "min", "sum"] = "max"
    """How rule and verifier make the responder's reward; `sum` takes `train_questioner=false` and `memory=0`."""
    verdict: Literal["majority", "first"] = "majority"
    """What G votes on a response say: `first` is one voter's word, the ablation without a majority vote."""
    vote_tie: Literal["absent", "no", "first"] = "absent"
    """As many YES as NO: no verdict, NO as in the paper (more than half must agree), or the first vote as in the
    authors' code."""
    invalid_vote_reward: float = Field(default=-1.0, le=0)
    """Reward of a verdict that is neither YES nor NO: -1 as in the authors' code, 0 as in the paper."""
    verifier_consistency: Literal["maj_cons", "maj"] = "maj_cons"
    """`maj_cons` trains only verdicts whose majority agrees with the rule."""
    verifier_agreement: tuple[Share, Share] = (0.51, 0.99)
    """A verifier group is used iff the share of valid votes with the majority lies in this range."""
    verifier_share: float | None = Field(default=None, ge=0)
    """Verifier samples per responder sample; 1/G where not given."""
    failure_ratio: float = Field(default=1.0, ge=0)
    """Sampled failures of the questioner per kept question."""
    train_questioner: bool = True
    """Train on the questioner's samples; without it they are only played."""
    train_verifier: bool = True
    """Train on the verifier's samples."""
    judge: bool = True
    """Ask the verifier at all; without it the rule alone rewards the responder, and no verdict is trained on."""
    external_judge: ExternalJudgeConfig = ExternalJudgeConfig()
    beyond: BeyondConfig = BeyondConfig()
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
class ServersConfig:
    """A fleet of vLLM servers instead of the engine inside the trainer's process."""

    count: int = Field(default=0, ge=0)
    """Servers started on each node of the trainer; 0 (and no `urls`) keeps the engine in the trainer's process, or
    starts one where that cannot be: with several ranks, or `selfplay.max_staleness` above 0."""
    urls: tuple[str, ...] = ()
    """Servers that somebody else started, besides."""
    secret_file: Location = ""
    """A file with the secret that the servers of `urls` ask for, readable by its user alone."""
    tensor: int = Field(default=1, gt=0)
    """Tensor-parallel size of each started server."""
    host: str = "127.0.0.1"
    """Address that servers which `launch` starts on other nodes, and the trainer's end of a transfer, listen on; the
    trainer's own servers have a Unix socket."""
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
class RolloutConfig:
    """The engine that generates."""

    kind: EngineName = "vllm"
    """Which engine: vLLM, or your own by its import path (docs/extending.md)."""
    dtype: Dtype = "bfloat16"
    """Precision of the engine's weights."""
    max_model_len: int = Field(default=22_528, gt=0)
    """Tokens of the longest prompt with its reply."""
    max_num_seqs: int = Field(default=256, gt=0)
    """Sequences that one engine generates at once."""
    max_batched_tokens: int = Field(default=16_384, gt=0)
    """Tokens of one forward pass of the engine."""
    kv_cache_mib: int | None = Field(default=None, gt=0)
    """KV cache in MiB; where not given, the share of GPU memory below."""
    gpu_memory: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that the engine takes."""
    eager: bool = False
    """Run the engine without CUDA graphs and compilation: a quick start, slower tokens."""
    placement: Literal["auto", "colocated", "disaggregated"] = "auto"
    """`colocated`: trainer and engine take turns in the memory of the same GPUs. `disaggregated`: the engines have GPUs
    of their own, a part of each node's where no nodes are theirs (`cluster.engine_nodes`). `auto`: colocated on GPUs
    that both would use, unless rollouts overlap with training (`selfplay.max_staleness`)."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further engine arguments of vLLM, by its own names: `{enable_expert_parallel: true, moe_backend: triton}`."""
    engine_environment: dict[str, str] = Field(default_factory=dict)
    """Further environment variables of vLLM's (`VLLM_…`) for the servers that are started."""
    servers: ServersConfig = ServersConfig()


@dataclass(frozen=True, config=_STRICT)
class LayoutConfig:
    """How the model is cut over ranks. What is left of the world size is data-parallel."""

    tensor: int = Field(default=1, gt=0)
    """Tensor-parallel ranks (TP)."""
    sequence: bool = False
    """Sequence parallel: activations outside attention and MLP are sharded over the TP group."""
    pipeline: int = Field(default=1, gt=0)
    """Pipeline stages (PP)."""
    virtual_pipeline: int | None = Field(default=None, gt=0)
    """Model chunks per pipeline rank (interleaved schedule)."""
    context: int = Field(default=1, gt=0)
    """Context-parallel ranks (CP), which share a stream's tokens."""
    expert: int = Field(default=1, gt=0)
    """Expert-parallel ranks (EP), which share a layer's experts."""
    expert_tensor: int = Field(default=1, gt=0)
    """Tensor-parallel ranks inside an expert."""


@dataclass(frozen=True, config=_STRICT)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = Field(default=2e-6, gt=0)
    """Learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises to `lr`; the first one trains, too."""
    decay_steps: int = Field(default=0, ge=0)
    """Cosine decay to `min_lr` that ends at this step, the last one if `min_lr` is 0; 0 keeps the rate constant."""
    min_lr: float = Field(default=0.0, ge=0)
    """The rate that the decay ends at."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Gradients are scaled to this global norm where theirs is larger."""
    max_growth: float = Field(default=2.0, gt=1)
    """Times the norm of a rank's weights may grow in one update, which is a wreck beyond that and never saved; training
    changes it by thousandths."""
    distributed: bool = False
    """Shard optimizer state over data-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction with the backward pass, and the gathering of parameters with the forward pass of a
    batch's next minibatch; after its last one they are waited for."""
    cpu_offload: bool = False
    """Keep optimizer state and float32 master weights in host memory, and step there."""


@dataclass(frozen=True, config=_STRICT)
class LossConfig:
    """From advantages to gradients."""

    surrogate: SurrogateName = "clipped"
    """What of the policy is differentiated: `clipped` (PPO/GRPO; GSPO by `ratio`), or your own by its import path."""
    clip_low: float = Field(default=0.2, gt=0)
    """Ratios below 1 - this are clipped."""
    clip_high: float = Field(default=0.2, gt=0)
    """Ratios above 1 + this are clipped."""
    ratio: Literal["token", "sequence"] = "token"
    """`token` is PPO/GRPO; `sequence` is GSPO: one length-normalised ratio a response."""
    normalisation: Literal["token_mean", "group_mean", "sequence_length"] = "token_mean"
    """How tokens of long answers count. `token_mean`: every token of the batch alike, so that long answers weigh more.
    `group_mean`, the paper's E.3: every group (prompt) alike, and within it every token. `sequence_length` is Dr. GRPO:
    a constant denominator, `max_response_tokens` a response."""
    max_response_tokens: int = Field(default=4096, gt=0)
    """Denominator of `sequence_length`."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Truncated importance weights: engine-learner probability ratio capped at this value."""
    kl: float = Field(default=0.0, ge=0)
    """Coefficient of KL(policy ‖ reference), k3 estimator; the reference is loaded only if > 0."""
    entropy: float = Field(default=0.0, ge=0)
    """Coefficient of an entropy bonus."""


@dataclass(frozen=True, config=_STRICT)
class FusionsConfig:
    """Kernels that do several operations at once. They are Transformer Engine's: without it none is used."""

    permute: bool = True
    """Tokens are sorted by expert, and put back, in one pass each, which the host does not wait for."""
    rope: bool = True
    """Queries and keys are rotated in one pass."""
    weight_gradients: bool = True
    """A layer's product adds its weight's gradient to the float32 sum itself."""


@dataclass(frozen=True, config=_STRICT)
class PolicyConfig:
    """The learner."""

    layout: LayoutConfig = LayoutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    dtype: Dtype = "bfloat16"
    """Precision of the weights in computation; gradients and master weights are float32. A resumed run that changes it
    goes on from the float32 weights of its checkpoint."""
    spec: Literal["auto", "torch", "te"] = "auto"
    """Layers from torch or from Transformer Engine; `auto` takes TE on CUDA where it is installed, except for
    float32, which it multiplies in TF32."""
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = "off"
    """Products of the layers' matrices in FP8, scaled by this recipe of Transformer Engine. What `delayed` scales by,
    the largest values of earlier products, is in no checkpoint: a resumed run begins without and is not bit-equal."""
    attention: Literal["auto", "fa2", "fa3"] = "auto"
    """Flash kernel on a GPU: `auto` takes FlashAttention 3 on Hopper where its backward pass is installed, and torch's
    own, which is version 2, elsewhere."""
    fusions: FusionsConfig = FusionsConfig()
    dispatcher: Literal["auto", "alltoall", "deepep", "hybridep"] = "auto"
    """Who sends tokens to experts: NCCL's all-to-all, or kernels of DeepEP's, which send a token once to each GPU.
    `auto` takes those on a GPU where they are installed and a layer's experts lie within a node."""
    deterministic: bool = False
    """Bit-equal results on a GPU too, and so of a resumed run; slower. A CPU's always are."""
    recompute: Literal["none", "all_but_attention", "full"] = "none"
    """What a layer computes again in the backward pass, from its input. `all_but_attention` also keeps
    attention's output, a tensor as large as the input: the longer a stream, the more time it saves."""
    recompute_layers: int | None = Field(default=None, ge=1)
    """Layers of a pipeline stage (of a chunk, where it has several) that do so, counted from the first; all by default.
    The others keep what they compute."""
    offload_layers: int = Field(default=0, ge=0)
    """How many of those others keep it in host memory; at least one keeps it on the GPU. The copies hide behind the
    layers between them where there are enough of these and streams are long."""
    stream_tokens: int = Field(default=32_768, gt=0)
    """Token budget of one packed stream (microbatch), over all context-parallel ranks."""
    share_prompts: bool = True
    """Compute a group's prompt once for all its responses."""
    head_chunk: int = Field(default=1024, gt=0)
    """Response tokens whose logits exist at the same time."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer updates per batch, whose groups are dealt to them in turns; 1 is strictly on-policy."""
    freeze_router: bool = False
    """Leave the routers of experts as they are. A run that has done so cannot train them when it is resumed: nothing is
    known of their moments."""
    router_dtype: Literal["model", "float32"] = "model"
    """Router logits are computed in float32, and `model` rounds them to `dtype` as vLLM does, which decides by them."""
    router_replay: bool = False
    """Send tokens to the experts that the engine chose. It must tell them, which vLLM does on CUDA alone."""
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """A collective that takes longer fails."""

    @property
    def prefers_te(self) -> bool:
        """Layers are Transformer Engine's where it is there."""
        return self.spec == "te" or (self.spec == "auto" and self.dtype == "bfloat16")

    @property
    def master_weights(self) -> bool:
        """The optimizer has float32 weights of its own, beside those in computation."""
        return self.dtype != "float32"


@dataclass(frozen=True, config=_STRICT)
class HeldOutConfig:
    """Questions that are measured and never trained on."""

    every: int = Field(default=0, ge=0)
    """Measure every n steps, besides before and after the run; 0 only there."""
    questions: int = Field(default=0, ge=0)
    """Held-out questions; 0 switches the measurement off."""
    path: Location = "toy"
    """`toy`, `hard` or `hard-small` (a generated world's own), or a JSONL file of task, question, answer, options,
    documents, labels."""
    samples: int = Field(default=8, gt=0)
    """Answers to each question."""
    seed: Seed = 12345
    """Seed of the questions and their answers."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks of `spell-megatron eval` to measure besides, on the live engines, as often."""
    data: Location = ""
    """Folder of the benchmarks' data sets; downloaded where empty."""
    max_input: int = Field(default=16_384, ge=16)
    """Tokens to which long-context benchmarks are truncated."""
    limit: int | None = Field(default=None, gt=0)
    """The first items of each benchmark alone."""


@dataclass(frozen=True, config=_STRICT)
class RecordConfig:
    """What a run writes, keeps and watches."""

    group_readable: bool = False
    """Whether the run's files are open to their group; to others they never are."""
    wandb: str = ""
    """A Weights & Biases project; empty switches it off."""
    checkpoint_every: int = Field(default=1, ge=0)
    """Steps between checkpoints; 0 writes only the last."""
    keep_last: int = Field(default=2, gt=0)
    """Checkpoints that stay; older ones are removed."""
    keep_every: int = Field(default=0, ge=0)
    """Besides the last ones, checkpoints of every n-th step are kept for good, a multiple of `checkpoint_every`; 0
    keeps none."""
    async_save: bool = True
    """Write checkpoints while the next step goes on, from a copy in host memory of what the rank writes."""
    mismatch_bound: float = Field(default=0.1, gt=0)
    """Mean engine-learner log-prob difference that is too much: in nats, over tokens of the learner's own weights."""
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
class ClusterConfig:
    """The machines of a run: read by the planner, by the launchers, and for who computes where. A launched run has
    those that it really got."""

    nodes: int = Field(default=1, gt=0)
    """Nodes of the trainer."""
    gpus_per_node: int = Field(default=8, gt=0)
    """GPUs of each node."""
    gpu_memory_gib: float = Field(default=79.6, gt=0)
    """GiB of one GPU; an H100-80GB reports 79.6."""
    engine_nodes: int = Field(default=0, ge=0)
    """Nodes of the rollout engine alone; 0 places its servers on the trainer's GPUs."""

    @property
    def gpus(self) -> int:
        """GPUs of the trainer's nodes: its ranks, unless engines have some for themselves."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, config=_STRICT)
class Config:
    """The name of a run, its length, and the sections below."""

    name: str = "run"
    """Begins the name of the run's folder."""
    runs: Location = "runs"
    """Folder in which the run's folder is made."""
    seed: Seed = 0
    """Seed of everything that is drawn: clusters, tasks, samples."""
    steps: int = Field(default=100, gt=0)
    """Rollout batches, each with its update."""
    model: ModelConfig = ModelConfig()
    corpus: CorpusConfig = CorpusConfig()
    selfplay: SelfPlayConfig = SelfPlayConfig()
    rollout: RolloutConfig = RolloutConfig()
    policy: PolicyConfig = PolicyConfig()
    heldout: HeldOutConfig = HeldOutConfig()
    record: RecordConfig = RecordConfig()
    cluster: ClusterConfig = ClusterConfig()
