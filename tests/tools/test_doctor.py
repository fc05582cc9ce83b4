"""What the doctor says of an installation that is not as it should be."""

from __future__ import annotations

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


def test_what_is_wanted_is_what_the_package_says() -> None:
    wanted = doctor._wanted("vllm")
    assert (
        wanted is not None and wanted.specifier.contains("0.32.1") and not wanted.specifier.contains("0.33.0")
    )
