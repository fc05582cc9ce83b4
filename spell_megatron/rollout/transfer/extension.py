"""Loaded by every vLLM worker (`--worker-extension-cls`): makes our transfer backend known to it."""

from __future__ import annotations

from spell_megatron.rollout.transfer import gloo

gloo.register()


class Extension:
    """Adds nothing to the worker; being imported is the point."""
