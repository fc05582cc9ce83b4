"""SPELL on Megatron: label-free self-play reinforcement learning for long-context language models."""

__version__ = "0.2.0"
