"""What FP8 costs and saves here: quantisation, linear layers, a training step on a CPU.

    python -m benchmarks.fp8 [--backend auto] [--rounds 7] [--json]

On a GPU the linear layers have DeepSeek-V3's widths and 4096 tokens, against BF16 layers of the same widths; on a CPU
they have those of ``configs/tiny-cpu.yaml``, and a training step of that model in one process is compared too, on one
thread. Contestants take turns; every figure is a median.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.measure import median, take_turns
from launch.config import Config, load
from launch.rank import keep_memory
from model.fp8.assign import PLAIN
from model.fp8.gemm import Choice, PrecisionError, choose
from model.fp8.linear import Fp8Products
from model.fp8.quantise import Scale, Tile, quantise
from model.linear import Linear, WeightGradients, own
from parallel.mesh import Layout
from parallel.worker import Job, Worker

CONFIG = Path(__file__).parents[1] / "configs" / "tiny-cpu.yaml"
SIZE = 4096
WIDTHS = {
    "cpu": {"attn.q_a": (256, 128), "attn.o": (128, 256), "mlp.gate_up": (256, 1536), "mlp.down": (768, 256)},
    "cuda": {
        "attn.q_a": (7168, 1536),
        "attn.q_b": (1536, 24576),
        "attn.kv_b": (512, 32768),
        "attn.o": (16384, 7168),
        "mlp.gate_up": (7168, 36864),
        "mlp.down": (18432, 7168),
        "expert.gate_up": (7168, 4096),
        "expert.down": (2048, 7168),
    },
}
"""(inputs, outputs) of linear layers."""
TOKENS = {"cpu": 512, "cuda": 4096}
EXPERTS = {
    "cpu": (8, {"expert.gate_up": (256, 256), "expert.down": (128, 256)}),
    "cuda": (8, {"expert.gate_up": (7168, 4096), "expert.down": (2048, 7168)}),
}
"""How many, and (inputs, outputs) of theirs; a token goes to four of them."""
CPU = "cpu, one thread, CPU time"
DEEPGEMM_TFLOPS = 1550
"""The most that DeepGEMM publishes for its block-scaled products on an H800 (its README, 18 April 2025)."""


@dataclass(frozen=True)
class Bench:
    device: torch.device
    choice: Choice
    rounds: int

    def times(self, contestants: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median milliseconds of each: CPU time on a CPU, for neighbours distort it less, and by the clock on a GPU."""
        if self.device.type == "cpu":
            turns = take_turns(contestants, self.rounds + 1)
            return {name: 1e3 * median(of[1:]).cpu_s for name, of in turns.items()}

        def finished(step: Callable[[], object]) -> Callable[[], object]:
            def whole() -> None:
                step()
                torch.cuda.synchronize()

            return whole

        turns = take_turns({name: finished(step) for name, step in contestants.items()}, self.rounds + 3)
        return {name: 1e3 * median(of[3:]).wall_s for name, of in turns.items()}


def quantisation(bench: Bench) -> list[dict[str, Any]]:
    x = torch.randn(SIZE, SIZE, device=bench.device)
    inputs = {"fp32": x, "bf16": x.bfloat16()}
    cases = {
        f"{tile.value[0]}x{tile.value[1]} {name}, {scale.value} scales": (value, tile, scale)
        for tile in Tile
        for scale in Scale
        for name, value in inputs.items()
    }
    times = bench.times({name: partial(quantise, *case) for name, case in cases.items()})
    return [{"case": name, "ms": ms} for name, ms in times.items()]


