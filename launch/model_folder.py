"""A whole model in this process, out of a run's newest checkpoint or a Hugging Face folder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.config import Config, load
from launch.run_folder import tokenizer_of
from launch.run_weights import RunWeights, newest
from launch.tokenizer import CONFIG_FILE, FILE, Tokenizer, open_tokenizer, published_tokenizer
from model.config import ModelConfig
from model.huggingface import HuggingFaceError, Published, is_left_out, model_config, published, published_copies
from model.safetensors_folder import SafetensorsFolder, read_json
from model.transformer import Transformer
from parallel.checkpoint import CheckpointError

RUN_FILE, HUGGING_FACE_FILE = "config.yaml", "config.json"
ORIGIN_FILES = (HUGGING_FACE_FILE, FILE, CONFIG_FILE, "special_tokens_map.json", "generation_config.json")
"""What a run keeps of an imported model, where its tokens are not bytes."""


@dataclass(frozen=True)
class HuggingFaceModel:
    """A Hugging Face folder that was checked: it has every tensor of ``config``'s model, and no unknown one.
    ``config`` has no multi-token-prediction module if the tensors of the one that ``values`` promises are not there:
    transformers writes such folders."""

    path: Path
    values: dict[str, Any]
    config: ModelConfig
    folder: SafetensorsFolder

    def check(self, config: ModelConfig) -> None:
        """Raises HuggingFaceError when the tensors are not those of ``config``'s model."""
        expected = [*published(config), *self._copies(config)]
        self.folder.check(expected, lambda name: is_left_out(name, config, self.config.num_nextn_predict_layers))

    def left_out(self, config: ModelConfig) -> list[str]:
        """Tensors that have no place in ``config``'s model, sorted."""
        modules = self.config.num_nextn_predict_layers
        return sorted(name for name in self.folder.tensors if is_left_out(name, config, modules))

    def differing_copies(self, config: ModelConfig) -> list[str]:
        """Those of the multi-token-prediction module's copies of embedding and head that are no copies. It has no place
        for an embedding or head of its own: they are shared."""
        originals = {tensor.parameter: tensor for tensor in published(config)}
        return [
            copy.name
            for copy in self._copies(config)
            if not torch.equal(self.folder.read(copy), self.folder.read(originals[copy.parameter]))
        ]

    def _copies(self, config: ModelConfig) -> list[Published]:
        return [copy for copy in published_copies(config) if copy.name in self.folder.tensors]


def open_hugging_face(path: Path) -> HuggingFaceModel:
    """Raises HuggingFaceError, naming what lacks or does not fit."""
    if not path.is_dir():
        raise HuggingFaceError(f"{path} must be a folder with a Hugging Face model")
    file = path / HUGGING_FACE_FILE
    values = read_json(file)
    try:
        config = model_config(values)
    except HuggingFaceError as error:
        raise HuggingFaceError(f"{file}: {error}") from None
    folder = SafetensorsFolder(path)
    module = f"model.layers.{config.num_hidden_layers}."
    if not any(name.startswith(module) for name in folder.tensors):
        config = replace(config, num_nextn_predict_layers=0)
    model = HuggingFaceModel(path, values, config, folder)
    model.check(config)
    return model


@dataclass(frozen=True)
class Run:
    """A run folder and its newest complete checkpoint, which was checked to be of the run's model."""

    path: Path
    config: Config
    weights: RunWeights


def open_run(path: Path, ema: bool = False) -> Run:
    """``ema``: with the average of the weights. Raises CheckpointError or ConfigError, naming what lacks."""
    if not (path / RUN_FILE).is_file():
        raise CheckpointError(f"{path} must be a run folder, and it has no {RUN_FILE}")
    config = load(path / RUN_FILE)
    weights = RunWeights(newest(path / "checkpoints"), ema)
    weights.check(list(published(config.model)))
    return Run(path, config, weights)


@dataclass(frozen=True)
class LoadedModel:
    """``source``: what the weights are from. ``sequence_length``: tokens that the model is used to at once.
    ``document_start``: the token that begins a document, if the model was trained to stay within documents."""

    model: Transformer
    tokenizer: Tokenizer
    source: str
    sequence_length: int
    document_start: int | None = None

    @property
    def precision(self) -> str:
        """What the model computes in."""
        return "bf16" if next(self.model.parameters()).dtype == torch.bfloat16 else "fp32"


def load_model(path: Path, ema: bool = False) -> LoadedModel:
    """The model of a run or Hugging Face folder, on a GPU in BF16 where there is one, else on the CPU in FP32. ``ema``:
    with a run's moving average for weights.

    Raises CheckpointError, ConfigError, TokenizerError or HuggingFaceError, one line each.
    """
    if (path / RUN_FILE).is_file():
        run = open_run(path, ema)
        tokenizer = open_tokenizer(tokenizer_of(path, run.config))
        config, read, source = run.config.model, run.weights.read, str(run.weights.path)
        length = run.config.train.sequence_length
        start = tokenizer.end if run.config.data.document_boundaries == "attention" else None
    elif (path / HUGGING_FACE_FILE).is_file():
        if ema:
            raise HuggingFaceError(f"--ema needs a run folder, and {path} is a Hugging Face model")
        theirs = open_hugging_face(path)
        tokenizer = published_tokenizer(path, theirs.values)
        config, read, source = theirs.config, theirs.folder.read, str(path)
        length, start = min(config.original_max_position_embeddings, 1024), None
    else:
        raise HuggingFaceError(f"{path} must be a run folder ({RUN_FILE}) or a Hugging Face one ({HUGGING_FACE_FILE})")
    if max(tokenizer.size, tokenizer.end + 1) > config.vocab_size:
        raise HuggingFaceError(
            f"vocab_size={config.vocab_size} of {path} must be at least {tokenizer.size}, the tokens of its tokenizer"
        )
    return LoadedModel(_whole(config, read), tokenizer, source, length, start)


def _whole(config: ModelConfig, read: Callable[[Published], Tensor]) -> Transformer:
    """The model with the weights that ``read`` gives, on its device and in its dtype."""
    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    with torch.device("meta"):
        model = Transformer(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, device=device))
    fill(model, read)
    return model


@torch.no_grad()
def fill(model: Transformer, read: Callable[[Published], Tensor]) -> None:
    """Give a model the weights that ``read`` gives; each is converted as it comes."""
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for tensor in published(model.config):
        flat = places[tensor.parameter].view(-1)
        flat[tensor.offset : tensor.offset + tensor.numel].copy_(read(tensor).reshape(-1))
