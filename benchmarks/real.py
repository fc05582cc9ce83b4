"""A real model through the whole house, by the commands that a user has: SmolLM2-135M-Instruct, a small Llama.

    make real

Every check says what became of it as soon as it is known; the model, the run's folder and the exported models stay in
`build/real`. The model is quantised to four bits and small: it stands for the shapes, the tokenizer and the template
of a real one, and its answers show that it reads, not how well.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.checks import Check, Figures, made, markdown, table
from benchmarks.smollm2 import convert
from spell_megatron.base.interpreter import python
from spell_megatron.run.record import RunFolder, read_metrics
from spell_megatron.types import SpellError
from tokenizer.chat import ChatTokenizer

_HERE = Path(__file__).parent
_QUESTION, _ANSWER = "What is the capital of France?", "Paris"
_BOUND = 1e-4
"""Largest difference of a log-prob that numerics explain in float32, in nats."""


class Real:
    """The checks, in a folder of their own."""

    def __init__(self, work: Path) -> None:
        self._model, self._runs = work / "smollm2-135m", work / "runs"
        self._imported, self._exported = work / "imported", work / "exported"
        self._run: RunFolder | None = None

    def checks(self) -> Iterator[Check]:
        yield "the model folder", self.fetched
        yield "its chat template", self.asked
        yield "log-probs of the model", lambda: self.agrees(self._model)
        yield "import-hf and export-hf", self.returned
        yield "three steps of static questions", self.trained
        yield "engine and learner after a resync", self.resynced
        yield "log-probs of the trained model", lambda: self.agrees(self._trained.hf)
        yield "export-hf of the run", self.exported

    def fetched(self) -> Figures:
        """Out of the package, converted."""
        convert(self._model)
        sizes = [tensor.numel() for tensor in load_file(self._model / "model.safetensors").values()]
        return {"tensors": len(sizes), "parameters": f"{sum(sizes):,}"}

    def asked(self) -> Figures:
        """Prompts are what transformers makes of the template, and the model answers one and ends its turn."""
        codec, theirs = ChatTokenizer.load(self._model), AutoTokenizer.from_pretrained(self._model)
        messages = [{"role": "user", "content": _QUESTION}]
        prompt = codec.prompt(_QUESTION)
        if prompt != theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False):
            raise SpellError("our prompt is not what transformers makes of the template")
        model = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0, len(prompt) :]
        answer = codec.decode(ids.tolist()).strip()
        if _ANSWER not in answer or int(ids[-1]) not in codec.eos_ids:
            raise SpellError(f"asked for the capital of France it wrote {answer!r}")
        return {"prompt tokens": len(prompt), "answer": answer}

    def agrees(self, folder: Path) -> Figures:
        """`spell-megatron parity`, which fails beyond 1e-4 nats."""
        found = command("parity", str(folder), "--tokens", "64", "--json")
        return {f"max {pair}": gap for pair, gap in found["max"].items()} | {"tokens": found["tokens"]}

    def returned(self) -> Figures:
        """To a Megatron checkpoint and back, bit by bit, tokenizer and template included."""
        for out in (self._imported, self._exported):
            shutil.rmtree(out, ignore_errors=True)
        command("import-hf", str(self._model), str(self._imported))
        command("export-hf", str(self._imported), str(self._exported))
        for name in ("tokenizer.json", "chat_template.jinja"):
            if (self._model / name).read_bytes() != (self._exported / name).read_bytes():
                raise SpellError(f"{name} is not the same in the exported folder")
        return {"tensors, bit for bit": _equal(self._model, self._exported)}

    def trained(self) -> Figures:
        """`spell-megatron train`: the toy world's questions, and the shipped passages before and after."""
        found = command(
            "train",
            str(_HERE / "smollm2.yaml"),
            f"model.path={self._model.resolve()}",
            f"heldout.path={_HERE / 'passages.jsonl'}",
            f"runs={self._runs}",
            "--json",
        )
        self._run = RunFolder.open(Path(found["run_dir"]))
        steps = [row for row in read_metrics(self._run) if row["step"]]
        before, after = found["heldout_before"]["mean"], found["heldout_after"]["mean"]
        return {
            "run": os.path.relpath(self._run.path),
            "steps": len(steps),
            "tokens trained": round(sum(row["tokens/trained"] or 0 for row in steps)),
            "gradient norms": ", ".join(f"{row['policy/grad_norm']:.3g}" for row in steps),
            "passages before": before,
            "after": after,
        }

    def resynced(self) -> Figures:
        """From step 2 on engines sample from weights that were sent to them, and the learner must score alike."""
        rows = [row for row in read_metrics(self._trained) if (row["step"] or 0) > 1]
        gap = max((gap for row in rows if (gap := row["mismatch/max"]) is not None), default=math.inf)
        moved = _moved(self._model, self._trained.hf)
        if not gap <= _BOUND:
            raise SpellError(f"after a resync they differ by {gap:.2g} nats")
        if not moved > 10 * _BOUND:
            raise SpellError(f"training moved log-probs by {moved:.2g} nats: too little to tell")
        return {"max difference": gap, "moved by training": moved}

    def exported(self) -> Figures:
        """What `export-hf` makes of the last checkpoint is what the run has exported."""
        shutil.rmtree(self._exported, ignore_errors=True)
        command("export-hf", str(self._trained.path), str(self._exported))
        return {"tensors, bit for bit": _equal(self._trained.hf, self._exported)}

    @property
    def _trained(self) -> RunFolder:
        if self._run is None:
            raise SpellError("there is no trained model")
        return self._run


def command(*arguments: str) -> dict[str, Any]:
    """A command of the house, its progress on the terminal; with `--json` its answer. SpellError where it fails."""
    done = subprocess.run(python("spell_megatron.tools.cli", *arguments), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SpellError(f"`spell-megatron {' '.join(arguments)}` ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1]) if "--json" in arguments else {}


def _equal(folder: Path, other: Path) -> int:
    """The number of tensors. SpellError where one differs in a bit."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    differ = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
    if differ or len(ours) != len(theirs):
        raise SpellError(f"{len(differ)} of {len(ours)} tensors differ, {differ[:1]} is the first")
    return len(ours)


@torch.no_grad()
def _moved(old: Path, new: Path) -> float:
    """Mean absolute difference of two models' log-probs of a passage, in nats."""
    passage = json.loads((_HERE / "passages.jsonl").read_text(encoding="utf-8").splitlines()[0])
    ids = torch.tensor([ChatTokenizer.load(old).encode(passage["documents"][0])])
    scores = []
    for folder in (old, new):
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0, :-1]
        scores.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None]))
    return float((scores[1] - scores[0]).abs().mean())


def main(
    work: Annotated[Path, typer.Option(help="Folder for model, run and exports.")] = Path("build/real"),
) -> None:
    """Make the checks one after another; the exit code is 1 where one failed."""
    work.mkdir(parents=True, exist_ok=True)
    console, rows = Console(stderr=True, width=150), []
    for name, check in Real(work).checks():
        console.rule(name)
        rows.append(row := made(name, check))
        console.print("[red]failed[/]" if row.fault else "[green]ok[/]", escape(row.fault))
    console.print(table(rows, "SmolLM2-135M-Instruct"))
    (work / "table.md").write_text("\n".join(markdown(rows)) + "\n", encoding="utf-8")
    console.print(f"as Markdown: {work / 'table.md'}")
    raise typer.Exit(any(row.fault for row in rows))


if __name__ == "__main__":
    typer.run(main)
