"""``dualpipe simulate``: play a schedule on paper, and print what every rank does, how long it idles, what it holds."""

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dualpipe.cost import Costs
from dualpipe.load import load as load_program
from dualpipe.lower import lower
from dualpipe.program import Program, dump
from dualpipe.schedules import SCHEDULES, check, generate, stages
from dualpipe.search import NAME as SEARCH
from dualpipe.search import Budget, Found, search
from dualpipe.simulate import Simulation, simulate
from launch import output, simulate_table

_EPILOG = """\
costs, in any one unit of time:
  F I W B FB             a stage's forward, backward for inputs, weight gradients, full backward (if not I + W), and
                         overlapped pair (if not F + B); F, I and W are given all or none (then they are 1)
  attn_F dispatch_F mlp_F combine_F   combine_I mlp_I dispatch_I attn_I   mlp_W attn_W
                         instead of these: the phases of one layer, all ten; layers=N of them make a stage
  p2p link               a message's latency, and how long it occupies its link (bytes / bandwidth); default 0
  reduce step gather     the end of the step; default 0
  bytes                  of one micro-batch's activations in one stage, for the peak in bytes
  F@0=2 F@-1=2           another value in stage 0, in the last stage: F, I, W, B, layers, bytes
  p2p@3-4=0.2            another value on the links between ranks 3 and 4: p2p, link

The bubble of a rank is the time in which it computes nothing; its peak is the number of micro-batches whose activations
it holds at once.

examples:
  dualpipe simulate --schedule dualpipe --ranks 8 --microbatches 20 --cost F=1,I=1,W=1,FB=3
  dualpipe simulate --compare --ranks 8 --microbatches 32 --cost F=1,I=1,W=1,FB=2.5,p2p=0.1
  dualpipe simulate configs/tiny-cpu.yaml --html step.html --trace step.json
  dualpipe simulate --compare-run runs/tiny-cpu --html both.html"""

