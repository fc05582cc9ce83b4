"""Keys come from the environment: not from command lines, not into a run's folder, not from files that others read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from typer.testing import CliRunner

from eval.endpoint import Endpoint
from eval.run import JudgeSettings
from launchers.profile import ProfileError, load_profile
from spell_megatron.base.ownership import private
from spell_megatron.base.secret import is_secret, names_secret, write_secret
from spell_megatron.config import ConfigError, load_config
from spell_megatron.run.record import RunFolder
from spell_megatron.tools.cli import app
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit
KEY = "sk-nobody-elses"


@pytest.mark.parametrize(
    ("option", "variable"), [("--api-key", "SPELL_API_KEY"), ("--judge-key", "SPELL_JUDGE_KEY")]
)
def test_a_key_on_a_command_line_is_refused(
    option: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ([option, KEY], [f"{option}={KEY}"]):
        done = CliRunner().invoke(app, ["eval", *given, "--list"])
        assert done.exit_code == 2
        assert variable in done.output and KEY not in done.output
    monkeypatch.setenv(variable, KEY)
    done = CliRunner().invoke(app, ["eval", "--list"])
    assert done.exit_code == 0 and KEY not in done.output


def test_a_key_is_in_no_text_of_its_owner() -> None:
    assert KEY not in repr(JudgeSettings("http://judge", "m", KEY))
    for url in (
        f"http://me:{KEY}@host:8000",
        f"https://{KEY}@host",
        f"me:{KEY}@host",
        f"https://host/v1?key={KEY}",
    ):
        with pytest.raises(SpellError, match="SPELL_API_KEY") as refused:
            Endpoint(url)
        assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "engine_environment={VLLM_API_KEY: %s}",
        "engine={api-key: %s}",
        "engine_environment={HTTPS_PROXY: 'http://me:%s@proxy'}",
        "servers.urls=['http://me:%s@node7:8000']",
    ],
)
def test_no_secret_is_kept_in_a_configuration(override: str) -> None:
    with pytest.raises(
        ConfigError, match=r"looks like a secret.*environment|without a user.*secret_file"
    ) as refused:
        load_config("toy", ["rollout." + override % KEY])
    assert KEY not in str(refused.value)


def test_a_clusters_secrets_are_in_a_private_file_or_in_the_environment(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump({"env": {"HF_TOKEN": KEY, "NCCL_IB_HCA": "mlx5"}}))
    profile.chmod(0o640)
    with pytest.raises(ProfileError, match=r"HF_TOKEN.*chmod 600"):
        load_profile(str(profile))
    profile.chmod(0o600)
    assert load_profile(str(profile), ["nodes=2"]).env["HF_TOKEN"] == KEY
    with pytest.raises(ProfileError, match="export WANDB_API_KEY=") as refused:
        load_profile(str(profile), [f"env={{HF_TOKEN: {KEY}, WANDB_API_KEY: {KEY}}}"])
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        f"export HF_TOKEN={KEY}",
        f"module load a; WANDB_API_KEY='{KEY}' login",
        f'export A=1 "DB_PASS={KEY} x"',
        f'export "DB_PASS=a\\"{KEY}"',
        f'declare -x GITHUB_PAT="{KEY}"',
        f"export HTTPS_PROXY=http://me:{KEY}@proxy",
        f"export HF_TOKEN=${{HF_TOKEN:-{KEY}}}",
        f"export 'HF_TOKEN=$(echo {KEY})'",
    ],
)
def test_so_are_those_of_its_setup(tmp_path: Path, line: str) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump({"setup": ["module load cuda", line]}))
    profile.chmod(0o640)
    with pytest.raises(ProfileError, match=r"holds secrets \([A-Z_]+\).*chmod 600") as refused:
        load_profile(str(profile))
    profile.chmod(0o600)
    assert load_profile(str(profile), ["nodes=2"]).setup[1] == line
    with pytest.raises(ProfileError, match=r"cluster\.setup: [A-Z_]+ on a command line") as typed:
        load_profile("cpu", [f"setup={yaml.safe_dump([line], default_flow_style=True, width=999).strip()}"])
    assert KEY not in str(refused.value) + str(typed.value)


@pytest.mark.parametrize(
    "line",
    [
        "export HF_TOKEN=$(cat ~/.secrets/hf_token | head -n 1)",
        'export HF_TOKEN="$(pass show $(whoami)/hf)"',
        "export HF_TOKEN=`cat ~/token`; export WANDB_API_KEY=${OTHER} OPENAI_API_KEY=$OTHER",
        "export HF_TOKEN_PATH=/home/me/token HF_TOKEN=",
        "export NCCL_IB_HCA=mlx5 HTTPS_PROXY=http://proxy:3128",
    ],
)
def test_what_setup_reads_from_elsewhere_is_no_secret(tmp_path: Path, line: str) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump({"setup": [line]}))
    profile.chmod(0o644)
    assert load_profile(str(profile)).setup == (line,)


def test_another_value_than_the_files_came_by_the_command_line(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump({"env": {"HF_TOKEN": KEY}}))
    profile.chmod(0o600)
    with pytest.raises(ProfileError, match=r"cluster\.env: HF_TOKEN on a command line"):
        load_profile(str(profile), ["env.HF_TOKEN=another"])


def test_what_is_a_secret_by_its_name() -> None:
    secret = [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "api-key",
        "OPENAI_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "PGPASSWORD",
        "MYSQL_PWD",
        "OPENAI_APIKEY",
        "GITHUB_PAT",
        "DB_PASS",
        "SSH_PASSPHRASE",
        "HF_TOKEN_2",
        "NGC_API_KEY_PROD",
        "OPENAI_API_KEYS",
    ]
    harmless = [
        "VLLM_ATTENTION_BACKEND",
        "NCCL_IB_HCA",
        "max_tokens",
        "TOKENIZERS_PARALLELISM",
        "KEYBOARD",
        "hf_overrides",
        "PATH",
        "PYTHONPATH",
        "skip_tokenizer_init",
        "pass_config",
        "long_prefill_token_threshold",
        "VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD",
        "HF_TOKEN_PATH",
    ]
    assert [name for name in secret if not names_secret(name)] == []
    assert [name for name in harmless if names_secret(name)] == []
    assert is_secret("HTTPS_PROXY", f"http://me:{KEY}@proxy:3128")
    assert not is_secret("HTTPS_PROXY", "http://proxy:3128/a@b")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("group", [False, True])
def test_another_user_reaches_nothing_of_a_run_and_the_group_no_secret(group: bool) -> None:
    reads = (
        "import os, sys\n"
        "os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(65534)\n"
        "def reached(path):\n"
        "    try: return bool(os.listdir(path) if os.path.isdir(path) else open(path).read())\n"
        "    except PermissionError: return False\n"
        "print([name for name in sys.argv[2:] if reached(name)])"
    )
    with TemporaryDirectory() as public:
        Path(public).chmod(0o755)
        with private(group):
            run = RunFolder.create(public, "run")
            run.save_config("steps: 1\n")
            write_secret(run.secret)
        for path in (public, run.path, run.config):
            os.chown(path, 0, 4321)
        files = [str(run.path), str(run.config), str(run.secret)]
        for gid, seen in ((65534, []), (4321, files[:2] if group else [])):
            done = subprocess.run(
                [sys.executable, "-c", reads, str(gid), *files], capture_output=True, text=True, check=True
            )
            assert done.stdout.strip() == str(seen)
