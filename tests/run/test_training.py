"""The whole loop on the toy world: a run, its resume, its export, and what bad input is answered with."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import TOY_SEED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from eval import live_benchmarks
from spell_megatron.config import load_config
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.run.opening import open_run
from spell_megatron.run.record import RunFolder, read_metrics
from spell_megatron.run.run import BadStepError, Collected, MismatchError, Run
from spell_megatron.run.train import resume, train
from spell_megatron.tools.cli import app
from spell_megatron.types import Group, SpellError, TrainBatch

pytestmark = pytest.mark.engine

SMALL = (
    "selfplay.questions=3",
    "selfplay.round_questions=12",
    "selfplay.max_rounds=6",
    "selfplay.group_size=4",
    "heldout.questions=6",
    "heldout.samples=2",
    "heldout.every=0",
    "heldout.benchmarks=[toy]",
    "heldout.limit=6",
    "record.checkpoint_every=1",
    "rollout.kv_cache_mib=64",
    "corpus.toy_clusters=6",
)
PROMPTS = [list(range(start, start + 12)) for start in (20, 60, 100)]


def small(runs: Path, *overrides: str) -> tuple[str, ...]:
    return (*SMALL, f"runs={runs}", *overrides)


def texts(run: Path, step: int) -> dict[tuple[int, int], str]:
    """What every finished episode of a step sampled, by its place (the order of arrival is no part of it)."""
    path = RunFolder(run).rollouts(step)
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
    return {(row["round"], row["index"]): json.dumps(row, sort_keys=True) for row in rows}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(runs: Path) -> Path:
    """An uninterrupted run of three steps."""
    return Path(train(load_config("toy", small(runs, "steps=3")), live_benchmarks).run_dir)


def test_a_run_leaves_everything_that_it_promises(whole: Path) -> None:
    run = RunFolder(whole)
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    expected = """
        questioner/reward questioner/documents questioner/format_errors questioner/entropy responder/reward
        responder/length groups/kept_share memory/questions policy/entropy policy/grad_norm mismatch/mean
        tokens/generated time/play
    """
    for name in expected.split():
        assert rows[-1].get(name) is not None, name
    assert max(row["mismatch/max"] for row in rows[1:]) < 1e-3
    assert rows[-1]["heldout/mean"] is not None
    for row in (rows[0], rows[-1]):  # the same questions, asked and graded by the evaluation's own runner
        assert row["eval/toy"] == row["heldout/mean"]
        assert (run.path / f"eval/step-{row['step']:05d}/report.md").is_file()
    assert run.config.is_file()
    assert list(run.tensorboard.iterdir())
    assert run.report.stat().st_size > 10_000
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00002", "step-00003"]
    assert texts(whole, 2)


def test_a_run_stopped_between_two_steps_resumes_bit_by_bit(whole: Path, runs: Path) -> None:
    stopped = Path(train(load_config("toy", small(runs, "steps=2")), live_benchmarks).run_dir)
    resume(stopped, ["steps=3"], live_benchmarks)
    ours, theirs = load_file(stopped / "hf/model.safetensors"), load_file(whole / "hf/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    finished = texts(stopped, 3).keys() & texts(whole, 3).keys()
    assert finished
    assert all(texts(stopped, 3)[place] == texts(whole, 3)[place] for place in finished)
    rows = [read_metrics(RunFolder(run))[-1] for run in (stopped, whole)]
    timed = {name for row in rows for name in row if name.startswith(("time", "tokens/generated"))}
    for name in (rows[0].keys() | rows[1].keys()) - timed:
        assert rows[0].get(name) == rows[1].get(name), name


def test_taking_turns_in_memory_changes_nothing(whole: Path, runs: Path) -> None:
    turns = Path(
        train(
            load_config("toy", small(runs, "steps=3", "rollout.placement=colocated")), live_benchmarks
        ).run_dir
    )
    ours, theirs = load_file(turns / "hf/model.safetensors"), load_file(whole / "hf/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_export_answers_as_the_engine_did(runs: Path, tmp_path: Path) -> None:
    config = load_config("toy", small(runs, "steps=1", "policy.optimizer.lr=1e-3"))

    async def greedy(engine: InProcessEngine) -> list[list[int]]:
        return [
            list((await engine.generate(p, seeds=[0], max_tokens=12, temperature=0.0, top_p=1.0))[0].tokens)
            for p in PROMPTS
        ]

    with open_run(config, None, live_benchmarks) as run:
        collected = run.collect(1)
        updated = run.update(collected)
        run.resync(1)
        run.record(collected, updated, {})
        run.finish()
        assert isinstance(run.lead.engine, InProcessEngine)
        last, hf = asyncio.run(greedy(run.lead.engine)), run.folder.hf
    engine = InProcessEngine(hf, config.rollout, scratch=tmp_path)
    try:
        assert asyncio.run(greedy(engine)) == last
    finally:
        engine.close()
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    for prompt, tokens in zip(PROMPTS, last, strict=True):
        generated = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
            0, len(prompt) :
        ]
        assert generated.tolist()[: len(tokens)] == tokens


def test_groups_on_which_engine_and_learner_differ_are_left_out_of_the_update(runs: Path) -> None:
    def elsewhere(group: Group) -> Group:
        return replace(
            group, samples=tuple(replace(s, logprobs=[x - 0.5 for x in s.logprobs]) for s in group.samples)
        )

    config = load_config(
        "toy",
        small(runs, "steps=1", "record.mismatch_action=drop", "heldout.questions=0", "heldout.benchmarks=[]"),
    )
    with open_run(config, None, live_benchmarks) as opened:
        collected = opened.collect(1)
        first, *rest = collected.batch.groups
        with pytest.raises(MismatchError, match="in every group") as gap:
            opened.update(replace(collected, batch=TrainBatch(tuple(map(elsewhere, (first, *rest))))))
        updated = opened.update(replace(collected, batch=TrainBatch((elsewhere(first), *rest))))
        opened.record(collected, updated, {})
        run, update = opened.folder, updated.update
    assert gap.value.exit_code == 2, "a launched job would be started again, and train past the gap"
    assert not run.rollouts(1).exists(), "another engine would be judged by what this one sampled"
    assert update
    assert [len(group) for group in update.scores.logprobs] == [len(group.samples) for group in rest]
    weights = [weight for group in rest for sample in group.samples for weight in sample.weights]
    assert update.loss == pytest.approx(-sum(weights) / len(weights), abs=1e-6)
    assert read_metrics(run)[-1]["mismatch/dropped"] == 1
    assert (run.checkpoints / "step-00000").is_dir()  # saved before it stopped


def test_bad_numbers_stop_the_run_and_resume_goes_on(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(self: Run, step: int) -> Collected:
        collected = collect(self, step)
        first, second, *rest = collected.batch.groups
        last = second.samples[-1]
        wrong = replace(last, logprobs=[*last.logprobs[:-1], float("nan")])
        batch = TrainBatch((first, replace(second, samples=(*second.samples[:-1], wrong)), *rest))
        return replace(collected, batch=batch)

    quick = ("heldout.questions=0", "heldout.benchmarks=[]", "record.keep_last=1")
    run = Path(train(load_config("toy", small(runs, "name=bad", "steps=1", *quick))).run_dir)
    saved = RunFolder(run).checkpoints / "step-00001"
    collect = Run.collect
    with monkeypatch.context() as patch:
        patch.setattr(Run, "collect", poisoned)
        with pytest.raises(
            BadStepError, match=r"step 2: log-probs of the engine are not finite in group 1 \(\w+, "
        ):
            resume(run, ["steps=2"])
    with pytest.raises(BadStepError, match=r"step 2: the responder's .* makes the same step again") as poor:
        resume(run, ["steps=2", "record.reward_min=1"])
    assert poor.value.exit_code == 2, "another attempt would read the same episodes"
    with pytest.raises(BadStepError, match=r"step 2: after the update weights are .*last checkpoint"):
        resume(run, ["steps=2", "policy.optimizer.lr=1e30", "record.reward_min=null"])
    assert saved.is_dir()
    assert [row["step"] for row in read_metrics(RunFolder(run))] == [0, 1]
    resume(run, ["steps=2", f"policy.optimizer.lr={load_config('toy').policy.optimizer.lr}"])
    assert [row["step"] for row in read_metrics(RunFolder(run))] == [0, 1, 2]
    assert read_metrics(RunFolder(run))[-1]["policy/grad_norm"] > 0


def test_real_text_that_nobody_wrote_for_this(runs: Path, tmp_path: Path) -> None:
    """Licence texts: the toy model understands nothing of them, and the run says so instead of breaking."""
    source = tmp_path / "licences"
    source.mkdir()
    for path in sorted(Path("/usr/share/common-licenses").glob("*"))[:6] or [Path(__file__)]:
        shutil.copyfile(path, source / f"{path.name}.txt")
    overrides = small(
        runs, "steps=3", f"corpus.sources=[{{path: {source}}}]", "heldout.questions=0", "selfplay.max_rounds=1",
        "selfplay.round_questions=6",
    )  # fmt: skip
    with pytest.raises(SpellError) as error:
        train(load_config("toy", overrides), live_benchmarks)
    assert "could not fill its batch" in str(error.value)
    assert "Keys most likely to help" in str(error.value)


# ---- bad input, through the command line


def cli(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def complaint(result: Result) -> str:
    assert result.exit_code != 0
    text = " ".join(result.output.split())
    assert "Traceback" not in text
    assert text.count("error") >= 1
    return text


def test_a_missing_model_folder(tmp_path: Path) -> None:
    text = complaint(cli("train", "toy", f"runs={tmp_path}", f"model.path={tmp_path / 'nothing'}"))
    assert "is not a model folder" in text


@pytest.mark.parametrize("damage", ["truncated", "not safetensors", "no weights"])
def test_a_damaged_model_folder(tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(TOY_SEED, model)
    weights = model / "model.safetensors"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "not safetensors":
            weights.write_bytes(b"\x80\x04 a pickle, say")
        case _:
            weights.unlink()
    text = complaint(cli("train", "toy", f"runs={tmp_path}", f"model.path={model}"))
    assert str(model) in text


@pytest.mark.parametrize(("content", "word"), [(None, "nothing usable"), (b"\x00\xff\xfe" * 99, "skipped")])
def test_an_unusable_corpus(tmp_path: Path, content: bytes | None, word: str) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    if content:
        (source / "binary.txt").write_bytes(content)
    text = complaint(cli("train", "toy", f"runs={tmp_path}", f"corpus.sources=[{{path: {source}}}]"))
    assert str(source) in text


def test_a_disk_that_cannot_be_written() -> None:
    assert "cannot write" in complaint(cli("train", "toy", "runs=/proc/nowhere"))


def test_an_interrupted_and_then_killed_run_goes_on_to_its_end(tmp_path: Path) -> None:
    """Ctrl-C in the second step, SIGKILL in the third; nothing that was finished is generated again."""
    first = started("train", "toy", *small(tmp_path, "steps=50"))
    until(first, lambda: list(tmp_path.glob("toy-*/checkpoints/step-00001")))
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    [run] = [path for path in tmp_path.glob("toy-*") if path.is_dir()]
    assert read_metrics(RunFolder(run))
    done = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-?????"))

    second = started("resume", str(run))
    until(second, lambda: (run / f"checkpoints/step-{done + 1:05d}").exists() and texts(run, done + 2))
    second.kill()
    second.communicate()
    finished = [texts(run, step) for step in (done + 1, done + 2)]
    resume(run, [f"steps={done + 2}"], live_benchmarks)
    assert [row["step"] for row in read_metrics(RunFolder(run))] == list(range(done + 3))
    for step, before in zip((done + 1, done + 2), finished, strict=True):
        lines = RunFolder(run).rollouts(step).read_text().splitlines()
        assert len(lines) == len(texts(run, step)), "an episode was written down twice"
        assert before
        assert before.items() <= texts(run, step).items()


def started(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spell_megatron.tools.cli", *args]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        # What a shell starts in the background ignores Ctrl-C, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def until(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
