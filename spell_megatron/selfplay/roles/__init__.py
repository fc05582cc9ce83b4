"""The roles, one file each: questioner, responder, verifier.

A role of the user's own stands among them by its import path, in the order of play:
`selfplay.roles=[questioner, my_package.roles:Summariser, responder, verifier]`.
"""

from __future__ import annotations

from random import Random

from spell_megatron import config
from spell_megatron.base.registry import Registry
from spell_megatron.selfplay.prompts import STYLES, Prompts
from spell_megatron.selfplay.roles.questioner import Questioner
from spell_megatron.selfplay.roles.responder import Responder
from spell_megatron.selfplay.roles.role import Chosen, Role, Step
from spell_megatron.selfplay.roles.verifier import Verifier
from spell_megatron.selfplay.tasks import TASKS, Task, tasks_of
from spell_megatron.types import SpellError

__all__ = ["ROLES", "Chosen", "Role", "Step", "prompts_of", "roles_of"]

ROLES: Registry[Role] = Registry("role", Role, (Questioner(), Responder(), Verifier()))


def roles_of(settings: config.SelfPlayConfig) -> tuple[Role, ...]:
    """The roles of a run, in the order of play."""
    roles = tuple(ROLES.find(reference, "selfplay.roles") for reference in settings.roles)
    names = [role.name for role in roles]
    if len(set(names)) < len(names) or "responder" not in names:
        raise SpellError(
            f"selfplay.roles={list(settings.roles)} are {', '.join(names) or 'none'}: each role plays once, and the"
            " responder is one of them"
        )
    before = set(names[: names.index("responder")])
    if "verifier" in before or not (before or settings.static_questions):
        raise SpellError(
            f"selfplay.roles={list(settings.roles)}: the responder needs a question, and the verifier its answers:"
            " write them as [questioner, responder, verifier], or leave the questioner out, with"
            " selfplay.static_questions=true"
        )
    return roles


def prompts_of(settings: config.Config) -> Prompts:
    """The prompts that a run asks with; tasks and roles of its own are known from then on.

    Raises SpellError where a template that it needs is missing, cannot be used, or leaves out what it must show.
    """
    tasks, roles, model = tasks_of(settings.corpus), roles_of(settings.selfplay), settings.model
    records: tuple[Task | Role, ...] = (*tasks, *roles)
    own = {name: text for one in records for name, text in one.templates.items()}
    prompts = Prompts(model.prompts, language=model.language, form=model.answer_form, more=own)
    if own or model.prompts not in STYLES:
        for task in tasks:
            check_prompts(prompts, task.name, roles)
    return prompts


def check_prompts(prompts: Prompts, task: str, roles: tuple[Role, ...] = tuple(ROLES.values())) -> None:
    """Raise SpellError where a message cannot be made, or leaves out what its role cannot do without."""
    question, key = TASKS[task].trial(), TASKS[task].key(Random(0))
    for role in roles:
        for trial in role.trials(prompts, question, key):
            if missing := [text for text in trial.wanted if text not in trial.message]:
                raise SpellError(
                    f"the {role.name}'s prompt of {task} leaves out {trial.of}: in a trial {missing[0]!r} was not in"
                    " it; docs/prompts.md names the variables"
                )
