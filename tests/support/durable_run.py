"""Program of test_durability.py: starts a run, or goes on with it, as often as its parent asks.

Everything is the product's own (learner, updates, checkpoints, journals, metrics, self-play, corpus, tokenizer). The
rollout engine is one of `scripted_engine.py`, `real` or `scripted`, named in the recipe as any engine of a user's own;
every request leaves its seed in a log. A run is a forked child: everything is imported once, so that a start takes
seconds and not twenty.

    python durable_run.py ENGINE RUNS key=value …       one line on standard input starts a run
    python -m launchers.ranks N durable_run.py ENGINE RUNS key=value …     goes on with the run, on several ranks
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import scripted_engine  # noqa: F401  (imported once, before runs are forked)

from spell_megatron.config import load_config
from spell_megatron.run.train import resume, train


def begun(runs: Path) -> list[Path]:
    """Folders of runs that can be gone on with."""
    return [path.parent for path in runs.glob("*/config.yaml")]


def main() -> None:
    engine, runs, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if "RANK" in os.environ:
        resume(begun(runs)[0], overrides)
        return
    config = load_config(
        "toy", [f"runs={runs}", f"rollout.kind=scripted_engine:{engine.upper()}", *overrides]
    )
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            summary = resume(begun(runs)[0]) if begun(runs) else train(config)
            os._exit(summary.steps != config.steps)
        tell(child)
        _, status = os.waitpid(child, 0)
        tell(os.waitstatus_to_exitcode(status))


def tell(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
