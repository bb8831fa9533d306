"""Dispatch in one hop against two, BF16 against FP8, on emulated nodes with links capped in the H800's ratio 160 : 50.

    python -m benchmarks.dispatch [--nodes 2,4] [--ranks-per-node 4] [--tokens 96] [--rounds 3] [--chunks 4] [--json]

Tokens of DeepSeek-V3's size, 7168 channels, go to 8 of 256 experts on at most 4 nodes, chosen at random, and back,
forward (dispatch, combine) and backward (their gradients); no expert computes. *Flat* is one all-to-all over all ranks:
a row crosses once to each rank. *Hierarchical* crosses once to each node, and is passed on inside, in chunks whose hops
overlap. With FP8 the dispatches are FP8 with their scales, and the combines BF16. All run in the same processes and
take turns; a time is the median, over rounds, of the slowest rank's. Nodes are network namespaces (``dualpipe hosts``,
which needs root and iproute2).

Bytes are counted from the layout of the dispatch, gate values that travel with the rows included. The least between
nodes (MB out) is one bare row for each token and node that is not its own, once each way. *Links* is the time that the
busiest node's bytes take at the caps, both fabrics busy at once; where the seconds are far above it, or nearly as many
cores are busy as there are, something else than the links is measured. The first table is counted without processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.dispatch_ranks import FP8_ROW_BYTES, MODEL, MOST_NODES, Setting, routing
from launch.hosts import missing
from launch.hosts.links import Rate

ROOT = Path(__file__).parents[1]
INTER_NODE, INTRA_NODE = "100mbit", "320mbit"
"""So low that two cores of a laptop can keep the links of 16 ranks busy."""
KINDS = [f"{kind} {payload}" for kind in ("flat", "hierarchical") for payload in ("bf16", "fp8")]
V3_NODES, V3_RANKS_PER_NODE, SAMPLE = 8, 8, 100_000
ROW_BYTES = MODEL.hidden_size * 2


def copies(seed: int = 0) -> dict[str, float]:
    """Copies of a token's row that leave its node, on average over 8 nodes of 8 ranks with 256 experts."""
    indices_TK = routing(SAMPLE, V3_NODES, torch.Generator().manual_seed(seed))
    home_T = torch.arange(SAMPLE) % V3_NODES
    ranks = V3_NODES * V3_RANKS_PER_NODE
    rank_TK = indices_TK // (MODEL.n_routed_experts // ranks)
    remote_TK = rank_TK // V3_RANKS_PER_NODE != home_T[:, None]
    of_rank_TR = torch.zeros(SAMPLE, ranks, dtype=torch.bool).scatter_(1, rank_TK, True)
    of_node_TN = of_rank_TR.unflatten(1, (V3_NODES, -1)).any(-1)
    elsewhere_TN = torch.arange(V3_NODES) != home_T[:, None]
    remote_rank_TR = of_rank_TR.unflatten(1, (V3_NODES, -1)) & elsewhere_TN[:, :, None]
    per_token = {
        "once an expert": remote_TK.sum(),
        "once a rank (flat)": remote_rank_TR.sum(),
        "once a node (hierarchical)": (of_node_TN & elsewhere_TN).sum(),
    }
    return {name: float(count) / SAMPLE for name, count in per_token.items()}


