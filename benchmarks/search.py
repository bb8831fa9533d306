"""What a search gains over the named schedules, for several costs, memory limits and sizes.

    python -m benchmarks.search [--budget 5000] [--seed 0] [--json]

Everything is simulated, so a budget in orders gives the same table on every machine. A limit is in activations of one
micro-batch in 1/P of the model, of which 1F1B holds P. The best named schedule is the fastest that fits in the limit;
"-" stands where none does. The bound is a time that no order of the placements searched can beat. Twins hold the
parameters twice. Rows where nothing is gained are shown like the others.
"""

import argparse
import json
import sys
from collections.abc import Callable
from math import inf
from typing import Any

from dualpipe.cost import Costs
from dualpipe.search import Budget, search

SIZES = ((4, 8), (4, 16), (8, 16), (8, 32))  # ranks, micro-batches
LIMITS: dict[str, Callable[[int], float]] = {
    "P/2": lambda ranks: ranks / 2,
    "P": lambda ranks: ranks,
    "P+1": lambda ranks: ranks + 1,
    "2P": lambda ranks: 2 * ranks,
    "any": lambda ranks: inf,
}
SETTINGS = (
    ("F=1,I=1,W=1,FB=3", "any"),
    ("F=1,I=1,W=1,FB=2.4", "P+1"),
    ("F=1,I=1,W=1,FB=2.4", "any"),
    ("F=1,I=1.2,W=0.8", "P"),
    ("F=1,I=1,W=1,F@-1=1.5,I@-1=1.5,W@-1=1.5", "P"),
    ("F=1,I=1,W=1,F@-1=1.5,I@-1=1.5,W@-1=1.5", "P+1"),
    ("F=1,I=1,W=1,p2p=0.2", "P"),
    ("F=1,I=1,W=1,p2p=0.2", "2P"),
    ("F=1,I=1,W=1", "P/2"),
    ("F=1,I=1.2,W=0.8,p2p=0.1", "P/2"),
)


def measure(cost: str, limit: str, ranks: int, microbatches: int, budget: Budget, seed: int) -> dict[str, Any]:
    found = search(ranks, microbatches, Costs.parse(cost), LIMITS[limit](ranks), budget, seed)
    best = found.best_named
    return {
        "cost": cost,
        "memory_limit": limit,
        "ranks": ranks,
        "microbatches": microbatches,
        "best_named": None if best is None else best.name,
        "best_named_makespan": None if best is None else best.makespan,
        "makespan": found.result.makespan,
        "gain": found.gain,
        "bound": found.bound,
        "placement": found.placement.name,
        "parameters": found.parameters,
        "peak": found.peak,
        "tried": found.tried,
        "seconds": found.seconds,
    }


def line(row: dict[str, Any]) -> str:
    named = "-" if row["best_named"] is None else f"{row['best_named']} {row['best_named_makespan']:g}"
    gain = "-" if row["gain"] is None else f"{row['gain']:.2%}"
    return (
        f"{row['cost']:40}  {row['memory_limit']:>5}  {row['ranks']:2}  {row['microbatches']:3}  {named:>17}  "
        f"{row['makespan']:8g}  {gain:>6}  {row['bound']:6g}  {row['placement']:>11}  {row['parameters']:>9g}x  "
        f"{row['peak']:4g}  {row['tried']:5}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="The best named schedule and the one that a search finds.")
    parser.add_argument("--budget", default="5000", help="of each search: orders, or seconds as in 10s (default 5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    budget = Budget.parse(args.budget)
    if not args.json:
        head = f"{'cost':40}  limit   P    M  {'best named':>17}  searched    gain   bound    placement  "
        print(head + "parameters  peak  tried", flush=True)
    rows = []
    for cost, limit in SETTINGS:
        for ranks, microbatches in SIZES:
            rows.append(measure(cost, limit, ranks, microbatches, budget, args.seed))
            if not args.json:
                print(line(rows[-1]), flush=True)
    if args.json:
        print(json.dumps({"budget": args.budget, "seed": args.seed, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
