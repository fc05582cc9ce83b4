"""What a recipe needs at full scale, found without GPUs.

`plan` builds the recipe's real model rank by rank without memory and adds what arithmetic can say of
activations, the engine, traffic and time. `search` ranks layouts by arithmetic alone.
"""

from spell_megatron.tools.plan.findings import Plan
from spell_megatron.tools.plan.planner import plan, plan_all
from spell_megatron.tools.plan.search import search
from spell_megatron.tools.plan.table import ranking, render

__all__ = ["Plan", "plan", "plan_all", "ranking", "render", "search"]