_DEFAULTS = ("dualpipe", 8, 20)
_COST = "F=1,I=1,W=1,FB=3"
# Operations of one kind, stages x micro-batches: 2 KB and 30 microseconds each. DeepSeek-V3's step has 1920.
_LARGEST = 1_000_000
# A search plays thousands of programs of twice the ranks' stages.
_LARGEST_SEARCH = 50_000
_BUDGET = "5000"
_SEARCH_OPTIONS = ("memory_limit", "budget", "seed", "placement")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one line on stderr when the arguments ask for what cannot be."""
    output.prepare()
    try:
        args = _parser().parse_args(argv)
        _check_together(args)
        print(_compare_run(args) if args.compare_run is not None else _compare(args) if args.compare else _one(args))
        sys.stdout.flush()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _one(args: argparse.Namespace) -> str:
    """Simulate one program, write the files asked for, and return what is to be printed."""
    costs = _costs(args)
    found = _search(args, costs) if args.schedule == SEARCH else None
    program = found.program if found else _program(args)
    if args.text:
        return dump(program).rstrip("\n")
    result = found.result if found else simulate(program, costs)
    if args.svg is not None:
        from dualpipe.draw.svg import svg

        _write("--svg", args.svg, svg(result))
    if args.html is not None:
        from dualpipe.draw.html import html

        _write("--html", args.html, html(result))
    _write_trace(args, [result])
    if args.json:
        return json.dumps(simulate_table.searched_json(found) if found else result.to_json())
    report = simulate_table.report(program, result, *_terminal())
    return "\n".join([report, *simulate_table.searched(found)]) if found else report


def _search(args: argparse.Namespace, costs: Costs) -> Found:
    """Find a program. The costs are those of a stage when each rank has one."""
    _, ranks, microbatches = _sizes(args)
    if args.chunks is not None:
        raise ValueError(f"--chunks {args.chunks} and --schedule {SEARCH} exclude each other: --placement chooses")
    if 2 * ranks * microbatches > _LARGEST_SEARCH:
        sizes = f"--ranks {ranks} and --microbatches {microbatches}"
        raise ValueError(f"{sizes}: a search takes at most {_LARGEST_SEARCH // 2} for their product")
    limit = float("inf") if args.memory_limit is None else args.memory_limit
    budget = Budget.parse(_BUDGET if args.budget is None else args.budget)
    allowed = args.placement.split(",") if args.placement is not None else None
    watched = sys.stderr.isatty()
    try:
        return search(ranks, microbatches, costs, limit, budget, args.seed or 0, allowed, _show if watched else None)
    finally:
        if watched:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _show(tried: int, makespan: float) -> None:
    if tried % 100 == 1:
        print(f"\rsearching: {tried} orders tried, makespan {makespan:g}\x1b[K", end="", file=sys.stderr, flush=True)


def _compare(args: argparse.Namespace) -> str:
    """Simulate every schedule. The costs are those of a stage when each rank has one; who cuts finer gets a share."""
    costs = _costs(args)
    _, ranks, microbatches = _sizes(args)
    rows: list[simulate_table.Row] = []
    for name in SCHEDULES:
        try:
            program = _generate(name, ranks, microbatches)
            share = program.ranks / program.stages
            rows.append(simulate_table.Ran(name, program, simulate(program, costs.scaled(share)), share))
        except ValueError as error:
            rows.append(simulate_table.Refused(name, str(error)))
    ran = [row for row in rows if isinstance(row, simulate_table.Ran)]
    if not ran:
        raise ValueError(rows[0].why if isinstance(rows[0], simulate_table.Refused) else "no schedule")
    _write_trace(args, [row.result for row in ran])
    if args.json:
        return json.dumps([row.to_json(ranks, microbatches) for row in rows])
    return simulate_table.comparison(rows, ranks, microbatches)


def _compare_run(args: argparse.Namespace) -> str:
    """Lay a recorded run over its simulation, write the files asked for, and return what is to be printed."""
    from launch import compare_run

    recording, found = compare_run.load(args.compare_run)
    both = found.measured, found.simulated
    if args.svg or args.html:
        from dualpipe.draw import overlay

        for option, path, draw in (("--svg", args.svg, overlay.svg), ("--html", args.html, overlay.html)):
            if path:
                _write(option, path, draw(*both))
    named = zip(both, ("measured", "simulated"), strict=True)
    _write_trace(args, [dataclasses.replace(one, schedule=f"{one.schedule}, {name}") for one, name in named])
    if args.json:
        return json.dumps(compare_run.to_json(args.compare_run, recording, found))
    return compare_run.report(recording, found, _terminal()[0])


def _costs(args: argparse.Namespace) -> Costs:
    costs = Costs.parse(args.cost)
    if args.p2p is None:
        return costs
    if any(part.partition("=")[0].strip() == "p2p" for part in args.cost.split(",")):
        raise ValueError(f"--p2p {args.p2p:g} and p2p in --cost {args.cost} exclude each other")
    return dataclasses.replace(costs, message=args.p2p)


def _program(args: argparse.Namespace) -> Program:
    if args.program is not None:
        return load_program(args.program)
    chunks = args.chunks
    if args.config is not None and args.schedule is None:
        from launch.config import load

        config = load(args.config)
        given = any(value is not None for value in (args.ranks, args.microbatches, chunks))
        if not given and (program := config.program()) is not None:
            return program
        chunks = config.schedule.chunks if chunks is None else chunks
    name, ranks, microbatches = _sizes(args)
    return _generate(name, ranks, microbatches, chunks)


def _generate(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Program:
    """Raises ValueError for sizes that the schedule refuses, and for those that would take minutes."""
    check(name, ranks, microbatches, chunks)
    forwards = stages(name, ranks, chunks) * microbatches
    if forwards > _LARGEST:
        sizes = f"--ranks {ranks} and --microbatches {microbatches}"
        raise ValueError(f"{sizes} make {forwards} forwards, and must make at most {_LARGEST}")
    return lower(generate(name, ranks, microbatches, chunks))


def _sizes(args: argparse.Namespace) -> tuple[str, int, int]:
    """Schedule, ranks and micro-batches: as given, or from the configuration, or the defaults."""
    name, ranks, microbatches = _DEFAULTS
    if args.config is not None:
        from launch.config import load

        config = load(args.config)
        name, ranks, microbatches = config.schedule.name, config.layout.pipeline, config.microbatches
    return (
        name if args.schedule is None else args.schedule,
        ranks if args.ranks is None else args.ranks,
        microbatches if args.microbatches is None else args.microbatches,
    )


def _terminal() -> tuple[int, bool]:
    """Columns, and whether somebody looks at them."""
    return shutil.get_terminal_size((100, 24)).columns, sys.stdout.isatty()


def _write_trace(args: argparse.Namespace, results: Sequence[Simulation]) -> None:
    if args.trace is not None:
        from dualpipe.draw.trace import trace

        _write("--trace", args.trace, json.dumps(trace(results)) + "\n")


def _write(option: str, path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror}") from None


def _check_together(args: argparse.Namespace) -> None:
    """Refuse options of which one would have no effect."""
    given = [f"--{name}" for name in ("schedule", "ranks", "microbatches", "chunks") if getattr(args, name) is not None]
    if args.program is not None:
        given += ["CONFIG"] if args.config is not None else []
        given += ["--compare"] if args.compare else []
        if given:
            raise ValueError(f"--program {args.program} and {given[0]} exclude each other: the file says it all")
    if args.compare_run is not None:
        given += ["CONFIG"] if args.config is not None else []
        given += [f"--{name}" for name in ("program", "p2p") if getattr(args, name) is not None]
        given += [f"--{name}" for name in ("compare", "text") if getattr(args, name)]
        given += ["--cost"] if args.cost != _COST else []
        if given:
            raise ValueError(f"--compare-run {args.compare_run} and {given[0]} exclude each other: the run says it all")
    of_search = [f"--{name.replace('_', '-')}" for name in _SEARCH_OPTIONS if getattr(args, name) is not None]
    if of_search and args.schedule != SEARCH:
        raise ValueError(f"{of_search[0]} is for --schedule {SEARCH} only")
    files = [f"--{name}" for name in ("svg", "html", "trace") if getattr(args, name) is not None]
    if args.text and files:
        raise ValueError(f"--text and {files[0]} exclude each other: --text simulates nothing")
    if args.compare:
        one = [f"--{name}" for name in ("schedule", "chunks", "svg", "html") if getattr(args, name) is not None]
        one += ["--text"] if args.text else []
        if one:
            raise ValueError(f"--compare and {one[0]} exclude each other: {one[0]} is for one schedule")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dualpipe simulate",
        description="Simulate one training step of a pipeline schedule.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    name, ranks, microbatches = _DEFAULTS
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML configuration that has the next three")
    parser.add_argument("--schedule", metavar="S", help=f"one of {', '.join(SCHEDULES)} (default {name}), or {SEARCH}")
    parser.add_argument("--ranks", type=int, metavar="P", help=f"pipeline ranks, layout.pipeline (default {ranks})")
    parser.add_argument(
        "--microbatches", type=int, metavar="M", help=f"micro-batches a step, all directions (default {microbatches})"
    )
    parser.add_argument("--chunks", type=int, metavar="V", help="stages of a rank, where the schedule leaves them open")
    parser.add_argument("--program", metavar="FILE", help="simulate a program's text, as --text prints it, instead")
    parser.add_argument("--compare", action="store_true", help="all schedules in one table, at the same model size")
    parser.add_argument(
        "--compare-run", metavar="RUN", help="a run trained with run.trace=true over its simulation at its own costs"
    )
    parser.add_argument("--cost", default=_COST, metavar="KEY=VALUE,...", help=f"see below; default {_COST}")
    parser.add_argument("--p2p", type=float, metavar="TIME", help="latency of a message, as p2p in --cost (default 0)")
    _add_search(parser)
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--json", action="store_true", help="print one JSON object; with --compare a list of them")
    printed.add_argument("--text", action="store_true", help="print the program: every slot of every rank")
    parser.add_argument("--svg", metavar="FILE", help="write a picture")
    parser.add_argument("--html", metavar="FILE", help="write an interactive page that needs no network")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing")
    return parser


def _add_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(f"with --schedule {SEARCH}", "find a program for these costs and this memory")
    group.add_argument(
        "--memory-limit",
        type=float,
        metavar="A",
        help="the most a rank may hold, in activations of one micro-batch in 1/P of the model (default any)",
    )
    group.add_argument(
        "--budget",
        metavar="N|Ts",
        help=f"how many orders to try, the same on every machine, or for how many seconds (default {_BUDGET})",
    )
    group.add_argument("--seed", type=int, metavar="N", help="another seed, another search (default 0)")
    group.add_argument(
        "--placement", metavar="NAME,...", help="of linear, twins, v, interleaved, those to search (default all)"
    )


if __name__ == "__main__":
    sys.exit(main())
