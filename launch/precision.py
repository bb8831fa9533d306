"""``dualpipe precision CONFIG``: what FP8 would do to each linear layer of a model, on real text.

The model is built in this process with its initial weights and computes one micro-batch, forward and backward, in BF16;
each linear layer does its three products in FP8 beside that and is compared. So every error is a layer's own.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import psutil
import torch
from rich.console import Console
from rich.table import Table

from launch.command import Parser, UsageError, reported
from launch.config import Config, load
from launch.data import open_dataset
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

example:
  dualpipe precision configs/tiny-cpu.yaml train.sequence_length=512"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line about what was given."""

    def command() -> None:
        arguments = _parser().parse_intermixed_args(argv)
        config = load(arguments.config, arguments.overrides)
        _check_memory(arguments.config, config)
        key, name = "precision.backend", config.precision.backend
        if arguments.backend is not None:
            key, name = "--backend", arguments.backend
        try:
            choice = choose(name, torch.device("cpu"))
        except PrecisionError as error:
            raise UsageError(f"{key}={name}: {error}") from None
        probes = measure(config, choice)
        print(json.dumps(_as_json(probes, choice)) if arguments.json else _as_text(probes, choice, config))

    return reported(command)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dualpipe precision",
        description="Print what FP8 would do to every linear layer of a model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, as train takes it")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", default=[])
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help=f"how FP8 products are made: auto, {', '.join(BACKENDS)} (default: precision.backend)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _check_memory(config_name: str, config: Config) -> None:
    counted, free = size(config.model), psutil.virtual_memory().available
    parameters = counted.total + counted.mtp
    if parameters * BYTES_A_PARAMETER > free:
        raise UsageError(
            f"{config_name}: its {parameters:,} parameters need about {parameters * BYTES_A_PARAMETER / 1e9:.0f} GB in "
            f"this process, which has {free / 1e9:.0f} GB: fewer model.num_hidden_layers and model.n_routed_experts fit"
        )


def measure(config: Config, choice: Choice) -> dict[str, Probe]:
    """The probes of every FP8 layer, after one micro-batch of the training data."""
    rows = open_dataset(config).visits(0, config.train.micro_batch_size)
    tokens_BS = torch.from_numpy(rows)
    model = Transformer(config.model)
    initialise(model, config.train.seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    probes = probe(model, choice.gemm)
    loss = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
    balance = config.model.balance_loss_alpha * loss.balance / len(rows)
    cross_entropy = loss.cross_entropy + config.model.mtp_loss_weight * loss.mtp
    (cross_entropy / tokens_BS[:, 1:].numel() + balance).backward()
    return probes


def _as_json(probes: dict[str, Probe], choice: Choice) -> dict[str, object]:
    layers = [
        {
            "layer": name,
            "errors": p.errors,
            "gradient_lost": p.lost and dict(zip(("row", "block"), p.lost, strict=True)),
        }
        for name, p in probes.items()
    ]
    return {"backend": choice.gemm.name, "layers": layers}


def _as_text(probes: dict[str, Probe], choice: Choice, config: Config) -> str:
    tokens = config.train.micro_batch_size * config.train.sequence_length
    table = Table(
        title=f"relative error by layer, {tokens} tokens, initial weights",
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
