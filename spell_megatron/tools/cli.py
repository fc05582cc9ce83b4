"""The command line. A command is a few lines; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path:  # `python -m`, without what `interpreter` adds
    sys.path[:1] = []  # the working folder, before a random.py there is imported
    sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), "../..")))

import json
import logging
import signal
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from spell_megatron.base.interpreter import check_rooms
from spell_megatron.base.pulse import Pulse, lasting, working
from spell_megatron.base.terminal import Terminal, log_to_stderr, say
from spell_megatron.run.preemption import listen
from spell_megatron.types import SpellError

app = typer.Typer(
    name="spell-megatron",
    help="Label-free self-play reinforcement learning for long-context models, on Megatron-core and vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_err = Terminal(stderr=True)
_INTERRUPTED = (
    "interrupted; what was finished is kept: `spell-megatron resume RUN` goes on with a run,"
    " any other command is started again"
)

Executor = Literal["local", "slurm"]
Mode = Literal["spell", "strict"]
Protocol = Literal["paper", "official"]
Recipe = Annotated[str, typer.Argument(help="A recipe's name or the path of a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, dots for sections: policy.optimizer.lr=1e-6")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")
]
Families = Annotated[
    list[str] | None,
    typer.Option("--family", help="Your own family of models, by import path: my_package.families:MINE"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a stack trace where something fails.")]


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Faults end in one clear message and an exit code; a stack trace only where `debug` asks for it."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = kwargs.get("debug", False)
        log_to_stderr(logging.WARNING)
        if not debug:
            warnings.filterwarnings("ignore")  # megatron-core announces at length what is not installed
            logging.getLogger("torch._library.triton").setLevel(
                logging.ERROR
            )  # "Triton not available", on every CPU
        try:
            check_rooms()
            with _heard(function.__name__):
                function(*args, **kwargs)
        except typer.Exit:
            raise
        except SpellError as error:
            _fail(str(error), error.exit_code, debug)
        except KeyboardInterrupt:
            _fail(_INTERRUPTED, 130, debug)
        except Exception as error:
            hint = "" if debug else " (--debug shows where)"
            _fail(f"unexpected {type(error).__name__}: {error}{hint}", 1, debug)

    return run


def _heard(name: str) -> AbstractContextManager[object]:
    """A line whenever a command is silent for long, whatever it does: imports from a cold file system take minutes."""
    if name == "watch" or os.environ.get("RANK", "0") != "0":
        return nullcontext()
    return Pulse(lasting(lambda: name.replace("_", "-")), _err)


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A guarded command under its own name, underscores written as dashes."""
    return app.command(name=function.__name__.replace("_", "-"))(guarded(function))


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        _err.print_exception()
    _err.note(Text.assemble(("error", "bold red"), f" {message}"))
    raise typer.Exit(code)


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


@command
def train(recipe: Recipe, overrides: Overrides = None, json: Json = False, debug: Debug = False) -> None:
    """Train a recipe on this machine, on all its GPUs: self-play, update, resync, step after step."""
    listen()  # before torch is imported: its threads inherit the signal mask
    from launchers.local import take_ranks
    from spell_megatron.config import load_config

    config = load_config(recipe, overrides or [])
    take_ranks(config)
    from eval import live_benchmarks, reward_judge
    from spell_megatron.run.train import train as run

    _show(run(config, live_benchmarks, reward_judge), json)


