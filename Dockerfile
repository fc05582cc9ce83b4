# The GPU image of spell-megatron. The tests have no GPU and no CUDA toolkit, so this cannot be built there: they
# compare the versions below with requirements/cpu.lock, and the build itself is untested.
#
#   docker build --tag spell-megatron:latest .
#   enroot import --output spell-megatron.sqsh dockerd://spell-megatron:latest

ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-cudnn-devel-ubuntu24.04

ARG TORCH=2.13.0
ARG VLLM=0.32.0
# Fused layers and FP8; the learner runs on plain torch without it. Empty leaves it out.
ARG TRANSFORMER_ENGINE=2.20.2
# FlashAttention 3 with its backward pass, which PyPI does not have: the commit of its repository that calls itself 3.0.0
# (the tags of version 2 that hold it do not build with CUDA 13). Built for Hopper alone, in about an hour; empty leaves
# it out, and attention to torch's version 2.
ARG FLASH_ATTENTION_3=e2743ab5b3803bb672b16437ba98a3b1d4576c50
# The exchange of experts within a node: a tag of DeepEP's repository, which PyPI does not have either. Empty leaves it
# out, and the exchange to NCCL.
ARG DEEPEP=v1.2.1

RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3.12 python3.12-dev python3.12-venv git ninja-build \
      libibverbs-dev \
 && rm -rf /var/lib/apt/lists/*

RUN python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/spell-megatron
COPY requirements requirements

# vLLM brings the CUDA builds of torch's family, and asks for a tvm-ffi of its own. Everything else that the lock names
# gets the lock's version.
RUN grep --invert-match --extended-regexp '^(torch|vllm|apache-tvm-ffi)' requirements/cpu.lock > /tmp/constraints.txt \
 && pip install --no-cache-dir --constraint /tmp/constraints.txt "torch==${TORCH}" "vllm==${VLLM}" \
      megatron-core transformers setuptools wheel

RUN test -z "${TRANSFORMER_ENGINE}" \
 || NVTE_FRAMEWORK=pytorch pip install --no-cache-dir --no-build-isolation --constraint /tmp/constraints.txt \
      "transformer-engine[pytorch]==${TRANSFORMER_ENGINE}"

RUN test -z "${FLASH_ATTENTION_3}" \
 || FLASH_ATTENTION_DISABLE_SM80=TRUE FLASH_ATTENTION_DISABLE_FP8=TRUE MAX_JOBS=8 \
    pip install --no-cache-dir --no-build-isolation --no-deps \
      "git+https://github.com/Dao-AILab/flash-attention@${FLASH_ATTENTION_3}#subdirectory=hopper"

# CUDA 13 keeps libcu++ in a folder that is not searched, and torch brings NVSHMEM.
RUN test -z "${DEEPEP}" \
 || CPLUS_INCLUDE_PATH=/usr/local/cuda/include/cccl TORCH_CUDA_ARCH_LIST=9.0 \
    pip install --no-cache-dir --no-build-isolation --no-deps \
      "git+https://github.com/deepseek-ai/DeepEP@${DEEPEP}"

COPY . .
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt --no-build-isolation .

# A job's ranks start in a folder of the run, with this Python.
WORKDIR /
CMD ["spell-megatron", "doctor"]
