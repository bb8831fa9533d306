"""What FP8 saves of memory: bytes a parameter, and bytes a token that a layer keeps for its backward.

    python -m benchmarks.fp8_storage [configs/tiny-cpu.yaml] [--json]

Everything is measured on a CPU: tensors that a worker holds, and storages that autograd keeps. Beside it stands what
the widths predict.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from launch.command import UsageError
from launch.config import Config, ConfigError, load
from launch.precision import check_memory
from model.config import ModelConfig
from model.fp8.assign import AFTER_ATTENTION, PLAIN, recipes, set_precision
from model.fp8.gemm import Emulated
from model.fp8.linear import Fp8Products, Recipe
from model.linear import Linear, WeightGradients, own
from model.mlp import MLP, Experts
from model.transformer import Transformer
from parallel.mesh import Layout
from parallel.worker import Job, Worker

CONFIG = Path(__file__).parents[1] / "configs" / "tiny-cpu.yaml"
SCALES = 4 / 128
"""Bytes of the FP32 scales, for each number in 1 x 128 tiles; more where a row ends in a smaller tile."""
BYTES_A_PARAMETER = 18
"""Of a measured model: the 15 of FP8 that are held, and what comes and goes."""
TOKENS = 128
PRECISIONS = ("bf16", "fp8")


def held_bytes(config: Config) -> list[dict[str, Any]]:
    """Bytes that a worker alone holds for a parameter after a step. In a replica group of R, masters and moments are
    split R ways. FP8 adds the blocks of the weights that products take, which is not all of the parameters."""
    predicted = {"copy that computes, BF16": 2, "gradient, FP32": 4, "master, FP32": 4, "AdamW's moments, BF16": 4}
    rows: list[dict[str, Any]] = [
        {"held": name, "predicted": {precision: of for precision in PRECISIONS}} for name, of in predicted.items()
    ]
    rows.append({"held": "weights in FP8 blocks", "predicted": {"bf16": 0.0, "fp8": _blocks_a_parameter(config.model)}})
    for precision in PRECISIONS:
        for row, figure in zip(rows, _held_by_a_worker(config, precision), strict=True):
            row[precision] = figure
    return rows


def _held_by_a_worker(config: Config, precision: str) -> list[float]:
    worker = _worker(config, precision)
    worker.evaluate(torch.zeros(2, TOKENS + 1, dtype=torch.int64), 2)
    buckets = [bucket for held in worker.held.values() for bucket in held.buckets]
    count = sum(segment.numel for bucket in buckets for segment in bucket.segments)
    tensors = (
        [bucket.parameters for bucket in buckets],
        [bucket.gradients for bucket in buckets],
        [bucket.master for bucket in buckets],
        [*worker.optimizer.first, *worker.optimizer.second],
    )
    blocks = [held.blocks.nbytes for held in worker.held.values() if held.blocks is not None]
    return [*(sum(tensor.nbytes for tensor in of) / count for of in tensors), sum(blocks) / count]


def _blocks_a_parameter(model: ModelConfig) -> float:
    """A byte for each number of the layers that compute in FP8, and the scale of a block for its 128 x 128."""
    with torch.device("meta"):
        whole = Transformer(model)
    layers = [whole.get_submodule(name) for name, recipe in recipes(whole).items() if recipe is not None]
    numbers = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    return numbers * (1 + 4 / 128**2) / sum(parameter.numel() for parameter in whole.parameters())


def _worker(config: Config, precision: str) -> Worker:
    job = Job(
        model=config.model,
        layout=Layout(),
        schedule="dualpipe",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        seed=config.train.seed,
        sequence_length=TOKENS,
        global_batch_size=2,
        micro_batch_size=1,
        optimizer=replace(config.optimizer, moments="bf16"),
        fp8="emulated" if precision == "fp8" else None,
    )
    return Worker(job, rank=0)


def kept_bytes(model: ModelConfig) -> list[dict[str, Any]]:
    """Bytes that autograd keeps for the backward, for each token, and for each row that an expert gets."""
    hidden, value = model.hidden_size, model.num_attention_heads * model.v_head_dim
    width, narrow = model.intermediate_size, model.moe_intermediate_size
    cases: list[tuple[str, Callable[[], nn.Module], Recipe | None, int, float, float]] = [
        ("a projection", partial(Linear, hidden, 8), PLAIN, hidden, 2 * hidden, _stored(hidden)),
        ("o, after attention", partial(Linear, value, 8), AFTER_ATTENTION, value, 2 * value, _stored(value, 1.5)),
        # BF16 keeps the inputs of SwiGLU and its output, FP8 the inputs alone.
        (
            "dense MLP",
            partial(MLP, hidden, width),
            None,
            hidden,
            2 * (hidden + 3 * width),
            _stored(hidden) + _stored(2 * width),
        ),
        # And the gate value of each row.
        (
            "routed experts, a row",
            partial(Experts, model, range(2)),
            None,
            hidden,
            2 * (hidden + 3 * narrow) + 4,
            _stored(hidden) + _stored(2 * narrow) + 4,
        ),
    ]
    rows = []
    for name, make, recipe, inputs, bf16, fp8 in cases:
        measured = {}
        for precision in PRECISIONS:
            module = make().to(torch.bfloat16)
            own(module, WeightGradients({}))
            if precision == "fp8" and isinstance(module, Linear):
                assert recipe is not None
                module.products = Fp8Products(Emulated(), recipe)
            elif precision == "fp8":
                set_precision(module, Emulated())
            measured[precision] = _kept_a_token(module, inputs)
        rows.append({"layer": name, **measured, "predicted": {"bf16": bf16, "fp8": fp8}})
    return rows


def _stored(width: int, each: float = 1.0) -> float:
    """Bytes of a row in 1 x 128 tiles, scales included."""
    return width * each + 4 * -(-width // 128)


def _kept_a_token(module: nn.Module, inputs: int) -> float:
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(TOKENS, inputs, requires_grad=True, dtype=torch.bfloat16)
    ends = torch.tensor([TOKENS // 2, TOKENS], dtype=torch.int32)
    rest = (torch.rand(TOKENS, requires_grad=True), ends) if isinstance(module, Experts) else ()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = module(x, *rest)
    del kept
    for tensor in (*module.parameters(), ends):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values()) / TOKENS


def print_result(console: Console, result: dict[str, Any]) -> None:
    for key, title, column in (
        ("held", "held for training, bytes a parameter", "held"),
        ("kept", "kept for backward, bytes a token", "layer"),
    ):
        table = Table(title=title)
        for number, name in enumerate((column, "BF16", "predicted", "FP8", "predicted")):
            table.add_column(name, justify="right" if number else "left")
        rows = result[key]
        if key == "held":
            total = {p: sum(row[p] for row in rows) for p in PRECISIONS}
            predicted = {p: sum(row["predicted"][p] for row in rows) for p in PRECISIONS}
            rows = [*rows, {"held": "all", **total, "predicted": predicted}]
        for row in rows:
            figures = (value for p in PRECISIONS for value in (row[p], row["predicted"][p]))
            table.add_row(row[column], *(f"{figure:,.4g}" for figure in figures))
        console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp8_storage", description=(__doc__ or "").split("\n\n")[0]
    )
    model = "whose model is measured; it must fit this machine"
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG, help=model)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args(arguments)
    try:
        config = load(options.config)
        check_memory(options.config, config, BYTES_A_PARAMETER)
    except (ConfigError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {"held": held_bytes(config), "kept": kept_bytes(config.model)}
    print(json.dumps(result)) if options.json else print_result(Console(width=100), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
