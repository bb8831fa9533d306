"""How much of the communication of expert parallelism an overlapped pair hides, on emulated nodes with capped links.

    python -m benchmarks.overlap [--microbatches 8] [--layers 1] [--tokens 24] [--rounds 3] [--json]

Eight ranks on four nodes: two pipeline stages, each on two nodes of two ranks, over which the experts of every layer
are spread. Layers, exchange, runtime and buckets are those that train, messages are real and links capped in the
H800's ratio; only the computing phases of a layer wait instead of computing (``timed.py``), so that two cores do not
blur the picture. Tokens have DeepSeek-V3's size and go to 8 of 256 experts, FP8 there and BF16 back, in two hops.
What each phase of communication takes alone is measured first, and computation gets the same: the ratio is 1 : 1, and
each phase of one half of a pair takes as long as what it is to hide of the other.

The same step goes with overlapped pairs, with the halves of every pair one after the other, and as 1F1B, in turns. The
*ratio* is a pair's to its computation alone; a step is compared with its simulation for the measured durations.
Reductions and gathers run beside computation in the first and are waited for where they start in the others. Beside it
the real model: ``configs/tiny-cpu.yaml`` in the same layout, computing on the cores that there are, at caps of 400 mbit
between nodes. Needs root and iproute2.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.dispatch import ROOT, positive
from benchmarks.overlap_ranks import LAYOUT, NODES, RANKS_PER_NODE, Setting
from launch.hosts import missing
from launch.metrics import read_jsonl

INTER_NODE_MBIT, RATIO = 20, 3.2
"""So low that phases take tenths of a second, and what processes do themselves hardly counts."""
PARAMETERS = 1 << 15
REAL_MBIT, REAL_STEPS, REAL_SCHEDULES = 400, 5, ("dualpipe", "1f1b")
PUBLISHED = {"pair_ms": 129.0, "hidden": 0.963, "pair_to_computation": 129.0 / 124.3}
"""DeepSeek-V3's own training, a pair of four layers on 64 H800 (github.com/deepseek-ai/profile-data, train.json):
112 GPU-milliseconds of 114.5 of communication hide; 124.3 of the pair's 129.0 are computation."""


def on_cluster(inter_node_mbit: int, *command: str) -> None:
    """A torchrun command on the nodes. Raises RuntimeError with what the cluster said when it fails."""
    hosts = ["--nodes", str(NODES), "--ranks-per-node", str(RANKS_PER_NODE)]
    caps = ["--inter-node", f"{inter_node_mbit}mbit", "--intra-node", f"{inter_node_mbit * RATIO:g}mbit"]
    words = [sys.executable, "-m", "launch.cli", "hosts", *hosts, *caps, "--", "torchrun", *command]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}\n{done.stdout}")


def run(setting: Setting, inter_node_mbit: int) -> dict[str, Any]:
    """Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        on_cluster(inter_node_mbit, "-m", "benchmarks.overlap_ranks", json.dumps(asdict(setting)), str(result))
        found: dict[str, Any] = json.loads(result.read_text())
    return {
        **asdict(setting),
        "inter_node_mbit": inter_node_mbit,
        **found,
        "published": PUBLISHED,
        "real": {schedule: real_model(schedule) for schedule in REAL_SCHEDULES},
        "load_average": os.getloadavg()[0],
    }


def real_model(schedule: str) -> dict[str, float]:
    """``configs/tiny-cpu.yaml`` in the same layout on the same nodes: medians of a step's seconds and of what it hides
    of dispatch and combine, after the first step. Its ranks share the cores. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        layout = [f"layout.{key}={value}" for key, value in asdict(LAYOUT).items()]
        one_run = [f"train.steps={REAL_STEPS}", "train.validate_every=0", f"run.dir={folder}/run"]
        chosen = [f"schedule.name={schedule}", "dispatch.kind=hierarchical"]
        on_cluster(REAL_MBIT, "-m", "launch.train", "configs/tiny-cpu.yaml", *layout, *one_run, *chosen)
        entries = read_jsonl(Path(folder) / "run" / "metrics.jsonl")[1:]
    times = [entry["dispatch"] for entry in entries]
    hidden = [t["hidden_seconds"] / (t["hidden_seconds"] + t["exposed_seconds"]) for t in times]
    seconds = statistics.median(entry["step_seconds"] for entry in entries)
    return {"seconds": seconds, "hidden": statistics.median(hidden)}


