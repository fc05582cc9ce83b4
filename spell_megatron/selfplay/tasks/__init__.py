"""The tasks, one file each: what questions are about, what answers they have, and the rule that grades them.

A task of the user's own is named by its import path, as `corpus.sources=[{tasks: [my_package.tasks:Table]}]`.
"""

from __future__ import annotations

from spell_megatron import config
from spell_megatron.base.registry import Registry
from spell_megatron.selfplay.tasks.choice import Choice
from spell_megatron.selfplay.tasks.general import General
from spell_megatron.selfplay.tasks.number import Number
from spell_megatron.selfplay.tasks.task import Draft, Failure, Task

__all__ = ["TASKS", "Draft", "Failure", "Task", "tasks_of"]

TASKS: Registry[Task] = Registry("task", Task, (General(), Number(), Choice()))


def tasks_of(corpus: config.CorpusConfig) -> tuple[Task, ...]:
    """The tasks of a run, each once. Raises SpellError where one is unknown."""
    references = dict.fromkeys(task for source in corpus.sources for task in source.tasks)
    return tuple(TASKS.find(reference, "corpus.sources.tasks") for reference in references)
