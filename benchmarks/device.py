"""What the measurements of one device share: its clock, its name, models of real width with few layers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spell_megatron.config import SamplingConfig
from spell_megatron.policy.head import Sampled
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.catalogue import architecture

G = 8
"""Answers of a group."""
LENGTHS = (4096, 16_384, 32_768, 100_000)
ASSUMED = Assumptions()
PEAK = ASSUMED.peak_flops
"""bfloat16 operations a second that an H100 SXM is sold with."""
SAMPLED = Sampled(SamplingConfig().temperature, SamplingConfig().top_p)
"""What every recipe samples from."""


def random_model(name: str, layers: int, folder: Path) -> Path:
    """Write so many layers of a model that the planner knows, with random weights in bfloat16."""
    config = AutoConfig.from_pretrained(architecture(name), num_hidden_layers=layers)
    if "layer_types" in config.to_dict():
        config.layer_types = config.layer_types[:layers]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def device_name() -> str:
    """The device that everything here runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
