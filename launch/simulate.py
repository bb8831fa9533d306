"""``dualpipe simulate``: play a schedule on paper, and print what every rank does, how long it idles, what it holds."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.program import Program, dump
from dualpipe.schedules import SCHEDULES, generate
from dualpipe.simulate import OPERATIONS, Simulation, simulate

_EXAMPLE = """\
example:
  dualpipe simulate --schedule dualpipe --ranks 8 --microbatches 20 --cost F=1,I=1,W=1,FB=3

Times are in the unit of the costs. The bubble of a rank is the time in which it computes nothing; its peak is the
number of micro-batches whose activations it holds at once."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one line on stderr when the arguments ask for what cannot be."""
    try:
        args = _parser().parse_args(argv)
        costs = Costs.parse(args.cost)
        if args.p2p is not None:
            costs = dataclasses.replace(costs, message=args.p2p)
        program = lower(generate(args.schedule, args.ranks, args.microbatches))
        if args.text:
            print(dump(program), end="")
            return 0
        result = simulate(program, costs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result.to_json()) if args.json else _table(program, result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dualpipe simulate",
        description="Simulate one training step of a pipeline schedule.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--schedule", default="dualpipe", help=f"one of {', '.join(SCHEDULES)} (default dualpipe)")
    parser.add_argument("--ranks", type=int, default=8, metavar="P", help="pipeline ranks, layout.pipeline (default 8)")
    parser.add_argument(
        "--microbatches", type=int, default=20, metavar="M", help="micro-batches a step, all directions (default 20)"
    )
    parser.add_argument(
        "--cost",
        default="F=1,I=1,W=1,FB=3",
        metavar="KEY=TIME,...",
        help="durations of F, I, W, B (if not I + W) and FB (if not F + B); default F=1,I=1,W=1,FB=3",
    )
    parser.add_argument("--p2p", type=float, metavar="TIME", help="from a send to its arrival (default 0)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--text", action="store_true", help="print the program: every slot of every rank")
    return parser


def _table(program: Program, result: Simulation) -> str:
    head = ["rank", "stages", *OPERATIONS, "busy", "bubble", "peak"]
    rows = [
        [
            str(rank),
            ",".join(map(str, program.stages_of(rank))),
            *(str(result.operations[rank][name]) for name in OPERATIONS),
            f"{result.busy[rank]:g}",
            f"{result.bubble[rank]:g}",
            str(result.peak_activations[rank]),
        ]
        for rank in range(result.ranks)
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    total = (
        f"{result.schedule}: {result.ranks} ranks, {result.microbatches} micro-batches, "
        f"makespan {result.makespan:g}, bubble {result.bubble_fraction:.2%}"
    )
    return "\n".join([*lines, total])


if __name__ == "__main__":
    sys.exit(main())
