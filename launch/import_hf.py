"""``dualpipe import --hf DIR --run RUN [key=value ...]``: a Hugging Face model as a run that is at its beginning.

The run's configuration is the model's, defaults for the rest, and the overrides; its weights are a checkpoint of step 0
with zero moments, readable on any layout. Weights go over a tensor at a time.
"""

import argparse
import itertools
import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launch.aside import built_aside
from launch.command import Parser, progress_bar, reported
from launch.config import Config, ConfigError, RunConfig, from_dict
from launch.config_file import apply
from launch.data import open_dataset
from launch.invocation import program_words
from launch.model_folder import ORIGIN_FILES, HuggingFaceModel, open_hugging_face
from launch.run_folder import ORIGIN, RunFolder
from launch.run_weights import RunWeightsWriter
from launch.tokenizer import FILE, is_byte_tokenizer
from model.huggingface import Published, published
from model.size import size
from parallel.optimizer_config import OptimizerConfig

_EPILOG = """\
example:
  dualpipe import --hf DeepSeek-V3 --run runs/v3 data.source=corpus train.sequence_length=4096
  dualpipe train runs/v3 train.steps=100

The model, the data, the seed, the sequence length and precision.compute belong to the run from its beginning, so they
are given here; the rest may be given to 'train' too. model.yarn_factor=40 stretches the context. Interrupted, the same
command goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line about what was given."""
    return reported(lambda: _import(_parser().parse_intermixed_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dualpipe import",
        description="Make a run folder out of a Hugging Face deepseek_v3 model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hf", required=True, type=Path, metavar="DIR", help="folder with config.json and safetensors")
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="run folder to make; must not exist")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="configuration of the run")
    return parser


def _import(arguments: argparse.Namespace) -> None:
    theirs = open_hugging_face(arguments.hf)
    own_tokenizer = (theirs.path / FILE).is_file() and not is_byte_tokenizer(theirs.path / FILE)
    config = _configuration(theirs, arguments.run, own_tokenizer, arguments.overrides)
    theirs.check(config.model)  # an override may have made it another one
    fingerprint = open_dataset(config).fingerprint
    if config.data.tokenizer == str(theirs.path):  # the run has its own copy
        config = replace(config, data=replace(config.data, tokenizer=str(arguments.run / ORIGIN)))
    source = {
        "folder": str(theirs.path.absolute()),
        "files": theirs.folder.identity(),
        "model": asdict(config.model),
    }
    with built_aside(arguments.run, "--run", source) as partial:
        _write_weights(theirs, config, partial / "checkpoints" / "step-00000000")
        if own_tokenizer:
            _keep_origin(theirs.path, partial / ORIGIN)
        folder = RunFolder(replace(config, run=RunConfig(str(partial))))
        folder.open(config, fingerprint).close()
        left, differing = theirs.left_out(config.model), theirs.differing_copies(config.model)
        folder.events.write("import", source=source["folder"], left_out=left, differing_copies=differing)
    if left:
        print(f"left out {len(left)} tensors that have no place here, {left[0]} .. {left[-1]}", file=sys.stderr)
    for name in differing:
        print(f"{name} is no copy of the main model's: multi-token prediction shares the main model's", file=sys.stderr)
    if theirs.values.get("num_nextn_predict_layers") and not theirs.config.num_nextn_predict_layers:
        print("multi-token prediction is left out: the folder has no tensors of its module", file=sys.stderr)
    print(f"{arguments.run}: {size(config.model)}")
    again = shlex.quote(str(arguments.run))
    print(f"to train it: {program_words(sys.argv[0], os.environ, Path.cwd(), 'train')} {again}")


def _configuration(theirs: HuggingFaceModel, run: Path, own_tokenizer: bool, overrides: Sequence[str]) -> Config:
    """One rank, a short run whose warm-up and checkpoints are in proportion to it, and all else from the model and the
    overrides. Raises ConfigError."""
    context = theirs.config.original_max_position_embeddings
    values: dict[str, Any] = {
        "model": asdict(theirs.config),
        "train": {"steps": 100, "sequence_length": min(context, 1024), "global_batch_size": 8},
        "optimizer": {"warmup_steps": 0},
    }
    if own_tokenizer:
        values["data"] = {"tokenizer": str(theirs.path)}
    for override in overrides:
        apply(Config, values, override)
    values["run"] = {"dir": str(run)}
    config = from_dict(values)
    _check_context(config)
    given = {override.partition("=")[0].strip() for override in overrides}
    steps, warmup, every = config.train.steps, config.optimizer.warmup_steps, config.checkpoint.every
    if "optimizer.warmup_steps" not in given and not config.phases.learning_rate:
        warmup = min(OptimizerConfig().warmup_steps, steps // 10)
    if "checkpoint.every" not in given:
        every = min(1000, -(-steps // 4))
    return replace(
        config,
        optimizer=replace(config.optimizer, warmup_steps=warmup),
        checkpoint=replace(config.checkpoint, every=every),
    )


def _check_context(config: Config) -> None:
    """Refuse sequences that go beyond the positions that the model knows."""
    original = config.model.original_max_position_embeddings
    context, length = round(original * config.model.yarn_factor), config.train.sequence_length
    if length > context:
        raise ConfigError(
            f"train.sequence_length={length} must be at most {context}, the model's max_position_embeddings; "
            f"model.yarn_factor={math.ceil(length / original)} stretches it"
        )


def _write_weights(theirs: HuggingFaceModel, config: Config, checkpoint: Path) -> None:
    """A file for every layer, so that an interruption costs a layer at most."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    writer = RunWeightsWriter(checkpoint)
    tensors = list(published(config.model))
    files = [list(group) for _, group in itertools.groupby(tensors, key=_place)]
    with progress_bar("import", len(tensors)) as advance:

        def read(tensor: Published) -> Any:
            advance()
            return theirs.folder.read(tensor)

        for number, group in enumerate(files):
            if writer.has(number):
                for _ in group:
                    advance()
            else:
                writer.write_file(number, group, read)
    writer.finish(len(files))


def _place(tensor: Published) -> str:
    """What tensors of one file have in common: the layer, the module that predicts further, or the parameter outside of
    the layers."""
    kind, _, rest = tensor.parameter.partition(".")
    return kind if kind == "mtp" else f"{kind}.{rest.split('.')[0]}"


def _keep_origin(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in ORIGIN_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


if __name__ == "__main__":
    sys.exit(main())
