"""Everything the planner takes for granted, in one place: a plan prints what it used."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Assumed: H100 SXM nodes with NVLink, one 400 Gb/s network card a GPU, and what a run's texts are like."""

    peak_flops: float = 989e12
    """Dense bfloat16 operations a second of one GPU."""
    memory_rate: float = 3.35e12
    """Bytes a second of its memory."""
    node_rate: float = 450e9
    """Bytes a second that a GPU sends inside its node."""
    network_rate: float = 50e9
    """Bytes a second that a GPU sends to other nodes."""
    host_rate: float = 25e9
    """Bytes a second between one GPU and host memory, all GPUs of the node at once."""
    pinned_rounding: float = 1.44
    """Bytes of pinned host memory for one that is asked for: torch rounds up to a power of two, 1 / ln 2 on average."""
    file_rate: float = 2e9
    """Bytes a second between one node and the file system of the run's folder; checkpoints are digested as fast."""
    save_seconds: float = 0.3
    """Seconds of a save, besides copying: every rank looks up its parts and they agree to begin (0.2 s seen on a CPU
    for one of 32 ranks of Qwen3-30B-A3B)."""
    flash: bool = True
    """Whether a flash kernel of a GPU computes attention, and takes memory for it."""
    fa2_forward: float = 330e12
    """Operations a second of attention, by kernel, head dimension 128 and 16K tokens: arXiv 2407.08608, figure 5 with a
    causal mask, and figure 6, which has none; rounded down. Here 335 (370 without the mask)."""
    fa2_backward: float = 300e12
    """There 322."""
    fa3_forward: float = 600e12
    """There 616 (648 without the mask); at 8K 685 (github.com/meta-pytorch/tritonbench, pull request 1267)."""
    fa3_backward: float = 500e12
    """There 561 and 539."""
    dense_rate: float = 600e12
    """Rate of large products in bfloat16, clocks under load: three fifths of peak; an estimate."""
    grouped_rate: float = 450e12
    """Rate of Transformer Engine's grouped products, thousands of rows an expert; an estimate."""
    looped_rate: float = 300e12
    """Rate of one product after another, an expert each; an estimate."""
    float32_rate: float = 40e12
    """Rate of products and attention in float32, outside of tensor cores: three fifths of the 67 TFLOP/s of NVIDIA's
    data sheet of the H100 SXM; an estimate."""
    memory_efficiency: float = 0.8
    """Share of the GPU's memory rate that passes over large tensors reach; an estimate."""
    atomics: float = 11.0
    """What a sum by atomics in bfloat16 costs, as passes over what is summed; 250 GB/s, an estimate."""
    logit_bytes: float = 229.0
    """Read and written for every logit, forward and backward: counted in `tests/policy/test_cuda.py`."""
    scored_logit_bytes: float = 96.0
    """The same of a forward pass alone: counted in the same way."""
    nucleus_bytes: float = 67.0
    """Besides, for the nucleus, in the forward pass: counted there."""
    exchange_efficiency: float = 0.6
    """Share of what a link reaches otherwise that NCCL's all-to-all of uneven parts reaches; an estimate. DeepEP's
    kernels are taken to reach it whole (its README has 153 of 160 GB/s on an H800), but to hide behind nothing."""
    prefill_efficiency: float = 0.40
    """Share of peak operations that an engine reaches in reading prompts; an estimate."""
    link_efficiency: float = 0.7
    """Share of a link's rate, and of memory's rate in decoding, that is reached."""
    decode_seconds: float = 0.008
    """Least time of one decoding step: launches, sampling, scheduling."""
    tensor_seconds: float = 100e-6
    """Seconds of a resync, for each tensor: launches of its gathering and its copies, and vLLM's loading of it."""
    bucket_seconds: float = 0.01
    """The same for each bucket of tensors: ranks that meet, a request to a server and its answer."""
    response_fill: float = 0.25
    """Mean length of a question or a response with its reasoning, as a share of its limit."""
    verdict_fill: float = 0.1
    """The same of the verifier's."""
    reading_share: float = 0.75
    """Share of its cluster that the questioner reads, the memory included."""
    grounded_share: float = 0.75
    """Share of the asked questions that reach the responders."""
    template_tokens: int = 800
    """What a prompt has besides documents; about a whole prompt of the verifier."""
    expert_imbalance: float = 1.25
    """Tokens of the busiest expert-parallel rank over the mean."""
    trainer_gib: float = 3.0
    """CUDA context, NCCL and cuBLAS buffers of a trainer process."""
    engine_gib: float = 2.0
    """The same of an engine process that is awake, captured graphs included."""
    asleep_gib: float = 1.2
    """What an engine process keeps while it sleeps."""
    fragmentation: float = 0.06
    """Share of the activations' bytes that the allocator loses."""

    def describe(self) -> list[str]:
        return [
            f"GPU: {self.peak_flops / 1e12:.0f} TFLOP/s bf16, memory {self.memory_rate / 1e12:.2f} TB/s, "
            f"NVLink {self.node_rate / 1e9:.0f} GB/s, network {self.network_rate / 1e9:.0f} GB/s, host "
            f"{self.host_rate / 1e9:.0f} GB/s; links and memory reach {self.link_efficiency:.0%} of it",
            f"TFLOP/s: FlashAttention 2 {_tera(self.fa2_forward)} and {_tera(self.fa2_backward)} backward, 3 "
            f"{_tera(self.fa3_forward)} and {_tera(self.fa3_backward)} (arXiv 2407.08608, rounded down); "
            f"products {_tera(self.dense_rate)}, grouped {_tera(self.grouped_rate)}, in a loop "
            f"{_tera(self.looped_rate)}, all in float32 {_tera(self.float32_rate)} (estimates)",
            "the image of the Dockerfile: Transformer Engine, FlashAttention 3 unless policy.attention=fa2, and DeepEP"
            " where experts lie within a node unless policy.dispatcher=alltoall",
            f"passes over memory reach {self.memory_efficiency:.0%} of its rate; a logit takes "
            f"{self.logit_bytes:.0f} bytes of them, its nucleus {self.nucleus_bytes:.0f}; an all-to-all of experts "
            f"reaches {self.exchange_efficiency:.0%} of what links do",
            f"reading prompts reaches {self.prefill_efficiency:.0%} of peak; a decoding step takes "
            f"{self.decode_seconds * 1e3:.0f} ms or more",
            f"a resync takes {self.tensor_seconds * 1e6:.0f} us for a tensor and {self.bucket_seconds * 1e3:.0f} ms for"
            " a bucket of them, besides moving bytes",
            f"files: a node reads and writes {self.file_rate / 1e9:g} GB/s; a save takes {self.save_seconds:g} s"
            " besides copying",
            f"texts: questions and responses reach {self.response_fill:.0%} of their limit, verdicts "
            f"{self.verdict_fill:.0%}; the questioner reads {self.reading_share:.0%} of a cluster; "
            f"{self.grounded_share:.0%} of the questions reach the responders",
            f"beside tensors: trainer {self.trainer_gib:g} GiB, engine {self.engine_gib:g} GiB awake and "
            f"{self.asleep_gib:g} GiB asleep, {self.fragmentation:.0%} of activations lost to fragmentation; "
            f"the busiest rank's experts get {self.expert_imbalance:g} × the mean",
        ]


def _tera(rate: float) -> str:
    return f"{rate / 1e12:.0f}"
