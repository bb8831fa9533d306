"""Hugging Face folders of a tiny model for the tests, as transformers itself writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from launch import import_hf
from launch.tokenizer import byte_tokenizer
from model.config import ModelConfig
from model.huggingface import published_config
from tests.model.tiny import tiny

MODEL = tiny(vocab_size=264, initializer_range=0.2)
SPECIAL = {"bos_token_id": 256, "eos_token_id": 256}


def build(config: ModelConfig = MODEL) -> nn.Module:
    """Their model with random weights, norms and selection biases too."""
    torch.manual_seed(4)
    model: nn.Module = DeepseekV3ForCausalLM(DeepseekV3Config(**published_config(config, "float32", SPECIAL)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    return model


def write(folder: Path, config: ModelConfig = MODEL, shard_size: str = "1GB") -> Path:
    """A folder with the model, and bytes as its tokens."""
    build(config).save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by the library."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def import_model(folder: Path, run: Path, text: Path, *overrides: str) -> int:
    data = [f"data.source={text}", "train.sequence_length=16"]
    return import_hf.main(["--hf", str(folder), "--run", str(run), *data, *overrides])
