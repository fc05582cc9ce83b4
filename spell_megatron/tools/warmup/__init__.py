"""How the toy world's seed model comes to be: born half wired, then taught by supervised lessons."""

from spell_megatron.tools.warmup.seed import RECIPE, Recipe, make_seed_model

__all__ = ["RECIPE", "Recipe", "make_seed_model"]