def print_result(console: Console, result: dict[str, Any]) -> None:
    mbit = result["inter_node_mbit"]
    table = Table(title=f"A step of {result['microbatches']} micro-batches, {mbit} : {mbit * RATIO:g} mbit")
    table.add_column("", no_wrap=True)
    for column in ("s", "simul.", "off", "hidden", "pair ms", "ratio", "in pairs"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, of in result["contestants"].items():
        pair = ("", "", "")
        if "pair_s" in of:
            pair = f"{1e3 * of['pair_s']:.0f}", f"{of['pair_to_computation']:.3f}", f"{of['pair_hidden']:.1%}"
        step = f"{of['seconds']:.2f}", f"{of['simulated_s']:.2f}", f"{of['difference']:+.1%}"
        table.add_row(name, *step, f"{of['hidden']:.1%}", *pair)
    published = result["published"]
    ratio, hidden = f"{published['pair_to_computation']:.3f}", f"{published['hidden']:.1%}"
    table.add_row("published", "", "", "", "", f"{published['pair_ms']:.0f}", ratio, hidden)
    console.print(table)
    computing, flying = result["pair_computation_s"], result["pair_communication_s"]
    console.print(
        f"a pair computes for {1e3 * computing:.0f} ms and communicates for {1e3 * flying:.0f} ms; a reduction takes "
        f"{1e3 * result['reduce']:.0f} ms alone, a gather {1e3 * result['gather']:.0f} ms",
        soft_wrap=True,
    )
    for name, of in result["contestants"].items():
        exposed = (
            f"{1e3 * of['reduce_exposed_s']:.0f} ms of reductions, {1e3 * of['gather_exposed_s']:.0f} ms of gathers"
        )
        console.print(f"{name}: a rank waits for {exposed}", soft_wrap=True)
    real = ", ".join(f"{of['seconds']:.2f} s and {of['hidden']:.0%} ({name})" for name, of in result["real"].items())
    console.print(f"configs/tiny-cpu.yaml on the same nodes, a step and what it hides: {real}", soft_wrap=True)
    console.print(f"load average {result['load_average']:.1f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 after one line on stderr when it cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--microbatches", type=positive, default=8, help="of a step, even, at least 4")
    parser.add_argument("--layers", type=positive, default=1, help="of a stage")
    parser.add_argument("--tokens", type=positive, default=24, help="of each rank in a micro-batch")
    parser.add_argument("--chunks", type=positive, default=2, help="of a dispatch")
    parser.add_argument(
        "--rounds", type=positive, default=3, help="measured steps of each contestant, after one that warms up"
    )
    parser.add_argument("--inter-node-mbit", type=positive, default=INTER_NODE_MBIT, help="3.2 times it inside a node")
    parser.add_argument("--json", action="store_true", help="print one JSON object; the table goes to stderr")
    options = parser.parse_args(arguments)
    lacking = missing()
    if options.microbatches % 2 or options.microbatches < 4:
        lacking = f"--microbatches={options.microbatches} must be even and at least 4"
    if lacking:
        print(f"error: {lacking}", file=sys.stderr)
        return 2
    sizes = options.microbatches, options.layers, options.tokens, options.chunks, options.rounds
    result = run(Setting(*sizes, PARAMETERS), options.inter_node_mbit)
    print_result(Console(stderr=options.json), result)
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
