"""``dualpipe export RUN --hf DIR``: the newest checkpoint of a run as a Hugging Face model.

The folder has the published names and dtypes, so that transformers, vLLM and SGLang load it, and the tokens: those of
the model that the run was imported from, or bytes. Weights go over a tensor at a time, from the FP32 masters.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.aside import built_aside
from launch.command import Parser, progress_bar, reported
from launch.data import END_OF_DOCUMENT
from launch.model_folder import ORIGIN_FILES, Run, open_run
from launch.run_folder import ORIGIN
from launch.tokenizer import CONFIG_FILE, FILE, byte_tokenizer, tokenizer_config
from launch.whole_file import write_whole
from model.huggingface import Published, published, published_config, published_copies
from model.safetensors_folder import INDEX, SINGLE, index_of, read_json, shard_names, shards, write_shard

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 5 * 10**9

_EPILOG = """\
example:
  dualpipe export runs/tiny-cpu --hf models/tiny

Interrupted, the same command goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line about what was given."""

    def command() -> None:
        arguments = _parser().parse_args(argv)
        export(arguments.run, arguments.hf, arguments.dtype, SHARD_BYTES, arguments.ema)

    return reported(command)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dualpipe export",
        description="Write the newest checkpoint of a run as a Hugging Face deepseek_v3 model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--hf", required=True, type=Path, metavar="DIR", help="folder to make; must not exist")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="bf16", help="of the weights (default bf16)")
    parser.add_argument(
        "--ema", action="store_true", help="the moving average of a run's weights (optimizer.ema_decay)"
    )
    return parser


def _origin(run: Run) -> Path | None:
    """The folder with the tokenizer that the run was trained with; None for bytes."""
    if (run.path / ORIGIN).is_dir():
        return run.path / ORIGIN
    name = run.config.data.tokenizer
    return None if name == "bytes" else Path(name).expanduser()


def export(path: Path, target: Path, dtype_name: str, shard_bytes: int, ema: bool = False) -> None:
    """``shard_bytes``: size of a file, at most. Raises one of the users' errors."""
    run = open_run(path, ema)
    dtype = _DTYPES[dtype_name]
    origin = _origin(run)
    special = _special_tokens(origin)
    config = published_config(run.config.model, str(dtype).removeprefix("torch."), special)
    parts = shards([*published(run.config.model), *published_copies(run.config.model)], dtype, shard_bytes)
    files = dict(zip(shard_names(len(parts)), parts, strict=True))
    index = (run.weights.path / ".metadata").read_bytes()
    source = {
        "checkpoint": str(run.weights.path.absolute()),
        "index": hashlib.sha256(index).hexdigest(),
        "dtype": dtype_name,
        "ema": ema,
        "files": list(files),
    }
    with built_aside(target, "--hf", source) as partial:
        _write_files(run, partial, files, dtype)
        if SINGLE not in files:
            write_whole(partial / INDEX, _json(index_of(files, dtype)))
        write_whole(partial / "config.json", _json(config))
        if origin is None:
            write_whole(partial / FILE, _json(byte_tokenizer(run.config.data.fill_in_middle > 0)))
            write_whole(partial / CONFIG_FILE, _json(tokenizer_config(config["max_position_embeddings"])))
        else:
            for name in ORIGIN_FILES:
                if name != "config.json" and (origin / name).is_file():
                    shutil.copyfile(origin / name, partial / name)
    print(f"{target}: {run.weights.path.name} of {path}{', its average,' if ema else ''} in {dtype_name}")


def _special_tokens(origin: Path | None) -> dict[str, Any]:
    """The tokens that begin and end a text, as ``config.json`` names them."""
    if origin is None:
        return {"bos_token_id": END_OF_DOCUMENT, "eos_token_id": END_OF_DOCUMENT}
    values = read_json(origin / "config.json")
    return {key: values.get(key) for key in ("bos_token_id", "eos_token_id")}


def _write_files(run: Run, folder: Path, files: dict[str, list[Published]], dtype: torch.dtype) -> None:
    with progress_bar("export", sum(map(len, files.values()))) as advance:

        def read(tensor: Published) -> Tensor:
            advance()
            return run.weights.read(tensor)

        for name, tensors in files.items():
            if not (folder / name).is_file():
                write_shard(folder / name, tensors, dtype, read)
            else:
                for _ in tensors:
                    advance()


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