def linear_layers(bench: Bench) -> list[dict[str, Any]]:
    """Forward and backward with weight gradients, quantisation included, and Fprop alone on operands that are ready."""
    tokens, rows = TOKENS[bench.device.type], []
    for name, (inputs, outputs) in WIDTHS[bench.device.type].items():
        x = torch.randn(tokens, inputs, device=bench.device).bfloat16()
        gy = torch.randn(tokens, outputs, device=bench.device).bfloat16()
        sides: dict[str, Callable[[], object]] = {}
        for precision in ("bf16", "fp8"):
            layer = Linear(inputs, outputs).to(bench.device, torch.bfloat16)
            nn.init.normal_(layer.weight)
            if precision == "fp8":
                layer.products = Fp8Products(bench.choice.gemm, PLAIN)
            sides[precision] = forward_backward(layer, x, gy)
        w = layer.weight.detach()
        qx, qw = quantise(x, Tile.ROW), quantise(w, Tile.BLOCK)
        sides["bf16 gemm"] = partial(F.linear, x.detach(), w)
        sides["fp8 gemm"] = partial(bench.choice.gemm.fprop, qx, qw, None, torch.bfloat16)
        times = bench.times(sides)
        flops = 2 * tokens * inputs * outputs
        rows.append(
            {
                "layer": name,
                "shape": [tokens, inputs, outputs],
                "ms": times,
                "bf16_over_fp8": times["bf16"] / times["fp8"],
                "gemm_bf16_over_fp8": times["bf16 gemm"] / times["fp8 gemm"],
                "fp8_gemm_tflops": flops / times["fp8 gemm"] / 1e9,
            }
        )
    return rows


def expert_products(bench: Bench) -> list[dict[str, Any]]:
    """Fprop of experts with unequal numbers of rows, on operands that are ready: BF16 one expert after another and as
    torch's grouped product, and FP8."""
    (experts, widths), rows = EXPERTS[bench.device.type], TOKENS[bench.device.type] * 4
    shares = torch.arange(1, experts + 1)
    ends = (rows * shares.cumsum(0) // shares.sum()).to(bench.device, torch.int32)
    bounds, found = list(pairwise([0, *ends.tolist()])), []
    for name, (inputs, outputs) in widths.items():
        x = torch.randn(rows, inputs, device=bench.device).bfloat16()
        w = torch.randn(experts, outputs, inputs, device=bench.device).bfloat16()
        qx, qw = quantise(x, Tile.ROW, Scale.POWER_OF_TWO), quantise(w, Tile.BLOCK)
        times = bench.times(
            {
                "bf16 loop": partial(_one_by_one, x, w, bounds),
                "bf16 grouped": partial(F.grouped_mm, x, w.transpose(1, 2), offs=ends),
                "fp8": partial(bench.choice.gemm.fprop, qx, qw, ends, torch.bfloat16),
            }
        )
        tflops = 2 * rows * inputs * outputs / times["fp8"] / 1e9
        found.append({"layer": name, "shape": [experts, rows, inputs, outputs], "ms": times, "fp8_tflops": tflops})
    return found


def _one_by_one(x: Tensor, w: Tensor, bounds: list[tuple[int, int]]) -> list[Tensor]:
    return [F.linear(x[start:stop], of) for (start, stop), of in zip(bounds, w, strict=True)]


def forward_backward(layer: Linear, x: Tensor, gy: Tensor) -> Callable[[], object]:
    owner = WeightGradients({layer.weight: torch.zeros(layer.weight.shape, device=x.device)})
    own(layer, owner)
    leaf = x.requires_grad_()

    def step() -> None:
        torch.autograd.grad(layer(leaf), leaf, gy)
        owner.apply(owner.take())

    return step


def training_step(bench: Bench, config: Config) -> dict[str, Any]:
    """A step of the model in one process, four micro-batches."""
    train = config.train
    batch = 4 * train.micro_batch_size
    generator = torch.Generator().manual_seed(train.seed)
    tokens = torch.randint(0, config.model.vocab_size, (batch, train.sequence_length + 1), generator=generator)
    job = Job(
        model=config.model,
        layout=Layout(),
        schedule="dualpipe",
        dtype=torch.bfloat16,
        device=bench.device,
        seed=train.seed,
        sequence_length=train.sequence_length,
        global_batch_size=batch,
        micro_batch_size=train.micro_batch_size,
        optimizer=config.optimizer,
    )
    steps: dict[str, Callable[[], object]] = {}
    for precision, backend in (("bf16", None), ("fp8", bench.choice.gemm.name)):
        worker = Worker(replace(job, fp8=backend), rank=0)
        steps[precision] = partial(worker.train_step, tokens, config.optimizer.learning_rate)
    times = bench.times(steps)
    return {"tokens": len(tokens) * train.sequence_length, "ms": times, "fp8_over_bf16": times["fp8"] / times["bf16"]}


def measure(bench: Bench, config: Config) -> dict[str, Any]:
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else CPU,
        "backend": str(bench.choice),
        "quantise": quantisation(bench),
        "linear": linear_layers(bench),
        "experts": expert_products(bench),
    }
    if bench.device.type == "cpu":
        result["step"] = training_step(bench, config)
    return result


