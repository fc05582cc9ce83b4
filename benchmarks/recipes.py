"""All shipped recipes on 1, 4 and 8 nodes, as the planner's arithmetic sees them: a row of Markdown each.

    python -m benchmarks.recipes

The questions in flight grow with the nodes. Where a recipe is meant for more nodes than one, a single node keeps
the optimizer's state in host memory, and one copy of the model there.
"""

from __future__ import annotations

import math
import sys

from spell_megatron.config import load_config, model_recipes
from spell_megatron.tools.plan.assumptions import GIB, Assumptions
from spell_megatron.tools.plan.estimate import estimate
from spell_megatron.tools.plan.findings import Plan

NODES = (1, 4, 8)
ON_ONE_NODE = ("policy.optimizer.cpu_offload=true",)


def planned(recipe: str, nodes: int) -> Plan:
    """A recipe on that many nodes."""
    usual = load_config(recipe)
    questions = math.ceil(usual.selfplay.concurrency * nodes / usual.cluster.nodes)
    overrides = [f"cluster.nodes={nodes}", f"selfplay.concurrency={questions}"]
    if nodes < usual.cluster.nodes:
        overrides += ON_ONE_NODE
        layout = usual.policy.layout
        if layout.tensor * layout.context * layout.pipeline > nodes * usual.cluster.gpus_per_node:
            overrides.append("policy.layout.context=1")
    return estimate(load_config(recipe, overrides), Assumptions())


def layout(plan: Plan) -> str:
    """Sizes above one, as `TP2 CP4 EP8 DP4 SP`."""
    sizes = plan.config.policy.layout
    named = {"TP": sizes.tensor, "PP": sizes.pipeline, "CP": sizes.context, "EP": sizes.expert}
    named["DP"] = plan.world.data
    words = [f"{name}{size}" for name, size in named.items() if size > 1]
    return " ".join([*words, *(["SP"] if sizes.sequence else [])])


def cell(plan: Plan, usual_nodes: int) -> str:
    mark = "†" if plan.config.cluster.nodes < usual_nodes else ""
    return f"{plan.peak / GIB:.1f} GiB, {100 * plan.headroom:.0f} %{mark}, {plan.seconds.total / 60:.0f} min"


def main() -> None:
    rows = [["recipe", "layout as shipped", *(f"{n} node{'s' if n > 1 else ''}" for n in NODES)], ["---"] * 5]
    for recipe in sorted(model_recipes(), key=lambda name: (name.endswith("100k"), name)):
        usual = load_config(recipe)
        shipped = layout(estimate(usual, Assumptions()))
        rows.append([recipe, shipped, *(cell(planned(recipe, n), usual.cluster.nodes) for n in NODES)])
    sys.stdout.writelines(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
