"""The tasks, one file each: what questions are about, what answers they have, and the rule that grades them.

A task of the user's own is named by its import path, as `corpus.sources=[{tasks: [my_package.tasks:Table]}]`.
"""

from __future__ import annotations

from spell_megatron.base.registry import Registry
from spell_megatron.selfplay.tasks.choice import Choice
from spell_megatron.selfplay.tasks.general import General
from spell_megatron.selfplay.tasks.number import Number
from spell_megatron.selfplay.tasks.task import Draft, Failure, Task

__all__ = ["TASKS", "Draft", "Failure", "Task"]

TASKS: Registry[Task] = Registry("task", Task, (General(), Number(), Choice()))