def print_result(console: Console, result: dict[str, Any]) -> None:
    console.print(f"{result['device']}; {result['backend']}")
    table = _table(f"quantise {SIZE} x {SIZE}", "case", "ms")
    for row in result["quantise"]:
        table.add_row(row["case"], f"{row['ms']:.1f}")
    console.print(table)
    columns = ("BF16 ms", "FP8 ms", "BF16 / FP8", "BF16 GEMM ms", "FP8 GEMM ms", "BF16 / FP8 GEMM", "FP8 GEMM TFLOPS")
    table = _table("linear layer, forward and backward, quantisation included", "layer", "T, D, F", *columns)
    for row in result["linear"]:
        ms = row["ms"]
        figures = (
            *(f"{ms[name]:.2f}" for name in ("bf16", "fp8")),
            f"{row['bf16_over_fp8']:.2f}x",
            *(f"{ms[name]:.2f}" for name in ("bf16 gemm", "fp8 gemm")),
            f"{row['gemm_bf16_over_fp8']:.2f}x",
            f"{row['fp8_gemm_tflops']:.2f}",
        )
        table.add_row(row["layer"], ", ".join(map(str, row["shape"])), *figures)
    console.print(table)
    console.print(_experts_table(result["experts"]))
    if result["device"] != CPU:
        console.print(f"DeepGEMM publishes up to {DEEPGEMM_TFLOPS} TFLOPS on an H800 for such products")
    if "step" in result:
        step = result["step"]
        bf16, fp8 = (f"{step['ms'][name]:.0f} ms" for name in ("bf16", "fp8"))
        console.print(
            f"training step, {step['tokens']} tokens: BF16 {bf16}, FP8 {fp8}; FP8 / BF16 {step['fp8_over_bf16']:.2f}x"
        )


def _experts_table(rows: list[dict[str, Any]]) -> Table:
    columns = ("BF16 loop ms", "BF16 grouped ms", "FP8 ms", "loop / FP8", "grouped / FP8", "FP8 TFLOPS")
    table = _table("experts of unequal size, Fprop alone", "layer", "E, R, D, F", *columns)
    for row in rows:
        ms = row["ms"]
        figures = (
            *(f"{ms[name]:.2f}" for name in ("bf16 loop", "bf16 grouped", "fp8")),
            *(f"{ms[name] / ms['fp8']:.2f}x" for name in ("bf16 loop", "bf16 grouped")),
            f"{row['fp8_tflops']:.2f}",
        )
        table.add_row(row["layer"], ", ".join(map(str, row["shape"])), *figures)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--backend", default="auto", help="how FP8 products are made; see docs/fp8.md")
    parser.add_argument("--rounds", type=int, default=7, help="measured turns of each contestant")
    parser.add_argument("--json", action="store_true", help="print one JSON object; the tables go to stderr")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds} must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        choice = choose(options.backend, device)
    except PrecisionError as error:
        print(f"error: --backend={options.backend}: {error}", file=sys.stderr)
        return 2
    if device.type == "cpu":
        torch.set_num_threads(1)
        keep_memory()
    result = measure(Bench(device, choice, options.rounds), load(CONFIG))
    print_result(Console(stderr=options.json, width=130), result)
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
