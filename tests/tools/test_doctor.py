"""What the doctor says of an installation that is not as it should be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from spell_megatron.tools import doctor

pytestmark = pytest.mark.unit


def part(name: str) -> doctor.Finding:
    (found,) = (finding for finding in doctor.examine().parts if finding.part == name)
    return found


@pytest.mark.long
def test_this_installation_can_train() -> None:
    doctor.examine().check()
    assert part("vllm").state == "ok"


@pytest.mark.long
def test_a_vllm_of_another_version_is_wrong_and_the_right_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_wanted", lambda package: Requirement(f"{package}>=0.98,<0.99"))
    found = part("vllm")
    assert found.state == "wrong" and "pip install 'vllm<0.99,>=0.98'" in found.remedy
    with pytest.raises(doctor.SpellError, match="cannot train: vllm"):
        doctor.examine().check()


@pytest.mark.long
@pytest.mark.parametrize("there", [True, False])
def test_who_sends_tokens_to_experts_is_said_where_there_is_a_gpu(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from megatron.core.transformer.moe import fused_a2a

    assert doctor._exchange() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused_a2a, "HAVE_DEEP_EP", there)
    [found] = doctor._exchange()
    assert (found.state, "Dockerfile" in found.remedy) == (("ok", False) if there else ("missing", True))


@pytest.mark.parametrize(
    ("package", "state", "fatal"),
    [
        ("", "ok", False),
        ("raise ImportError('no kernels')", "wrong", False),  # megatron-core expects this, and does without
        ("raise RuntimeError('Found empty meta package')", "wrong", True),
    ],
)
def test_transformer_engine_is_tried_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, state: str, fatal: bool
) -> None:
    engine = tmp_path / "transformer_engine"
    engine.mkdir()
    (engine / "__init__.py").write_text(package)
    (engine / "pytorch.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "_version", lambda *names: f"{names[0]} 2.20.2")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    [found] = doctor._transformer_engine()
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    assert (found.state, found.needed) == (state, fatal)
    assert ("transformer-engine[pytorch]" in found.remedy) == (state != "ok")


def test_a_part_that_cannot_be_looked_at_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def _patches() -> list[doctor.Finding]:
        raise RuntimeError("torn\nin two")

    monkeypatch.setattr(doctor, "_patches", _patches)
    findings = doctor.examine()
    [broken] = [finding for finding in findings.parts if finding.part == "patches"]
    assert (broken.state, broken.found, "torn" in broken.remedy) == ("wrong", "RuntimeError", True)
    assert any(finding.part == "torch" and finding.state == "ok" for finding in findings.parts)
    with pytest.raises(doctor.SpellError, match="cannot train: patches"):
        findings.check()


def test_what_is_wanted_is_what_the_package_says() -> None:
    wanted = doctor._wanted("vllm")
    assert (
        wanted is not None and wanted.specifier.contains("0.32.1") and not wanted.specifier.contains("0.33.0")
    )
