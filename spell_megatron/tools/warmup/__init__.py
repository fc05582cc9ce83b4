"""How a generated world's seed model comes to be: it starts half wired, then learns supervised lessons."""

from spell_megatron.tools.warmup.seed import make_seed_model

__all__ = ["make_seed_model"]
