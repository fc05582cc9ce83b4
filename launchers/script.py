"""The bash of a job, as text: what the first node does before the ranks start, and what each task runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template

from launchers.job import REQUEUED, PreparedRun
from launchers.profile import Profile, bash_secrets
from spell_megatron.base.secret import is_secret
from spell_megatron.base.terminal import tidy
from spell_megatron.run.preemption import REQUEUE

_FIRST_PORT, _PORTS = 10_000, 20_000  # below the range that kernels take short-lived ports from
_FIRST_ENGINE_PORT, _ENGINE_PORTS, _PORTS_A_JOB = 30_000, 2_752, 16
"""The job's servers listen on ports that follow each other, as many jobs' as fit below the kernel's range."""

_FAILED = "failed-"
"""Begins the name of a file in `logs` with the exit code of the rank that failed first. srun would return the highest:
that of a rank which it killed itself."""

# 0 is a finished run, and 2 what another attempt would end alike in: 1 and all from here on are crashes.
_CRASH = 3

_STALLS = 20
"""Attempts that are preempted before anything new is on the disk, after which a job ends."""

_ASKED, _PAUSE_SECONDS = 10, 6
"""How often SLURM's controller is asked the same, which is busiest where many jobs end at once."""

_ENDING = Template(
    """\
# Every attempt ends here. A run that saved itself on request goes back to the queue, unless $stalls attempts before
# have left the same files. A crashed one does, as long as `crashes` holds at most $retries lines for the same
# checkpoint. What SLURM ends (scancel) does not.
# Whoever follows the job knows by $requeued* that an attempt's end is not the job's.
run=$run
attempt="$$SLURM_JOB_ID-$${SLURM_RESTART_COUNT:-0}"
ask() {  # a controller that is busy does not answer at once
    for _ in {1..$asked}; do
        scontrol "$$@" && return 0  # by itself it would return what the trap came from
        sleep $pause
    done
    echo "scontrol $$* was not answered" >&2
    return 1
}
requeue() {
    touch "$$run/logs/$requeued$$attempt"
    ask requeue "$$SLURM_JOB_ID" || {
        rm "$$run/logs/$requeued$$attempt"
        echo "sbatch $$run/job.sbatch goes on with the run" >&2
    }
}
ended() {
    code=$$?
    set +e
    first="$$run/logs/$failed$$attempt"
    if [ "$$code" -ne 0 ] && [ -s "$$first" ]; then code=$$(cat "$$first"); fi
    if [ "$$code" -eq 0 ] && [ ! -e "$$run/$flag" ]; then exit 0; fi
    case "$$(ask show job "$$SLURM_JOB_ID" || echo "sbatch $$run/job.sbatch goes on with the run" >&2)" in
        *JobState=RUNNING*) ;;
        *) exit "$$code" ;;
    esac
    if [ -e "$$run/$flag" ]; then
        held=$$(cd "$$run" && find checkpoints rollouts eval -type f -printf "%p %s\\n" 2>/dev/null | sort | cksum)
        echo "$$held" >>"$$run/requeues"
        if [ "$$(grep -cxF "$$held" "$$run/requeues")" -le $stalls ]; then
            echo "the run is saved and goes back to the queue"
            requeue
        else
            echo "$stalls attempts have made nothing new: raise time, or lower warn_seconds"
        fi
    elif [ "$$code" -ge $crash ] || [ "$$code" -eq 1 ]; then
        last=$$(ls "$$run/checkpoints" | grep -x "step-[0-9]*" | tail -n 1)
        last="after $${last:-the start}"
        echo "$$last" >>"$$run/crashes"
        if [ "$$(grep -cxF "$$last" "$$run/crashes")" -le $retries ]; then
            echo "exit code $$code $$last: one more attempt"
            requeue
        fi
    fi
    exit "$$code"
}
trap ended EXIT
rm -f "$$run/$flag\""""
)

# The shell stays, to say how its rank ended; signals are for the rank alone.
_RANK = Template(
    "export RANK=$$SLURM_PROCID WORLD_SIZE=$$SLURM_NTASKS LOCAL_RANK=$$SLURM_LOCALID; trap : TERM USR1; $command;"
    ' code=$$?; first=$failed"$$SLURM_JOB_ID-$${SLURM_RESTART_COUNT:-0}";'
    ' [ $$code -eq 0 ] || (set -C; echo $$code >"$$first") 2>&-; exit $$code'
)

