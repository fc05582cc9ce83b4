"""How the installed vLLM is asked for experts, what it answers, and where it refuses.

It tells them from its second model runner, on a GPU. What of that can run on a CPU is held against its own classes.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import make_model

from spell_megatron.config import RolloutConfig
from spell_megatron.rollout import backend, dialect
from spell_megatron.rollout.experts import PromptExperts, decoded
from spell_megatron.rollout.server import Launch

pytestmark = pytest.mark.engine

PROMPT = [7, 8, 9, 10]


def told(tokens: int, first: int = 0) -> np.ndarray:
    """Two layers of three experts each, whose first names the token."""
    rows = np.arange(first, first + tokens)[:, None, None]
    return (np.zeros((tokens, 2, 3)) + rows).astype(np.uint8)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("vllm")
    backend.quiet()
    with backend.undisturbed(scratch):
        import vllm.entrypoints.openai.api_server  # noqa: F401
    return scratch


def test_the_servers_command_line_asks_for_them(scratch: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    for tells in (True, False):
        launch = Launch(scratch, RolloutConfig(), scratch, scratch / "log", tells_experts=tells)
        parsed = parser.parse_args(launch.command({"port": 8000})[3:])
        assert AsyncEngineArgs.from_cli_args(parsed).enable_return_routed_experts is tells


def test_where_there_is_no_gpu_vllm_refuses(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    mixture, settings = make_model("moe", scratch / "moe"), RolloutConfig(dtype="float32", max_model_len=64)
    arguments = dialect.engine_arguments(settings, dialect.CPU, tells_experts=True)
    for chosen, refusal in (("0", "requires Model Runner V2"), ("1", "V2 requires Triton")):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", chosen)
        with backend.undisturbed(scratch), pytest.raises(ValueError, match=refusal):
            EngineArgs(model=str(mixture), **arguments).create_engine_config()


def test_rows_are_tokens_then_layers_then_experts_by_number(scratch: Path) -> None:
    from vllm.forward_context import ForwardContext, override_forward_context
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer

    def capturer(experts: int) -> Any:
        model = SimpleNamespace(
            get_total_num_hidden_layers=lambda: 2,
            get_num_experts=lambda: experts,
            get_num_experts_per_tok=lambda: 3,
            hf_text_config=SimpleNamespace(model_type="moe"),
        )
        parallel = SimpleNamespace(data_parallel_rank=0, tensor_parallel_size=1)
        return RoutedExpertsCapturer(16, SimpleNamespace(model_config=model, parallel_config=parallel))

    layers = [torch.randint(0, 256, (6, 3), dtype=torch.int32) for _ in range(2)]
    few = capturer(256)
    with override_forward_context(ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={})):
        for number, chosen in enumerate(layers):
            few.capture(number, chosen)
    rows = few.snapshot_routing_data(6).numpy()
    np.testing.assert_array_equal(rows, torch.stack(layers, 1).numpy())
    assert rows.dtype == np.uint8
    assert capturer(257).snapshot_routing_data(1).dtype == torch.uint16


def test_they_end_before_the_last_token_and_skip_what_is_known(scratch: Path) -> None:
    """By vLLM's scheduler, whose request of `PROMPT` and three tokens the worker has told of all its rows."""
    from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector, AuxRequestOutput

    request = SimpleNamespace(request_id="r", num_tokens=7, is_finished=lambda: True)
    connector = AuxOutputSchedulerConnector()
    rows = connector.take_output(request, {"r": AuxRequestOutput(0, told(7))})
    assert [len(part) for part in PromptExperts().split(PROMPT, None, rows, 3)] == [4, 2]
    known = told(4)
    rows = connector.take_output(request, {"r": AuxRequestOutput(4, told(3, first=4))})
    np.testing.assert_array_equal(PromptExperts().split(PROMPT, known, rows, 3)[1], told(2, first=4))

    started = SimpleNamespace(
        block_hashes=[],
        num_prompt_tokens=4,
        num_output_tokens=0,
        num_tokens=4,
        sampling_params=SimpleNamespace(**{dialect.EXPERTS_FROM: 4}),
    )
    scheduled = SimpleNamespace(num_scheduled_tokens={"r": 4})
    assert connector.build_connector_meta(scheduled, {"r": started}).requests == {"r": 4}


def test_the_token_route_takes_the_start_and_brings_them_back(scratch: Path) -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest, GenerateTokensChoice
    from vllm.outputs import CompletionOutput
    from vllm.utils.serial_utils import numpy2base64

    asked = GenerateRequest.model_validate(
        {"token_ids": PROMPT, "sampling_params": {dialect.EXPERTS_FROM: 4}}
    )
    assert asked.sampling_params.routed_experts_prompt_start == 4
    for rows in (told(6), told(6).astype(np.uint16)):
        choice = GenerateTokensChoice(index=0, routed_experts=numpy2base64(rows)).model_dump()
        np.testing.assert_array_equal(decoded(choice["routed_experts"]), rows)
        assert decoded(choice["routed_experts"]).dtype == rows.dtype
    output = CompletionOutput(0, "", [1], None, None, routed_experts=told(1))
    np.testing.assert_array_equal(output.routed_experts, told(1))  # in this process
