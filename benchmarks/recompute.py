"""What each ``model.recompute`` keeps, and what it costs: bytes a token in a layer, and the time of a step on a CPU.

    python -m benchmarks.recompute [CONFIG] [key=value ...] [--rounds 7] [--json]

The model of CONFIG (configs/tiny-cpu.yaml) trains in one process, on one thread, in each precision. Policies take
turns; a time is the median of a step's CPU time, a ratio one of medians. Bytes are those of the tensors that are alive
after a forward of a layer, beside what ``dualpipe plan`` predicts.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Alive, median, take_turns
from dualpipe.program import Work
from launch.config import Config, load
from launch.plan import workload_of
from launch.rank import keep_memory
from model.config import ModelConfig, Recompute, Recomputed
from model.exchange import LocalExchange
from model.fp8.assign import set_precision
from model.fp8.gemm import choose
from model.linear import WeightGradients, own
from model.transformer import Transformer, initialise
from parallel.estimate.memory import layer_activation_bytes
from parallel.estimate.workload import spell
from parallel.mesh import Layout
from parallel.stage import ModelStage, StepScale
from parallel.worker import Job, Worker

CONFIG = Path(__file__).parents[1] / "configs" / "tiny-cpu.yaml"
Precision = Literal["fp32", "bf16", "fp8"]
POLICIES: tuple[Recompute, ...] = ((), *((name,) for name in get_args(Recomputed)), get_args(Recomputed), "full")
CPU = torch.device("cpu")


def kept_bytes(config: ModelConfig, layer: int, precision: Precision, length: int, sequences: int) -> int:
    """Bytes that a forward of one layer leaves alive on a CPU, its input counted, and not its output, which goes on."""
    config = replace(config, num_hidden_layers=layer + 2)  # with a layer behind it, and so without the head
    model = Transformer(config, [layer], range(config.n_routed_experts))
    initialise(model, seed=1)
    model.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    gradients = WeightGradients({p: torch.zeros(p.shape) for p in model.parameters()})
    own(model, gradients)
    if precision == "fp8":
        set_precision(model, choose("emulated", CPU).gemm)
    stage = ModelStage(model, gradients, LocalExchange(config.n_routed_experts), CPU)
    stage.begin({}, StepScale(length * sequences, sequences), training=True)
    x_BSD = torch.randn(sequences, length, config.hidden_size).to(next(model.parameters()).dtype)
    turns = model.rotations(length, CPU)
    with Alive([*model.parameters(), *model.buffers(), turns, x_BSD]) as alive:
        y_BSD = stage.forward(Work(1, 0), x_BSD)
        assert y_BSD is not None
        return alive.bytes() + x_BSD.nbytes - y_BSD.nbytes


def kept(config: Config, precision: Precision) -> list[dict[str, Any]]:
    """Bytes a token of a dense and of an MoE layer, and the share that is saved, by policy."""
    train, model = config.train, config.model
    layers = {"moe": model.first_k_dense_replace, **({"dense": 0} if model.first_k_dense_replace else {})}
    tokens, rows = train.sequence_length * train.micro_batch_size, []
    workload = replace(workload_of(config, {"precision": precision}), layout=Layout())
    first: dict[str, float] = {}
    for policy in POLICIES:
        row: dict[str, Any] = {"policy": spell(policy)}
        for name, layer in layers.items():
            each = replace(model, recompute=policy, num_nextn_predict_layers=0)
            size = kept_bytes(each, layer, precision, train.sequence_length, train.micro_batch_size) / tokens
            predicted = layer_activation_bytes(workload.recomputing(policy), name == "moe") / tokens
            saved = 1 - size / first.setdefault(name, size)
            row[name] = {"bytes_a_token": size, "predicted": predicted, "saved": saved}
        rows.append(row)
    return rows


def steps(config: Config, precision: Precision, rounds: int) -> dict[str, float]:
    """Seconds of CPU time, by policy, of a step of four micro-batches."""
    train = config.train
    batch = 4 * train.micro_batch_size
    generator = torch.Generator().manual_seed(train.seed)
    tokens = torch.randint(0, config.model.vocab_size, (batch, train.sequence_length + 1), generator=generator)
    contestants: dict[str, Callable[[], object]] = {}
    for policy in POLICIES:
        job = Job(
            model=replace(config.model, recompute=policy),
            layout=Layout(),
            schedule="dualpipe",
            dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
            device=CPU,
            seed=train.seed,
            sequence_length=train.sequence_length,
            global_batch_size=batch,
            micro_batch_size=train.micro_batch_size,
            optimizer=config.optimizer,
            fp8="emulated" if precision == "fp8" else None,
        )
        contestants[spell(policy)] = partial(Worker(job, rank=0).train_step, tokens, config.optimizer.learning_rate)
    turns = take_turns(contestants, rounds + 1)
    return {name: median(samples[1:]).cpu_s for name, samples in turns.items()}


def measure(config: Config, rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for precision in get_args(Precision):
        rows, times = kept(config, precision), steps(config, precision, rounds)
        for row in rows:
            row["cpu_s"] = times[row["policy"]]
            row["ratio"] = times[row["policy"]] / times["none"]
        result[precision] = rows
    return result


def print_result(console: Console, result: dict[str, Any]) -> None:
    for precision, rows in result.items():
        layers = [name for name in ("moe", "dense") if name in rows[0]]
        table = Table(title=f"{precision}: kept for backward, bytes a token in a layer; CPU time of a step")
        table.add_column("policy")
        for name in layers:
            for column in (name, "predicted", "saved"):
                table.add_column(column, justify="right")
        for column in ("step s", "ratio"):
            table.add_column(column, justify="right")
        for row in rows:
            cells = [row["policy"]]
            for name in layers:
                of = row[name]
                cells += [f"{of['bytes_a_token']:,.0f}", f"{of['predicted']:,.0f}", f"{of['saved']:.0%}"]
            table.add_row(*cells, f"{row['cpu_s']:.3f}", f"{row['ratio']:.3f}")
        console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recompute", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("config", nargs="?", default=str(CONFIG), metavar="CONFIG", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, as model.num_hidden_layers=2")
    parser.add_argument("--rounds", type=int, default=7, help="measured turns of each policy")
    parser.add_argument("--json", action="store_true", help="print one JSON object; the tables go to stderr")
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(1)
    keep_memory()
    result = measure(load(options.config, options.overrides), options.rounds)
    print_result(Console(stderr=options.json, width=130), result)
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
