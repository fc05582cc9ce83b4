"""Which flash kernel torch's operators call on a GPU: FlashAttention 2, which torch has, or 3, where it is installed.

Version 3 is for Hopper and half as fast again. PyPI has only its forward pass (fa3-fwd): the Dockerfile builds both.
"""

from __future__ import annotations

import importlib
import logging
from typing import Literal

import torch

from spell_megatron.types import SpellError

_MODULE = "flash_attn_interface"
_log = logging.getLogger(__name__)


def choose(wanted: Literal["auto", "fa2", "fa3"]) -> str:
    """Have torch call the kernel that is wanted, in this process, and return its name. SpellError where `fa3` is asked
    for and cannot be; `auto` takes it where it can be."""
    if not torch.cuda.is_available():
        return "torch's CPU kernel"
    why_not = without_fa3() if wanted != "fa2" else "policy.attention=fa2"
    if wanted == "fa3" and why_not:
        raise SpellError(f"policy.attention=fa3 cannot be: {why_not}. Set policy.attention=auto, or build it")
    if why_not:
        name = "FlashAttention 2"
        _restore()
    else:
        name = "FlashAttention 3"
        torch.nn.attention.activate_flash_attention_impl("FA3")
    _log.info("attention is computed by %s%s", name, f" ({why_not})" if why_not else "")
    return name


def without_fa3() -> str:
    """Why FlashAttention 3 cannot be used here; empty where it can."""
    if torch.cuda.get_device_capability()[0] != 9:
        return f"FlashAttention 3 is for Hopper, and this is {torch.cuda.get_device_name()}"
    try:
        importlib.import_module(_MODULE)
    except ImportError:
        return f"FlashAttention 3 ({_MODULE}) is not installed"
    if not hasattr(torch.ops.flash_attn_3, "bwd"):
        return f"{_MODULE} has no backward pass"
    return ""


def _restore() -> None:
    if torch.nn.attention.current_flash_attention_impl() is not None:
        torch.nn.attention.restore_flash_attention_impl()
