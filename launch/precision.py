"""``dualpipe precision CONFIG|RUN``: what FP8 would do to each linear layer of a model, on real text.

The model is built in this process with its initial weights, or with those of a run's newest checkpoint, and computes
one micro-batch, forward and backward, in BF16; each linear layer does its three products in FP8 beside that and is
compared. So every error is a layer's own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from launch.command import Parser, UsageError, reported
from launch.config import Config, load
from launch.data import open_dataset
from launch.model_folder import RUN_FILE, Run, fill, open_run
from launch.run_folder import tokenizer_of
from model.fp8.gemm import BACKENDS, Choice, PrecisionError, choose
from model.fp8.probe import KINDS, Probe, probe
from model.size import size
from model.transformer import Transformer, initialise

HEADINGS = ("x", "W", "gy", "gy 128x128", "Fprop", "Dgrad", "Wgrad")
BYTES_A_PARAMETER = 12
"""Of a probed model: a BF16 weight and its gradient, and at worst FP32 copies of one layer's operands for each."""

_EPILOG = """\
x, W and gy are the errors of input, weight and output gradient as they enter the products, and "gy 128x128" that of
the gradient if it were scaled like a weight. "lost" is the share of the gradient that becomes zero, and that with
128x128 scales. An error is the norm of the difference over the norm of the result without FP8.

examples:
  dualpipe precision configs/tiny-cpu.yaml train.sequence_length=512
  dualpipe precision runs/tiny-cpu"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line about what was given."""

    def command() -> None:
        arguments = _parser().parse_intermixed_args(argv)
        config, run = _opened(Path(arguments.config), arguments.overrides)
        key, name = "precision.backend", config.precision.backend
        if arguments.backend is not None:
            key, name = "--backend", arguments.backend
        try:
            choice = choose(name, torch.device("cpu"))
        except PrecisionError as error:
            raise UsageError(f"{key}={name}: {error}") from None
        probes = measure(config, choice, run)
        print(json.dumps(_as_json(probes, choice, run)) if arguments.json else _as_text(probes, choice, config, run))

    return reported(command)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dualpipe precision",
        description="Print what FP8 would do to every linear layer of a model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG|RUN", help="a YAML file, as train takes it, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", default=[])
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help=f"how FP8 products are made: auto, {', '.join(BACKENDS)} (default: precision.backend)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _opened(place: Path, overrides: Sequence[str]) -> tuple[Config, Run | None]:
    """What is asked for, and the run if ``place`` is a folder. Raises one of the users' errors."""
    if not place.is_dir():
        config = load(place, overrides)
        check_memory(place, config, BYTES_A_PARAMETER)
        return config, None
    run = open_run(place)
    check_memory(place, run.config, BYTES_A_PARAMETER)
    config = load(place / RUN_FILE, overrides)
    if config.model != run.config.model:
        raise UsageError(f"{place} is a run, whose weights are those of its own model: no model.* can be given with it")
    return replace(config, data=replace(config.data, tokenizer=tokenizer_of(place, config))), run


def check_memory(name: Path, config: Config, bytes_a_parameter: float) -> None:
    """Raises UsageError for a model that this process has no memory for."""
    counted, free = size(config.model), psutil.virtual_memory().available
    parameters = counted.total + counted.mtp
    if parameters * bytes_a_parameter > free:
        raise UsageError(
            f"{name}: its {parameters:,} parameters need about {parameters * bytes_a_parameter / 1e9:.0f} GB in "
            f"this process, which has {free / 1e9:.0f} GB: fewer model.num_hidden_layers and model.n_routed_experts fit"
        )


def measure(config: Config, choice: Choice, run: Run | None) -> dict[str, Probe]:
    """The probes of every FP8 layer, after one micro-batch of the training data."""
    rows = open_dataset(config).visits(0, config.train.micro_batch_size)
    tokens_BS = torch.from_numpy(rows)
    model = Transformer(config.model)
    if run is None:
        initialise(model, config.train.seed)
    else:
        fill(model, run.weights.read)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    probes = probe(model, choice.gemm)
    loss = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
    balance = config.model.balance_loss_alpha * loss.balance / len(rows)
    cross_entropy = loss.cross_entropy + config.model.mtp_loss_weight * loss.mtp
    (cross_entropy / tokens_BS[:, 1:].numel() + balance).backward()
    return probes


def _as_json(probes: dict[str, Probe], choice: Choice, run: Run | None) -> dict[str, object]:
    layers = [
        {
            "layer": name,
            "errors": p.errors,
            "gradient_lost": p.lost and dict(zip(("row", "block"), p.lost, strict=True)),
        }
        for name, p in probes.items()
    ]
    weights = "initial" if run is None else str(run.weights.path)
    return {"backend": choice.gemm.name, "weights": weights, "layers": layers}


def _as_text(probes: dict[str, Probe], choice: Choice, config: Config, run: Run | None) -> str:
    tokens = config.train.micro_batch_size * config.train.sequence_length
    weights = "initial weights" if run is None else f"weights of {run.weights.path.name}"
    table = Table(
        title=f"relative error by layer, {tokens} tokens, {weights}",
        box=None,
        pad_edge=False,
        title_justify="left",
    )
    table.add_column("layer")
    for heading in (*HEADINGS, "lost", "lost 128x128"):
        table.add_column(heading, justify="right")
    for name, p in probes.items():
        lost = ("-", "-") if p.lost is None else tuple(f"{share:.1e}" for share in p.lost)
        errors = (f"{p.errors[kind]:.4f}" if kind in p.errors else "-" for kind in KINDS)
        table.add_row(name, *errors, *lost)
    console = Console(width=130)
    with console.capture() as captured:
        console.print(table)
    return f"{captured.get().rstrip()}\n\n{choice}"


if __name__ == "__main__":
    sys.exit(main())
