"""``dualpipe drill [SCENARIO ...]``: break a real run on purpose, and prove that it recovered. See docs/recovery.md."""

import argparse
import difflib
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import hosts, stop
from launch.command import Parser, UsageError, reported
from launch.config import Config
from launch.drills import drive
from launch.drills.fault import Plan
from launch.drills.scenarios import SCENARIOS, Scenario
from launch.drills.soak import Soaked, soak
from launch.drills.verdict import Ending, Verdict, ending, judge
from launch.nodes.roster import NodeCount
from launch.nodes.together import shares_of
from launch.resume import STAGES
from launch.train import configuration

FAILED = 1
FEWEST_SOAK_SECONDS = 60
DEFAULT = Path(__file__).parents[1] / "configs" / "tiny-cpu.yaml"
SHRUNK = (
    "layout.pipeline=2",
    "layout.data=2",
    "layout.expert=2",
    "model.hidden_size=64",
    "model.num_hidden_layers=4",
    "model.intermediate_size=128",
    "model.moe_intermediate_size=32",
    "model.n_routed_experts=8",
    "train.sequence_length=64",
    "train.global_batch_size=16",
    "train.threads=1",
)
"""What makes tiny-cpu.yaml a run of four ranks and a few seconds, most of which are the start of Python."""
SLOWEST = 10
"""A start of a scenario may take so many times what the undisturbed run took, and a minute."""

_EPILOG = """\
examples:
  dualpipe drill                          every scenario, on a small run
  dualpipe drill kill-backward bit-flip   two of them
  dualpipe drill --config my.yaml         on your own model and layout, for 8 steps, in a folder that is removed
  dualpipe drill --control bit-flip       without the protection: it has to fail
  dualpipe drill --soak 20m               configs/tiny-cpu.yaml for so long, with a random fault every 20 to 40 seconds,
                                          and as many steps again without

Exit status: 0 when all scenarios passed, 1 when one did not, 2 for bad input."""


def main(argv: Sequence[str] | None = None) -> int:
    passed: list[bool] = []
    try:
        stop.end_at_once()
        status = reported(lambda: passed.extend(_drill(_parser().parse_args(argv))))
    except stop.Stopped as stopped:
        print("stopped; everything that was started is ended and removed", file=sys.stderr)
        return 128 + stopped.number
    return status or (0 if all(passed) else FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dualpipe drill",
        description="Break a real run on purpose, and compare what it comes to with a run that nobody disturbed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", metavar="SCENARIO", nargs="*", help="what to drill; everything by default")
    parser.add_argument("--list", action="store_true", help="say what there is to drill, and drill nothing")
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        type=Path,
        help="YAML file or the folder of a run; a small tiny-cpu.yaml by default",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="without what protects a run: every verdict must fail",
    )
    parser.add_argument("--soak", metavar="TIME", help="no scenario, but random faults for so long: 90s, 20m, 2h")
    parser.add_argument("--seed", type=int, help="of the faults of --soak; 0 by default")
    parser.add_argument(
        "--json", action="store_true", help="print one list of objects; the table goes to standard error"
    )
    return parser


def _drill(arguments: argparse.Namespace) -> list[bool]:
    """Whether each passed."""
    if arguments.soak is not None:
        return _soak(arguments)
    if arguments.seed is not None:
        raise UsageError(f"--seed={arguments.seed} means nothing without --soak: only its faults are drawn")
    return _drill_scenarios(arguments)


def _soak(arguments: argparse.Namespace) -> list[bool]:
    given = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", arguments.soak)
    seconds = float(given[1]) * {"s": 1, "m": 60, "h": 3600}[given[2]] if given else 0.0
    if seconds < FEWEST_SOAK_SECONDS:
        raise UsageError(f"--soak={arguments.soak} must be a time such as 90s, 20m or 2h, of a minute at least")
    if arguments.scenarios or arguments.control or arguments.list:
        raise UsageError("--soak takes no SCENARIO, no --control and no --list")
    config = configuration(arguments.config or DEFAULT)
    with tempfile.TemporaryDirectory(prefix="dualpipe-drill-") as folder:
        soaked = soak(config, Path(folder), seconds, arguments.seed or 0, _say)
    if arguments.json:
        print(json.dumps(soaked.as_dict()))
    else:
        print(_told(soaked))
    return [not soaked.problems]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _told(soaked: Soaked) -> str:
    kinds = ", ".join(f"{count} x {kind}" for kind, count in soaked.faults.most_common())
    forward = statistics.median(soaked.forward_s) if soaked.forward_s else 0.0
    lines = [
        f"{soaked.steps} steps in {soaked.seconds / 60:.1f} min, {soaked.faults.total()} faults: {kinds}",
        *_told_gaps(soaked),
        f"from a fault to the first forward {forward:.2f} s (median); at most {soaked.lost_steps} steps lost",
        f"effective training time {soaked.effective:.1%}; bits {'equal' if soaked.bitwise_equal else 'differ'}",
        *(f"    {problem}" for problem in soaked.problems),
        "FAILED" if soaked.problems else "passed",
    ]
    return "\n".join(lines)


def _told_gaps(soaked: Soaked) -> Iterator[str]:
    gaps = soaked.gaps_s
    if gaps:
        yield f"a fault every {min(gaps):.1f} to {max(gaps):.1f} s, every {statistics.median(gaps):.1f} s (median)"
    for late in soaked.late:
        forward = "no forward since" if late.forward_s is None else f"first forward after {late.forward_s:.1f} s"
        yield f"    one {late.gap_s:.1f} s after the one before, a {late.after}: {forward}"