_ENGINES = Template(
    """\
# The vLLM servers that are not the trainer's own.
engines=
for node in "$${nodes[@]:$first:$count}"; do
    for slot in $slots; do engines="$$engines,\\"http://$$node:$$((ENGINE_PORT + slot))\\""; done
done
export ENGINES="[$${engines#,}]\""""
)


def setup_lines(job: PreparedRun) -> str:
    """Bash for the batch script, after `nodes` and `head_node` are known and before srun."""
    profile = job.profile
    attempt = "SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}"
    lines = [
        "{ set +vx; } 2>/dev/null  # from here on nothing is echoed: the environment may hold secrets",
        _ENDING.substitute(
            run=shlex.quote(str(job.run)),
            flag=REQUEUE,
            requeued=REQUEUED,
            failed=_FAILED,
            retries=profile.crash_retries,
            stalls=_STALLS,
            crash=_CRASH,
            asked=_ASKED,
            pause=_PAUSE_SECONDS,
        ),
        f'export MASTER_ADDR="$head_node" MASTER_PORT=$(({_FIRST_PORT} + ({attempt}) % {_PORTS}))',
        f"export ENGINE_PORT=$(({_FIRST_ENGINE_PORT} + ({attempt}) * {_PORTS_A_JOB} % {_ENGINE_PORTS}))",
        *(exports(_caches(job)) if profile.container else ()),
        *exports(profile.env),
        *profile.setup,
    ]
    if profile.venv:
        lines.append(f"source {shlex.quote(f'{profile.venv}/bin/activate')}")
    if serving := job.machines.serving:
        slots = " ".join(map(str, range(job.machines.servers)))
        where = {"first": serving.start, "count": len(serving)}
        lines.append(_ENGINES.substitute(where, slots=slots))
    return "\n".join(lines)


def _caches(job: PreparedRun) -> dict[str, str]:
    """Where the ranks keep what they compile: a container has no home by enroot's defaults, and cannot be written."""
    return {
        "TRITON_CACHE_DIR": f"{job.run}/engine/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{job.run}/engine/inductor",
    }


def rank_command(job: PreparedRun) -> str:
    """What srun starts once per rank: the ranks' numbers under the names that torch reads, then Python."""
    words = [_python(job), "-P", *map(shlex.quote, (*job.trainer, str(job.run)))]
    if job.machines.engine_nodes:
        words.append("rollout.servers.count=0")
    if job.machines.serving:
        words += ['"rollout.servers.host=$MASTER_ADDR"', '"rollout.servers.urls=$ENGINES"']
        words.append(shlex.quote(f"rollout.servers.secret_file={job.secret}"))
    return _RANK.substitute(command=" ".join(words), failed=shlex.quote(str(job.logs / _FAILED)))


def engine_command(job: PreparedRun) -> str:
    """What srun starts once on each engine node."""
    words = shlex.join((*job.engines, str(job.run)))
    return f'exec {_python(job)} -P {words} "$ENGINE_PORT" {job.machines.servers}'


def exports(env: Mapping[str, str]) -> list[str]:
    return [_export(name, value) for name, value in env.items()]


def shown(text: str, env: Mapping[str, str]) -> str:
    """A script for other eyes: without the values of its secrets, and with nothing that a terminal would obey."""
    for name, value in env.items():
        if is_secret(name, value):
            text = text.replace(_export(name, value), f"export {name}=…")
    for found in reversed(list(bash_secrets(text))):  # of `setup`, which stands there as it was written
        start, end = found.span("value")
        text = f"{text[:start]}…{text[end:]}"
    return tidy(text)


def _export(name: str, value: str) -> str:
    return f"export {name}={shlex.quote(value)}"


def mounts(job: PreparedRun) -> list[str]:
    """The profile's mounts, and what the run needs besides, under the paths that it has on the host."""
    added = unmounted(job.profile, (job.run, *job.needs))
    return [*job.profile.mounts, *(f"{path}:{path}" for path in added)]


def unmounted(profile: Profile, paths: Iterable[Path]) -> list[Path]:
    """Those of the paths that lie in no mount of the profile, nor in one another."""
    added: list[Path] = []
    for path in paths:
        mounted = any(_covers(mount, path) for mount in profile.mounts)
        if not mounted and not any(path.is_relative_to(other) for other in added):
            added.append(path)
    return added


def _python(job: PreparedRun) -> str:
    return "python" if job.profile.venv or job.profile.container else shlex.quote(sys.executable)


def _covers(mount: str, path: Path) -> bool:
    source, _, target = mount.partition(":")
    return source == (target.partition(":")[0] or source) and path.is_relative_to(source)