def run(setting: Setting) -> dict[str, Any]:
    """One cluster of so many nodes. Raises RuntimeError with what it said when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        hosts = ["--nodes", str(setting.nodes), "--ranks-per-node", str(setting.ranks_per_node)]
        caps = ["--inter-node", INTER_NODE, "--intra-node", INTRA_NODE]
        rank = ["torchrun", "-m", "benchmarks.dispatch_ranks", json.dumps(asdict(setting)), str(result)]
        words = [sys.executable, "-m", "launch.cli", "hosts", *hosts, *caps, "--", *rank]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{setting.nodes} nodes: status {done.returncode}\n{done.stdout}")
        found: dict[str, Any] = json.loads(result.read_text())
    for direction in ("forward", "backward"):
        for name in KINDS:
            found[name][direction]["links_alone_s"] = links_alone(found[name][direction]["passes"])
            found[name][direction]["least_between_bytes"] = found["copies_between"] * least_bytes(name)
        seconds = {name: found[name][direction]["seconds"] for name in KINDS}
        found[f"{direction}_speedup"] = seconds["flat bf16"] / seconds["hierarchical fp8"]
    return {**asdict(setting), "inter_node": INTER_NODE, "intra_node": INTRA_NODE, **found}


def least_bytes(name: str) -> int:
    """Of a token on its way to another node and back."""
    return (FP8_ROW_BYTES if name.endswith("fp8") else ROW_BYTES) + ROW_BYTES


def links_alone(passes: list[dict[str, int]]) -> float:
    """Seconds: a pass takes as long as the slower of the two fabrics."""
    between, inside = (Rate.parse(text).bits_per_s / 8 for text in (INTER_NODE, INTRA_NODE))
    return sum(max(p["busiest_between_bytes"] / between, p["busiest_inside_bytes"] / inside) for p in passes)


def print_copies(console: Console, found: dict[str, float]) -> None:
    table = Table(title=f"8 nodes x 8 ranks, 256 experts, 8 a token on at most {MOST_NODES} nodes")
    for column in ("a row crosses", "copies to other nodes", "bytes a token, BF16", "FP8"):
        table.add_column(column, justify="left" if column.startswith("a row") else "right")
    for name, count in found.items():
        table.add_row(name, f"{count:.2f}", f"{count * ROW_BYTES:,.0f}", f"{count * FP8_ROW_BYTES:,.0f}")
    console.print(table)


def print_result(console: Console, result: dict[str, Any]) -> None:
    ranks = result["nodes"] * result["ranks_per_node"]
    title = f"{result['nodes']} nodes, {ranks} ranks, {result['tokens']} tokens a rank, {INTER_NODE} : {INTRA_NODE}"
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in ("seconds", "links", "MB out", "to least", "MB in", "speed"):
        table.add_column(column, justify="right")
    for direction in ("forward", "backward"):
        for name in KINDS:
            of = result[name][direction]
            between, inside = (sum(p[key] for p in of["passes"]) for key in ("between_bytes", "inside_bytes"))
            table.add_row(
                f"{direction} {name}",
                f"{of['seconds']:.3f}",
                f"{of['links_alone_s']:.3f}",
                f"{between / 1e6:.2f}",
                f"{between / of['least_between_bytes']:.3f}x",
                f"{inside / 1e6:.2f}",
                f"{result['flat bf16'][direction]['seconds'] / of['seconds']:.2f}x",
            )
    console.print(table)
    for name in KINDS:
        wire, busy = result[name]["wire_bytes"], result[name]["busy_cores"]
        megabytes = f"{wire['eth0'] / 1e6:.2f} MB between nodes, {wire['lo'] / 1e6:.2f} MB inside"
        cores = f"{busy:.2f} of {os.cpu_count()} cores busy"
        console.print(f"{name} both ways, as the interfaces counted: {megabytes}; {cores}", soft_wrap=True)
    load = os.getloadavg()[0]
    console.print(
        f"flat BF16 / hierarchical FP8: {result['forward_speedup']:.2f}x forward, "
        f"{result['backward_speedup']:.2f}x backward (load average {load:.1f})"
    )


def sizes(text: str) -> list[int]:
    """``"2,4"``, each at least 2; argparse names the option that raises."""
    found = [int(word) for word in text.split(",")]
    if min(found) < 2:
        raise argparse.ArgumentTypeError("a cluster has at least 2 nodes")
    return found


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--nodes", type=sizes, default=[2, 4], metavar="2,4", help="sizes of the clusters, one after the other"
    )
    parser.add_argument("--ranks-per-node", type=positive, default=4)
    parser.add_argument("--tokens", type=positive, default=96, help="of each rank")
    parser.add_argument("--rounds", type=positive, default=3, help="measured turns of each side")
    parser.add_argument("--chunks", type=positive, default=4, help="of a hierarchical dispatch")
    parser.add_argument("--json", action="store_true", help="print one JSON object; the tables go to stderr")
    options = parser.parse_args(arguments)
    console = Console(stderr=options.json)
    lacking = missing()
    if lacking:
        print(f"error: {lacking}", file=sys.stderr)
        return 2
    for count in options.nodes:
        if MODEL.n_routed_experts % (count * options.ranks_per_node):
            ranks = f"--ranks-per-node={options.ranks_per_node} x {count} nodes"
            print(f"error: {ranks} must divide {MODEL.n_routed_experts} experts", file=sys.stderr)
            return 2
    counted = copies()
    print_copies(console, counted)
    results = []
    for count in options.nodes:
        results.append(run(Setting(count, options.ranks_per_node, options.tokens, options.rounds, options.chunks)))
        print_result(console, results[-1])
    if options.json:
        print(json.dumps({"copies": counted, "clusters": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