@command
def resume(
    run: Path,
    overrides: Overrides = None,
    from_: Annotated[str, typer.Option("--from", help="Another checkpoint's name: step-12.")] = "",
    restart: Annotated[bool, typer.Option("--restart", help="Begin again at step 0.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with a run after its newest whole checkpoint, or another one; later ones are renamed, not removed."""
    origin = _origin(from_, restart)
    listen()
    from launchers.local import take_ranks
    from spell_megatron.run.opening import read_run_config

    take_ranks(read_run_config(run, tuple(overrides or [])))
    from eval import live_benchmarks, reward_judge
    from spell_megatron.run.train import resume as go_on

    _show(go_on(run, overrides or [], live_benchmarks, reward_judge, origin=origin), json)


def _origin(name: str, restart: bool) -> int | None:
    """The step to go on from; None for the newest."""
    step = name.removeprefix("step-")
    if name and (restart or not step.isdecimal() or not int(step)):
        raise SpellError(f"--from {name}: give a checkpoint's name, as --from step-12, and without --restart")
    return 0 if restart else int(step) if name else None


def _show(summary: Any, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    before, after = summary.heldout_before, summary.heldout_after
    if before and after:
        for task in sorted(before["by_task"]):
            _err.print(f"held-out {task:16s} {before['by_task'][task]:.3f} → {after['by_task'][task]:.3f}")
        _err.print(f"held-out {'mean':16s} {before['mean']:.3f} → {after['mean']:.3f}", style="bold")
    _err.note(f"report: {summary.report}")
    if as_json:
        _print_json(asdict(summary))


@command
def import_hf(folder: Path, out: Path, family: Families = None, debug: Debug = False) -> None:
    """Turn a Hugging Face model folder into a Megatron checkpoint."""
    from spell_megatron.tools.convert import import_hf as convert

    with working(f"importing {folder}"):
        convert(folder, out, family or ())


@command
def export_hf(source: Path, out: Path, debug: Debug = False) -> None:
    """Write the policy of a run (or of one checkpoint) as a Hugging Face model folder."""
    from spell_megatron.tools.convert import export_hf as convert

    with working(f"exporting {source}"):
        convert(source, out)


@command
def parity(
    model: Path, tokens: int = 256, family: Families = None, json: Json = False, debug: Debug = False
) -> None:
    """Compare the log-probs of Hugging Face, Megatron and vLLM on the same tokens."""
    from spell_megatron.tools.parity import compare

    with working(f"comparing the log-probs of {model}"):
        result = compare(model, tokens, family or ())
    _err.print(result.table())
    if json:
        _print_json(asdict(result))
    result.check()


@command
def corpus(
    source: Annotated[
        str, typer.Argument(help="A recipe, or the path of a source: a folder, a file, a hub id.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value: of the recipe, or of the source (group_by=random).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Clusters to show.")] = 3,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a run would read: clusters, lengths, duplicates, what is left out and why, samples."""
    from spell_megatron.corpus import survey
    from spell_megatron.corpus.survey import meant

    config = meant(source, overrides or [])
    count, how = _counter(config.model.path)
    with working(f"reading {source}"):
        found = survey(config.corpus, count, config.seed, samples)
    _err.print(found.shown())
    _err.note(how, "dim")
    if json:
        _print_json(found.to_dict())


def _counter(model: str) -> tuple[Callable[[str], int], str]:
    """What counts tokens, and how: by the model's tokenizer where its folder is here."""
    from spell_megatron.weights.locate import local_folder
    from tokenizer.chat import ChatTokenizer

    folder = local_folder(model)
    if folder is None:
        return (
            lambda text: -(-len(text) // 4),
            "tokens: estimated, four characters each (model.path is not here)",
        )
    return ChatTokenizer.load(folder).count, f"tokens: by the tokenizer in {folder}"


@command
def prompts(
    out: Path,
    style: Annotated[str, typer.Option(help="full, or short for the toy model.")] = "full",
    debug: Debug = False,
) -> None:
    """Write the shipped prompt templates into a new folder, for editing: model.prompts=OUT then uses them."""
    from spell_megatron.selfplay.prompts import write_prompts

    write_prompts(out, style)
    say(str(out))


@command
def config(
    section: Annotated[str, typer.Argument(help="As policy.loss; all where none is given.")] = "",
    debug: Debug = False,
) -> None:
    """Print every key with its values, default and meaning, as Markdown (docs/reference.md)."""
    from spell_megatron.config.reference import reference

    say(reference(section))


@command
def report(run: Path, debug: Debug = False) -> None:
    """Write the HTML report of a run."""
    from spell_megatron.run.record import write_report

    say(str(write_report(run)))


@command
def watch(
    run: Path,
    port: Annotated[int, typer.Option(help="0: a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Another address lets other machines in.")] = "127.0.0.1",
    debug: Debug = False,
) -> None:
    """Show a run in a browser while it goes on, from its folder alone."""
    from spell_megatron.run.record.watch import watch as serve

    serve(run, host, port, lambda address: _err.print(f"{address} (Ctrl-C ends it)", soft_wrap=True))


@command
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Say what is installed, what each missing part costs, and how to mend it."""
    from spell_megatron.tools.doctor import examine

    findings = examine()
    _err.print(findings.table())
    if json:
        _print_json(findings.to_dict())
    findings.check()


@command
def seed_model(
    out: Path,
    seed: Annotated[int, typer.Option(help="Of the weights and the lessons.")] = 0,
    world: Annotated[str, typer.Option(help="toy or hard-small.")] = "toy",
    terms: Annotated[
        int | None, typer.Option(help="Stop the warm-up after so many of its stages: a less able model.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a generated world's seed model from nothing: tokenizer, random weights, supervised warm-up."""
    from spell_megatron.tools.warmup import make_seed_model

    with working("making the seed model"):
        make_seed_model(out, seed, world, terms, report=_err.print)


@command
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of one GPU, instead of the recipe's.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Propose layouts, ranked.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a recipe needs at full scale, from its real model, without GPUs."""
    from spell_megatron.config import load_config
    from spell_megatron.tools import plan as planner

    config = load_config(recipe, overrides or [])
    if search:
        plans = planner.search(config, gpus, gpu_memory)
        text, found = planner.ranking(plans), {"plans": [one.to_dict() for one in plans]}
    else:
        one = planner.plan(config, gpus, gpu_memory)
        text, found = planner.render(one), one.to_dict()
    say(text)
    if json:
        _print_json(found)


@command
def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    executor: Annotated[Executor, typer.Option()] = "local",
    cluster: Annotated[str, typer.Option(help="A cluster profile's name or path.")] = "",
    dryrun: Annotated[bool, typer.Option("--dryrun", help="Print the batch script, submit nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Start a recipe on this machine or on a SLURM cluster; the exit code is the job's."""
    from launchers.launch import launch as start

    raise typer.Exit(start(recipe, overrides or [], executor, cluster, dryrun))


Option = typer.Option


def _key(variable: str) -> Any:
    """An option for a key that is taken from the environment alone."""

    def check(context: typer.Context, parameter: typer.CallbackParam, value: str) -> str:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"a key on a command line can be read by everybody on this machine: export {variable}=… instead"
            )
        return value

    return Option(envvar=variable, show_envvar=False, hidden=True, callback=check)


@app.command(name="eval")
@guarded
def evaluate(
    benchmarks: Annotated[
        list[str] | None, typer.Argument(help="Names; all of `--list` where none is given.")
    ] = None,
    model: Annotated[list[Path] | None, Option(help="A model folder; several are compared.")] = None,
    endpoint: Annotated[
        str, Option(help="An OpenAI-compatible server instead of a folder; its key in $SPELL_API_KEY.")
    ] = "",
    endpoint_model: Annotated[str, Option(help="The endpoint's name of the model.")] = "",
    api_key: Annotated[str, _key("SPELL_API_KEY")] = "",
    tokenizer: Annotated[str, Option(help="Tokenizer folder of the endpoint's model.")] = "",
    data: Annotated[Path | None, Option(help="Folder of the data sets, for offline machines.")] = None,
    out: Annotated[Path, Option(help="Answers and reports; resumed where it exists.")] = Path("eval-runs"),
    max_input: Annotated[list[int] | None, Option(help="Input limits in tokens; 16384 if not given.")] = None,
    samples: Annotated[int, Option(help="Answers to each question.")] = 8,
    temperature: Annotated[float, Option(help="Of sampling; greedy benchmarks have none.")] = 0.7,
    max_tokens: Annotated[int | None, Option(help="Output limit; each benchmark's own if not given.")] = None,
    seed: Annotated[int, Option(help="Of the answers' draws.")] = 0,
    mode: Annotated[Mode, Option(help="The paper's scorers, or stricter ones.")] = "spell",
    protocol: Annotated[
        Protocol, Option(help="Ask as the paper does, or as each set's authors do.")
    ] = "paper",
    compare: Annotated[str, Option(help="`paper`, or `paper:MODEL`: its row of the same model beside.")] = "",
    thinking: Annotated[bool, Option(help="The model reasons before it answers.")] = False,
    limit: Annotated[int | None, Option(help="At most so many questions of each, of all subsets.")] = None,
    concurrency: Annotated[int, Option(help="Requests in flight.")] = 64,
    judge: Annotated[str, Option(help="An OpenAI-compatible judge's URL; its key in $SPELL_JUDGE_KEY.")] = "",
    judge_model: Annotated[str, Option(help="Name of the judge's model.")] = "",
    judge_key: Annotated[str, _key("SPELL_JUDGE_KEY")] = "",
    list_: Annotated[bool, Option("--list", help="Name the benchmarks.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run benchmarks with the paper's protocol against a model folder or an endpoint."""
    import eval as evaluation

    if list_:
        say("\n".join(evaluation.list_benchmarks()))
        return
    if compare and compare.partition(":")[0] != "paper":
        raise SpellError(f"--compare {compare}: it takes `paper`, or `paper:MODEL` with a model of the paper")
    names = benchmarks or []
    # `--max-input 16384 100000`: an option takes one value, so the further ones arrive among the names.
    limits = [*(max_input or []), *(int(name) for name in names if name.isdigit())]
    result = evaluation.evaluate(
        [name for name in names if not name.isdigit()],
        models=model or [],
        endpoint=endpoint,
        endpoint_model=endpoint_model,
        api_key=api_key,
        tokenizer=tokenizer,
        data=data,
        out=out,
        max_input=limits or [16_384],
        settings=evaluation.Settings(
            samples=samples,
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            mode=mode,
            protocol=protocol,
            thinking=thinking,
            concurrency=concurrency,
            limit=limit,
        ),
        judge=evaluation.JudgeSettings(judge, judge_model, judge_key) if judge else None,
        beside_paper=compare.partition(":")[2] if compare else None,
    )
    for one in result.reports:
        say(one.markdown())
    if result.comparison:
        say(result.comparison.markdown())
    for beside in result.paper:
        say(beside.markdown())
    if json:
        _print_json(result.to_json())
    if not result.complete:
        raise SpellError("some questions have no answer: see the report, and run the command again to go on")


def main() -> None:
    """The program. What it sets in its environment is for the processes that it and libraries start."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # one line about NUMA at every start of vLLM
    os.environ["PYTHONSAFEPATH"] = "1"
    if path := os.environ.get("PYTHONPATH"):  # jobs and servers start in folders of their own
        os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, path.split(os.pathsep))))
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    app()


def _end(number: int, frame: FrameType | None) -> None:
    """End as an error does: what stands in temporary folders is removed on the way."""
    signal.signal(number, signal.SIG_DFL)  # a second one means it
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