def _drill_scenarios(arguments: argparse.Namespace) -> list[bool]:
    chosen = _chosen(arguments.scenarios)
    if arguments.list:
        _list(chosen, arguments.json)
        return []
    if lacking := hosts.missing():
        clustered = [scenario.name for scenario in chosen if scenario.hosts]
        for name in clustered:
            if name in arguments.scenarios:
                raise UsageError(f"scenario {name} needs an emulated cluster: {lacking}")
            print(f"left out: {name}, which needs an emulated cluster: {lacking}", file=sys.stderr)
        chosen = [scenario for scenario in chosen if not scenario.hosts]
    config = configuration(DEFAULT, SHRUNK) if arguments.config is None else configuration(arguments.config)
    for scenario in chosen:
        ranks, fewest = config.layout.world_size, scenario.fewest_ranks
        if ranks < fewest:
            raise UsageError(f"scenario {scenario.name} means nothing on {ranks} rank: it needs {fewest} at least")
        if ranks % scenario.nodes:
            raise UsageError(
                f"scenario {scenario.name}: its {scenario.nodes} nodes must divide the run's {ranks} ranks"
            )
        drilled = drive.drilled(config, Path("run"), scenario)
        Plan(Path(drive.PLAN_FILE), scenario.faults).check(drilled)
        shares_of(drilled, NodeCount(scenario.nodes, scenario.nodes + scenario.spares))
    with tempfile.TemporaryDirectory(prefix="dualpipe-drill-") as folder:
        verdicts = _run(chosen, config, Path(folder), arguments)
    if arguments.json:
        print(json.dumps([verdict.as_dict() for verdict in verdicts]))
    return [verdict.passed for verdict in verdicts]


def _chosen(names: Sequence[str]) -> list[Scenario]:
    for name in names:
        if name not in SCENARIOS:
            close = difflib.get_close_matches(name, SCENARIOS, n=1, cutoff=0.0)
            raise UsageError(f"SCENARIO={name!r} is not a scenario; did you mean {close[0]}? (--list shows all)")
    return [SCENARIOS[name] for name in dict.fromkeys(names or SCENARIOS)]


def _list(scenarios: Sequence[Scenario], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"scenario": s.name, "broken": s.broken, "again": s.again.value} for s in scenarios]))
        return
    for scenario in scenarios:
        print(f"{scenario.name:<16} {scenario.broken}; started again by {scenario.again.value}")


def _run(scenarios: Sequence[Scenario], config: Config, folder: Path, arguments: argparse.Namespace) -> list[Verdict]:
    whole = drive.undisturbed(config, folder / "undisturbed")
    (attempt,) = whole.attempts
    seconds, standard = attempt.ended - attempt.began, ending(whole.folder)
    if attempt.status != 0 or standard.state is None:
        said = (attempt.output.strip().splitlines() or ["nothing"])[-1].removeprefix("error: ")
        raise UsageError(f"the run fails without any fault, with status {attempt.status}: {said}")
    table = sys.stderr if arguments.json else sys.stdout
    steps = f"{len(standard.steps)} steps in {seconds:.1f} s"
    print(f"undisturbed: {steps}, state {standard.state[:16]}\n\n{_HEAD}", file=table, flush=True)
    verdicts: list[Verdict] = []
    planned: dict[int, Ending] = {}
    for scenario in scenarios:
        limit = SLOWEST * seconds + 60
        evidence = drive.disturbed(scenario, config, folder / scenario.name, arguments.control, limit)
        wanted = standard
        if scenario.skips:
            bad = drive.batch_of(drive.drilled(config, folder), scenario.faults[0].step)
            if bad not in planned:
                planned[bad] = ending(drive.undisturbed(config, folder / f"planned-{bad}", [bad]).folder)
            wanted = planned[bad]
        if scenario.returns:
            wanted = ending(drive.planned(config, folder / f"planned-{scenario.name}", evidence.folder).folder)
        verdicts.append(judge(scenario, evidence, wanted))
        print(_row(scenario, verdicts[-1]), file=table, flush=True)
    return verdicts


_WIDTHS = (16, 55, 50, 9, 6, 9, 6, 6, 9, 7, 4, 7, 4)


def _line(*cells: str) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells[:-1], _WIDTHS, strict=True)) + f"  {cells[-1]}"


_HEAD = _line(
    *("scenario", "broken", "culprit named", "noticed s", *(f"{stage} s" for stage in STAGES)),
    *("forward s", "back s", "lost", "bitwise", "left", "verdict"),
)


def _row(scenario: Scenario, verdict: Verdict) -> str:
    """A line of the table, one for a culprit that its column does not hold, and one for each problem."""
    culprit = verdict.culprit or "-"
    cut = len(culprit) > _WIDTHS[2]
    row = _line(
        verdict.scenario,
        scenario.broken,
        f"{culprit[: _WIDTHS[2] - 3]}..." if cut else culprit,
        _number(verdict.detected_s),
        *(_number(seconds) for seconds in verdict.stages_s.values()),
        _number(verdict.forward_s),
        _number(verdict.recovered_s),
        "-" if verdict.lost_steps is None else str(verdict.lost_steps),
        "equal" if verdict.bitwise_equal else "differs",
        str(len(verdict.leftovers)),
        "passed" if verdict.passed else "FAILED",
    )
    return "\n".join([row, *([f"    named: {culprit}"] if cut else []), *(f"    {p}" for p in verdict.problems)])


def _number(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


if __name__ == "__main__":
    sys.exit(main())
