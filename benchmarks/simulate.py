"""How fast a program is played: slots per second for growing programs, with communication.

    python -m benchmarks.simulate [--schedule dualpipe] [--rounds 5] [--json]

A slot is an event of the simulation: an operation, a send, a receive, a wait, a free or a collective. Each figure is a
median of CPU seconds of this process over the rounds. A play that is linear has the same rate in every row.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.schedules import SCHEDULES, generate
from dualpipe.simulate import simulate

SIZES = ((4, 32), (8, 64), (16, 120), (32, 256), (64, 1024))  # ranks, micro-batches; (16, 120) is DeepSeek-V3's
COSTS = Costs(1.0, 1.0, 1.0, overlapped=2.5, message=0.1, link=0.05)

T = TypeVar("T")


def seconds(work: Callable[[], T], rounds: int) -> tuple[T, float]:
    """The result, and the median CPU seconds of the rounds."""
    samples = []
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        samples.append(time.process_time() - start)
    return result, statistics.median(samples)


def measure(schedule: str, ranks: int, microbatches: int, rounds: int) -> dict[str, float]:
    order, generate_s = seconds(lambda: generate(schedule, ranks, microbatches), rounds)
    program, lower_s = seconds(lambda: lower(order), rounds)
    _, simulate_s = seconds(lambda: simulate(program, COSTS), rounds)
    slots = sum(map(len, program.slots))
    return {
        "ranks": ranks,
        "microbatches": microbatches,
        "slots": slots,
        "generate_s": generate_s,
        "lower_s": lower_s,
        "simulate_s": simulate_s,
        "slots_per_second": slots / simulate_s,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Slots per second that the simulator plays, for growing programs.")
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="dualpipe")
    parser.add_argument("--rounds", type=int, default=5, help="how often each size is measured (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rows = [measure(args.schedule, *size, max(args.rounds, 1)) for size in SIZES]
    if args.json:
        print(json.dumps({"schedule": args.schedule, "rounds": args.rounds, "rows": rows}))
        return 0
    print("ranks  micro-batches    slots  generate s  lower s  simulate s  slots/s")
    for row in rows:
        print(
            f"{row['ranks']:5.0f}  {row['microbatches']:13.0f}  {row['slots']:7.0f}  {row['generate_s']:10.3f}  "
            f"{row['lower_s']:7.3f}  {row['simulate_s']:10.3f}  {row['slots_per_second']:7.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
