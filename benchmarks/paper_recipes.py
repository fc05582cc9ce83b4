"""The paper's twelve models beside our recipes for them, and the recipes that are not the paper's, as Markdown.

python -m benchmarks.paper_recipes
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from benchmarks.recipes import planned
from eval import paper
from spell_megatron.config import load_config, model_recipes

_NODES = (1, 4)
_TRAINED = ("base", "RLVR", "SPELL")
_LIMITS = (16_384, 100_000)


def recipes_of(model: str) -> list[str]:
    """Names of the shipped recipes that train a model, without what says their length."""
    named = {name.rpartition("-")[0]: load_config(name).model.path for name in model_recipes()}
    return [name for name, path in named.items() if path.rpartition("/")[2] == model]


def minutes(recipe: str) -> Iterator[str]:
    """Planned minutes of a step, by length of the texts: on each number of nodes."""
    for length in ("16k", "100k"):
        plans = [planned(f"{recipe}-{length}", nodes) for nodes in _NODES]
        yield " / ".join(f"{plan.seconds.total / 60:.0f}" for plan in plans)


def _average(rows: dict[str, paper.Row]) -> str:
    return " → ".join("–" if (figure := rows[name][-1]) is None else f"{figure:.1f}" for name in _TRAINED)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [head, ["---"] * len(head), *rows]
    sys.stdout.writelines(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    (first, *_) = paper.tables()
    ours = {name.rpartition("-")[0] for name in model_recipes()}
    rows = []
    for model, by_limit in first.models.items():
        for recipe in recipes_of(model):
            averages = [_average(dict(by_limit[limit])) for limit in _LIMITS]
            rows.append([model, *averages, f"`{recipe}-16k`, `-100k`", *minutes(recipe)])
            ours.discard(recipe)
    steps = ["minutes a step, 16K", "100K"]
    _table(["model", "paper, 16K", "100K", "recipe", *steps], rows)
    sys.stdout.write("\n")
    _table(["recipe", *steps], [[f"`{recipe}-16k`, `-100k`", *minutes(recipe)] for recipe in sorted(ours)])


if __name__ == "__main__":
    main()
