"""A run's folder: what is written survives crashes, what is shown is safe, complete and opens offline."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spell_megatron.base import pulse
from spell_megatron.base.terminal import Terminal
from spell_megatron.config import Config, dump_config, load_config
from spell_megatron.run.record import (
    Console,
    Journal,
    Metrics,
    RunFolder,
    forget_stale,
    logging_to,
    read_metrics,
    step_line,
    write_report,
)
from spell_megatron.run.record.archive import Archive
from spell_megatron.run.record.folder import JsonLines, read_lines
from spell_megatron.selfplay.episode import Episode, Judgement, Response
from spell_megatron.selfplay.memory import Remembered
from spell_megatron.types import Question, Rollout, SpellError

pytestmark = pytest.mark.unit

HOSTILE = (
    "</pre></div><script>alert('x')</script><img src=https://example.org/x onerror=alert(1)>"
    " {{ 7 * 7 }} {% raw %} \u202egnirts\u202c \x00\x1b[31m <!-- & \"quoted\" 'single' "
)


def rollout(length: int) -> Rollout:
    return Rollout((1, 2, 3), tuple(range(length)), tuple(-0.1 * i for i in range(length)), "stop", 4)


def episode(
    step: int, index: int = 0, task: str = "doc_general_qa", text: str = "Which town?", **changes: object
) -> Episode:
    options = {letter: f"{text} {letter}" for letter in "ABCD"} if task == "doc_mc" else {}
    question = Question(task, text, f"Rome {text}", options)
    judgements = tuple(Judgement(rollout(2), f"verdict {text}", vote, 1.0) for vote in (1, 0, None))
    responses = tuple(
        Response(rollout(3), f"reasoning {text}", answer, reward, judgements, verdict, reward)
        for answer, reward, verdict in ((f"Rome {text}", 1.0, 1), (None, 0.0, None))
    )
    made = Episode(
        step,
        0,
        index,
        cluster="c/1",
        domain="c",
        task=task,
        cluster_documents=5,
        documents=(0, 2),
        history=(Remembered((1,), question),),
        asked=rollout(5),
        asked_text=f"I ask {text}",
        question=question,
        responses=responses,
        outcome="kept",
        reward=0.7,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "runs", "toy")
    folder.save_config(dump_config(Config()))
    return folder


def logged(run: RunFolder, rows: dict[int, dict[str, float]]) -> None:
    metrics = Metrics(run)
    for step, values in rows.items():
        metrics.log(step, values)
    metrics.close()


# ---- the folder


def test_a_run_is_made_once_and_opened_again(tmp_path: Path) -> None:
    runs = [RunFolder.create(tmp_path / "deep" / "runs", "toy") for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(run.path.name.startswith("toy-") for run in runs)
    with pytest.raises(SpellError, match="is not a run's folder"):
        RunFolder.open(runs[0].path)
    runs[0].save_config("name: toy\n")
    assert RunFolder.open(runs[0].path).config.read_text() == "name: toy\n"


@pytest.mark.parametrize("name", ["", "a/b", "..", "/"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpellError, match="cannot name a folder"):
        RunFolder.create(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpellError, match=r"cannot write .*file/runs.*choose another folder with runs="):
        RunFolder.create(tmp_path / "file" / "runs", "toy")
    with pytest.raises(SpellError, match="cannot write /proc"):
        RunFolder.create("/proc/runs", "toy")


def test_what_vllm_compiles_goes_where_nobody_can_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of one's group, from which the run's own folder could be moved away as well."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    for place in (home, temporary):
        place.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    run = RunFolder.create(tmp_path / "team", "x")
    assert run.engine_cache.parent == tmp_path / "team"
    (tmp_path / "team").chmod(0o2775)
    cache = run.engine_cache
    assert cache == home / "cache" / "spell-megatron" / "engine" and cache.stat().st_mode & 0o777 == 0o700
    home.chmod(0o775)
    temporary.chmod(0o1777)
    cache = run.engine_cache
    assert cache.parent == temporary and cache.stat().st_mode & 0o777 == 0o700
    temporary.chmod(0o777)
    assert run.engine_cache == run.path / "engine", "as good as any"


def test_addresses_of_an_attempt_are_not_for_the_next_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    kept = load_config("toy", ["rollout.servers.count=2", "cluster.engine_nodes=1"])
    told = [
        "rollout.servers.urls=['http://n2:30016']",
        "rollout.servers.host=n1",
        "rollout.servers.count=0",
        f"rollout.servers.secret_file={run.secret}",
    ]
    before = replace(kept, steps=3)
    now = load_config("toy", ["rollout.servers.count=2", "cluster.engine_nodes=1", *told])
    assert run.lasting(now, before) == kept
    # Servers beside the trainer's: their number is the user's.
    changed = ["rollout.servers.count=3", "cluster.nodes=2"]
    now = load_config("toy", [*changed, *(text for text in told if "count" not in text)])
    assert run.lasting(now, load_config("toy", ["cluster.nodes=2"])) == load_config("toy", changed)
    # Somebody else's servers stay.
    theirs = load_config("toy", [told[0], f"rollout.servers.secret_file={tmp_path}/theirs"])
    assert run.lasting(theirs, kept) == theirs


# ---- lines that survive

Row = st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.floats(allow_nan=False), max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(Row, min_size=1, max_size=5), st.data())
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_goes_on(
    tmp_path: Path, rows: list[dict[str, object]], data: st.DataObject
) -> None:
    path = tmp_path / "lines.jsonl"
    path.unlink(missing_ok=True)
    lines = JsonLines(path)
    for row in rows:
        lines.append(row)
    lines.close()
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    again = JsonLines(path)
    again.append({"after": "the crash"})
    again.close()
    assert list(read_lines(path)) == [*rows[:kept], {"after": "the crash"}]


def test_reading_drops_what_is_not_whole_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n[3]\n\xff\n' + b"[" * 200_000 + b'\n{"b": 2')
    assert list(read_lines(path)) == [{"a": 1}]
    assert re.findall(r"lines\.jsonl line (\d) is dropped", caplog.text) == ["2", "3", "4", "5"]


def test_a_full_disk_is_one_clear_error_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.append({"step": 1})
    assert lines._file is not None
    opened: BinaryIO = lines._file

    class Full:
        """A file on a disk with three bytes left."""

        def __getattr__(self, name: str) -> object:
            return getattr(opened, name)

        def write(self, data: bytes) -> int:
            opened.write(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    lines._file = Full()  # type: ignore[assignment]
    with pytest.raises(SpellError, match="the disk is full"):
        lines.append({"step": 2})
    lines._file = opened
    lines.append({"step": 3})
    assert list(read_lines(lines.path)) == [{"step": 1}, {"step": 3}]


def test_a_line_of_which_a_disk_takes_a_part_is_taken_away_again(tmp_path: Path) -> None:
    """The system writes what still fits and reports no error: that comes with the rest."""
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.append({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (lines.path.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(SpellError, match=r"cannot write .*lines\.jsonl: File too large"):
            lines.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.append({"step": 3})
    assert list(read_lines(lines.path)) == [{"step": 1}, {"step": 3}]


@pytest.mark.long
def test_what_was_appended_outlives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    code = (
        "import os, pathlib, signal\n"
        "from spell_megatron.run.record.folder import JsonLines\n"
        f"lines = JsonLines(pathlib.Path({str(path)!r}))\n"
        "for i in range(20): lines.append({'i': i})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": root})
    assert done.returncode == -9
    assert [row["i"] for row in read_lines(path)] == list(range(20))


# ---- metrics


@pytest.mark.long
def test_metrics_are_lines_and_tensorboard(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    logged(
        run,
        {
            0: {"heldout/mean": 0.5},
            1: {"policy/loss": math.nan, "policy/grad_norm": math.inf, "time/play": 2},
        },
    )
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [{key: value for key, value in row.items() if key != "time"} for row in rows] == [
        {"step": 0, "heldout/mean": 0.5},
        {"step": 1, "policy/loss": None, "policy/grad_norm": None, "time/play": 2.0},
    ]
    assert "step 1: not finite: policy/grad_norm, policy/loss" in caplog.text
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert board.Tags()["scalars"] == ["heldout/mean", "time/play"]
    assert [(event.step, event.value) for event in board.Scalars("time/play")] == [(1, 2.0)]


def test_a_resumed_run_forgets_the_steps_it_makes_again(run: RunFolder) -> None:
    logged(run, {step: {"x": step} for step in range(1, 6)})
    resumed = Metrics(run, after=3)
    resumed.log(4, {"x": 40.0})
    resumed.close()
    assert [(row["step"], row["x"]) for row in read_metrics(run)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("x")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_weights_and_biases_is_asked_for_or_absent(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SpellError, match="needs Weights & Biases: pip install wandb"):
        Metrics(run, wandb_project="project")
    Metrics(run).close()


def test_weights_and_biases_gets_every_row(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: one run under the folder's name, which a resumed run goes on with."""
    begun: list[dict[str, object]] = []
    logged_: list[dict[str, float]] = []
    finished: list[bool] = []
    axes: list[tuple[str, str | None]] = []
    account = SimpleNamespace(
        log=logged_.append,
        define_metric=lambda name, step_metric=None: axes.append((name, step_metric)),
        finish=lambda: finished.append(True),
    )
    wandb = SimpleNamespace(
        init=lambda **options: begun.append(options) or account, errors=SimpleNamespace(Error=ValueError)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    metrics = Metrics(run, wandb_project="papers")
    metrics.log(1, {"policy/loss": 0.5, "policy/grad_norm": math.nan})
    metrics.close()
    assert begun == [
        {
            "project": "papers",
            "name": run.path.name,
            "id": run.path.name,
            "dir": str(run.path),
            "resume": "allow",
        }
    ]
    assert axes == [("step", None), ("*", "step")], "W&B's own count only grows, and a resumed run's may not"
    assert logged_ == [{"step": 1, "policy/loss": 0.5}]
    assert finished == [True]


# ---- journal


def test_a_journal_gives_back_equal_episodes(run: RunFolder) -> None:
    written = [episode(3, i, task, HOSTILE) for i, task in enumerate(("doc_general_qa", "doc_mc"))]
    written.append(
        Episode(3, 1, 2, "c/2", "c", "docmath_qa", 4, outcome="bad_format", asked=rollout(1), reward=-1.0)
    )
    journal = Journal(run, 3)
    for one in written:
        journal.append(one)
    journal.sync()
    back = Journal(RunFolder(run.path), 3).read()
    assert [one.to_dict() for one in back] == [one.to_dict() for one in written]
    assert Journal(run, 4).read() == []
    assert run.recorded_steps == [3]


def test_a_journal_cut_by_a_crash_goes_on(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(run, 1)
    for index in range(3):
        journal.append(episode(1, index))
    journal.close()
    path = run.rollouts(1)
    path.write_bytes(path.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        assert [one.index for one in Journal(run, 1).read()] == [0, 1]
    assert "is dropped" in caplog.text
    resumed = Journal(run, 1)
    resumed.append(episode(1, 7))
    assert [one.index for one in resumed.read()] == [0, 1, 7]


@pytest.mark.parametrize(
    ("override", "stays"),
    [
        # neither what is sampled nor what is learnt of it
        ("steps=3", [1, 2, 3, 4]),
        ("policy.layout.tensor=2", [1, 2, 3, 4]),
        ("policy.stream_tokens=9000", [1, 2, 3, 4]),
        ("policy.optimizer.distributed=true", [1, 2, 3, 4]),
        ("selfplay.concurrency=3", [1, 2, 3, 4]),
        ("record.keep_last=7", [1, 2, 3, 4]),
        # what is learnt: episodes of step 2 were sampled by the weights of step 1, those after it by others
        ("selfplay.max_rounds=20", [1, 2]),
        ("selfplay.questions=7", [1, 2]),
        ("selfplay.train_verifier=false", [1, 2]),
        ("policy.optimizer.lr=1e-7", [1, 2]),
        ("policy.loss.kl=0.1", [1, 2]),
        ("policy.minibatches=2", [1, 2]),
        ("record.bad_step=skip", [1, 2]),
        # what is sampled
        ("selfplay.sampling.temperature=1.0", [1]),
        ("selfplay.grounding=false", [1]),
        ("model.prompts=full", [1]),
        ("corpus.cluster_tokens=99", [1]),
        ("rollout.dtype=bfloat16", [1]),
        ("rollout.engine={quantization: fp8}", [1]),
        ("rollout.max_num_seqs=7", [1, 2, 3, 4]),
    ],
)
def test_a_resumed_run_goes_on_with_what_its_own_weights_made(
    run: RunFolder, override: str, stays: list[int]
) -> None:
    """Of a run with checkpoint 1, whose steps 2 to 4 were made and are lost."""
    before, now = load_config("toy"), load_config("toy", [override])
    for step in (1, 2, 3, 4):
        journal = Journal(run, step)
        journal.append(episode(step))
        journal.close()
        (run.path / "eval" / f"step-{step:05d}").mkdir(parents=True)
    forget_stale(run, 1, before, now)
    assert run.recorded_steps == stays
    answered = sorted(int(path.name[-5:]) for path in run.path.glob("eval/*"))
    assert answered == ([1, 2, 3, 4] if stays == [1, 2, 3, 4] else [1])


def test_the_first_weights_are_the_same_whatever_is_learnt(run: RunFolder) -> None:
    (run.path / "eval" / "step-00000").mkdir(parents=True)
    forget_stale(run, 0, load_config("toy"), load_config("toy", ["policy.optimizer.lr=1e-7"]))
    assert (run.path / "eval" / "step-00000").is_dir()
    forget_stale(run, 0, load_config("toy"), load_config("toy", ["model.prompts=full"]))
    assert not (run.path / "eval" / "step-00000").exists()


def test_a_run_that_goes_on_from_a_step_of_choice_keeps_nothing_later(run: RunFolder) -> None:
    config = load_config("toy")
    for step in (0, 1, 2):
        Journal(run, step).append(episode(step))
        (run.path / "eval" / f"step-{step:05d}").mkdir(parents=True)
    forget_stale(run, 1, config, config, anew=True)
    assert run.recorded_steps == [0, 1]
    assert sorted(path.name for path in run.path.glob("eval/*")) == ["step-00000", "step-00001"]
    forget_stale(run, 0, config, config, anew=True)
    assert not list(run.path.glob("eval/*")), "before the first step it is measured anew"


def test_of_packed_rollouts_none_of_a_branch_that_is_left_stays(run: RunFolder) -> None:
    config = load_config("toy", ["record.keep_rollouts=1", "record.checkpoint_every=1", "record.keep_last=1"])
    for step in range(1, 7):
        Journal(run, step).append(episode(step))
    archive = Archive(run, config.record)
    archive.begin(6)
    archive.close()
    assert (run.recorded_steps, run.played_steps) == ([5, 6], [1, 2, 3, 4, 5, 6])
    forget_stale(run, 3, config, config, anew=True)
    assert (run.recorded_steps, run.played_steps) == ([], [1, 2, 3])


def test_the_first_questions_of_a_report_are_of_the_first_steps_when_they_are_packed(run: RunFolder) -> None:
    config = load_config("toy", ["record.keep_rollouts=1", "record.checkpoint_every=1", "record.keep_last=1"])
    for step in range(1, 9):
        Journal(run, step).append(episode(step, text=f"Which town is {step}?"))
        metrics = Metrics(run, after=step - 1)
        metrics.log(step, {"policy/loss": 0.0})
        metrics.close()
    archive = Archive(run, config.record)
    archive.begin(8)
    archive.close()
    run.save_config(dump_config(config))
    text = write_report(run.path).read_text()
    early, late = text.partition("Early")[2].split("Late")[:2]
    assert "Which town is 1?" in early and "Which town is 8?" in late


# ---- console

FULL = {
    "questioner/reward": 0.42,
    "responder/reward": 0.61,
    "verifier/reward": 0.88,
    "outcome/kept": 24,
    "questions": 96,
    "questioner/format_errors": 0.07,
    "verifier/rule_agreement": 0.9,
    "mismatch/mean": 3e-6,
    "heldout/mean": 0.61,
    "time/play": 5.2,
    "time/update": 3.1,
    "time/resync": 0.12,
    "time/record": 0.2,
}


def test_a_step_is_one_readable_line() -> None:
    assert step_line(3, 100, FULL).plain == (
        "step   3/100  reward q 0.42 r 0.61 v 0.88  kept 24/96  valid 93%  verifier 90%  mismatch 3.0e-06"
        "  held-out 0.610  seconds play 5.2 update 3.1 resync 0.1 record 0.2"
    )
    assert step_line(1, 9, {}).plain == "step 1/9"


def play_two_steps(console: Console) -> None:
    with console as live:
        live.note("held-out before [0.53]")
        for step in (1, 2):
            live.begin(step, needed=24)
            live.progress(kept=7, asked=30, rollouts=412, tokens=20_000)
            console.terminal.file.flush()
            console._screen.refresh()
            for phase in ("update", "resync", "record"):
                live.phase(phase)
            live.done(step, FULL)


def test_without_a_terminal_there_are_plain_lines_only() -> None:
    output = io.StringIO()
    play_two_steps(Console(2, Terminal(file=output, force_terminal=False, width=60)))
    lines = output.getvalue().splitlines()
    assert lines == ["held-out before [0.53]", step_line(1, 2, FULL).plain, step_line(2, 2, FULL).plain]


def test_without_a_terminal_a_long_phase_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENCE_SECONDS", 0.05)
    output = io.StringIO()
    with Console(3, Terminal(file=output, force_terminal=False, width=60)) as live:
        live.phase("starting engines")
        _wait_for(lambda: re.search(r"before step 1  starting engines \d+:\d\d", output.getvalue()))
        live.begin(2, 24)
        live.progress(kept=7, asked=30, rollouts=412, tokens=90_000)
        playing = r"step 2/3  play \d+:\d\d"
        kept = r"7/24 kept  \d+:\d\d left of this play  [\d.k]+ tokens/s, 30 asked, 412"
        _wait_for(lambda: re.search(playing, output.getvalue()) and re.search(kept, output.getvalue()))
    # Nobody speaks when the run has ended.
    _wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "pulse"])


def _wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_in_a_terminal_the_bar_shows_the_step_and_goes_away() -> None:
    output = io.StringIO()
    play_two_steps(Console(2, Terminal(file=output, force_terminal=True, width=140)))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert "7/24 kept" in plain
    assert "30 asked" in plain
    assert "412 rollouts" in plain
    assert output.getvalue().rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in output.getvalue()


def test_the_terminal_is_given_back_after_an_error() -> None:
    output = io.StringIO()

    def interrupted() -> None:
        with Console(2, Terminal(file=output, force_terminal=True)) as live:
            live.begin(1, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "\x1b[?25h" in output.getvalue()


def test_log_messages_go_to_the_folder_and_warnings_to_the_terminal(run: RunFolder) -> None:
    output = io.StringIO()
    log = logging.getLogger("spell_megatron.corpus")
    before = logging.getLogger().handlers[:]
    with logging_to(run, Terminal(file=output, width=200)):
        log.info("1,234 documents")
        log.warning("skipped [bold]a.txt: empty")
    log.info("after the run")
    assert logging.getLogger().handlers == before
    assert [line.split(": ", 1)[1] for line in run.log.read_text().splitlines()] == [
        "1,234 documents",
        "skipped [bold]a.txt: empty",
    ]
    assert output.getvalue().split() == ["WARNING", "skipped", "[bold]a.txt:", "empty"]


def test_a_warning_is_one_line_once(run: RunFolder) -> None:
    output = io.StringIO()
    with logging_to(run, Terminal(file=output, width=40, force_terminal=False)):
        for _ in range(3):
            logging.getLogger("a.library").warning("%s", "long " * 100)
        logging.getLogger("a.library").warning("too few %s %s", "arguments")
    assert output.getvalue().splitlines() == ["WARNING " + "long " * 100]
    assert run.log.read_text().count("long " * 100) == 3


def test_what_is_known_of_warnings_does_not_grow_with_them(run: RunFolder) -> None:
    with logging_to(run, Terminal(file=io.StringIO())):
        (shown,) = [handler for handler in logging.getLogger().handlers if handler.level == logging.WARNING]
        for number in range(2500):
            logging.getLogger("a.library").warning("engine-0 is at %d", number)
    assert len(shown._said) <= 1000  # type: ignore[attr-defined]


# ---- report


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def full_run(run: RunFolder, steps: int = 12) -> None:
    rows: dict[int, dict[str, float]] = {0: {"heldout/mean": 0.5, "heldout/doc_mc": 0.4}}
    for step in range(1, steps + 1):
        rows[step] = FULL | {
            "heldout/mean": 0.5 + step / 100,
            "heldout/doc_mc": 0.4 + step / 50,
            "responder/reward/doc_mc": 0.5,
            "outcome/bad_format": 3,
            "outcome/zero_variance": 60,
            "outcome/over_long": 2,
            "difficulty/unsolved": 0.3,
            "difficulty/25_50": 0.5,
            "difficulty/solved": 0.2,
            "questioner/documents": 3.0,
            "questioner/prompt_tokens": 400,
            "memory/hits": 0.1,
            "visits/web": step / 4,
            "visits/reports": step / 2,
            "memory/questions": 9,
            "memory/rings": 4,
            "verifier/self_consistency": 0.8,
            "verifier/invalid": 0.0,
            "responder/length": 30,
            "responder/truncated": 0.0,
            "policy/entropy": 0.5,
            "policy/grad_norm": 0.7,
            "policy/loss": -0.01,
            "mismatch/max": 1e-4,
            "mismatch/k3": 0.0,
            "tokens/generated": 3e4,
            "tokens/trained": 2e4,
        }
    logged(run, rows)


TITLES = [
    "Held-out accuracy, before and after",
    "Held-out accuracy over the run",
    "Reward by role",
    "Responder's reward by task",
    "Difficulty of the questions",
    "What became of the questions",
    "Documents read by the questioner",
    "Tokens read by the questioner",
    "Visits",
    "Memory hits",
    "Memory occupancy",
    "Agreement",
    "Invalid outputs",
    "Length of the outputs",
    "Outputs cut at the token limit",
    "Entropy of the policy",
    "Engine-learner mismatch",
    "Gradient norm",
    "Loss",
    "Time of a step",
    "Tokens of a step",
]


def titles(page: str) -> list[str]:
    return [title.replace("&#39;", "'") for title in re.findall(r"<figcaption><h3>(.*?)</h3>", page)]


@pytest.mark.long
def test_the_report_has_every_view(run: RunFolder) -> None:
    full_run(run)
    for step in (1, 12):
        journal = Journal(run, step)
        for index, task in enumerate(("doc_general_qa", "docmath_qa", "doc_mc")):
            journal.append(episode(step, index, task, f"Question {index} of step {step}?"))
        journal.close()
    page = write_report(run.path).read_text(encoding="utf-8")
    assert titles(page) == TITLES
    assert page.count("<svg") == len(TITLES)
    text = Page(page).text
    assert "50% → 62%" in text
    assert "+12.0 points" in text
    assert "of 1,152 asked" in text
    assert all(f"Question {index} of step {step}?" in text for index in range(3) for step in (1, 12))
    assert text.index("Question 0 of step 1?") < text.index("Question 0 of step 12?")


@pytest.mark.long
def test_the_report_says_which_question_widened_which_context(run: RunFolder) -> None:
    """By hand: the first question brought documents 1 and 4, the second 6 besides, and 3 and 8 are fresh."""
    full_run(run, 2)
    remembered = [
        Remembered(documents, Question("docmath_qa", text, "1"))
        for documents, text in (((0, 3), "What came <b>first</b>?"), ((0, 3, 5), "What came second?"))
    ]
    journal = Journal(run, 2)
    wide = episode(2, 0, "docmath_qa", "What comes third?")
    history = tuple(remembered)
    journal.append(replace(wide, history=history, documents=(0, 2, 3, 5, 7), cluster_documents=9))
    journal.append(replace(episode(2, 1, "doc_mc", "Without a history?"), history=()))
    journal.close()
    text = " ".join(Page(write_report(run.path).read_text(encoding="utf-8")).text.split())
    assert "read 5 of 9 documents" in text
    rows = [
        "What came <b>first</b>? +2 1 4",
        "What came second? +1 6",
        "fresh, for the new question: What comes third? +2 3 8",
    ]
    places = [text.index(row) for row in rows]
    assert places == sorted(places)


def test_missing_metrics_leave_their_panel_out(run: RunFolder) -> None:
    logged(run, {1: {"policy/loss": 0.1, "outcome/kept": 0.0, "mismatch/mean": 0.0}})
    assert titles(write_report(run.path).read_text()) == ["Loss"]


@pytest.mark.long
@pytest.mark.parametrize("steps", [1, 2, 500])
def test_short_and_long_runs_have_a_report_of_bounded_size(run: RunFolder, steps: int) -> None:
    full_run(run, steps)
    assert write_report(run.path).stat().st_size < 1_500_000


@pytest.mark.long
def test_hostile_output_stays_text(run: RunFolder) -> None:
    full_run(run, 2)
    journal = Journal(run, 1)
    journal.append(episode(1, 0, "doc_mc", HOSTILE, outcome=f"dropped:{HOSTILE}"))
    journal.append(episode(1, 1, "doc_general_qa", HOSTILE + "x" * 1_000_000))
    journal.close()
    html = write_report(run.path).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not any(name.startswith("on") or name in ("src", "srcset") for name, _ in page.attributes)
    assert not any(
        value.startswith(("http", "//")) for name, value in page.attributes if name.endswith("href") and value
    )
    assert "<script>alert('x')</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert not re.search("[\u202a-\u202e\x00\x1b]", html)
    assert len(html) < 1_500_000


@pytest.mark.long
def test_a_page_needs_nothing_but_itself(run: RunFolder) -> None:
    full_run(run, 3)
    html = write_report(run.path).read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import""", html)


@pytest.mark.long
def test_the_report_says_what_of_the_corpus_was_left_out(run: RunFolder) -> None:
    full_run(run, 2)
    facts = {"clusters": 1234, "documents": 5678, "tokens": 9, "duplicates": 3, "skipped": {"not UTF-8": 17}}
    run.sources.write_text(json.dumps({"web": {**facts, "examples": {"not UTF-8": f"{HOSTILE}: not UTF-8"}}}))
    page = Page(write_report(run.path).read_text(encoding="utf-8"))
    assert all(shown in page.text for shown in ("1,234", "5,678", "3 duplicates", "17 not UTF-8"))
    assert "script" not in page.tags


def test_a_run_without_steps_has_no_report(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(SpellError, match="has no finished step to report"):
        write_report(run.path)
    with pytest.raises(SpellError, match="is not a run's folder"):
        write_report(tmp_path)
