"""``dualpipe drill [SCENARIO ...]``: break a real run on purpose, and prove that it recovered. See docs/recovery.md."""

import argparse
import difflib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch import stop
from launch.command import Parser, UsageError, reported
from launch.config import Config, load
from launch.drills import drive
from launch.drills.fault import Plan
from launch.drills.scenarios import SCENARIOS, Again, Scenario
from launch.drills.verdict import Verdict, ending, judge

FAILED = 1
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

Exit status: 0 when all scenarios passed, 1 when one did not, 2 for bad input."""


def main(argv: Sequence[str] | None = None) -> int:
    verdicts: list[Verdict] = []
    try:
        stop.end_at_once()
        status = reported(lambda: verdicts.extend(_drill(_parser().parse_args(argv))))
    except stop.Stopped as stopped:
        print("stopped; everything that was started is ended and removed", file=sys.stderr)
        return 128 + stopped.number
    return status or (0 if all(verdict.passed for verdict in verdicts) else FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dualpipe drill",
        description="Break a real run on purpose, and compare what it comes to with a run that nobody disturbed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", metavar="SCENARIO", nargs="*", help="what to drill; everything by default")
    parser.add_argument("--list", action="store_true", help="say what there is to drill, and drill nothing")
    parser.add_argument("--config", metavar="CONFIG", type=Path, help="YAML file; a small tiny-cpu.yaml by default")
    parser.add_argument(
        "--control",
        action="store_true",
        help="without restarts, checksums, memory and watch: every verdict must fail",
    )
    parser.add_argument("--json", action="store_true", help="print one list of objects instead of the table")
    return parser


def _drill(arguments: argparse.Namespace) -> list[Verdict]:
    chosen = [scenario for scenario in _chosen(arguments.scenarios) if not arguments.control or _has_control(scenario)]
    if arguments.list:
        _list(chosen, arguments.json)
        return []
    for name in arguments.scenarios if arguments.control else ():
        if not _has_control(SCENARIOS[name]):
            raise UsageError(f"--control: scenario {name} has no protection that can be switched off")
    config = load(DEFAULT, SHRUNK) if arguments.config is None else load(arguments.config)
    for scenario in chosen:
        Plan(Path(drive.PLAN_FILE), scenario.faults).check(drive.drilled(config, Path("run"), scenario))
    with tempfile.TemporaryDirectory(prefix="dualpipe-drill-") as folder:
        verdicts = _run(chosen, config, Path(folder), arguments)
    if arguments.json:
        print(json.dumps([verdict.as_dict() for verdict in verdicts]))
    return verdicts


def _chosen(names: Sequence[str]) -> list[Scenario]:
    for name in names:
        if name not in SCENARIOS:
            close = difflib.get_close_matches(name, SCENARIOS, n=1, cutoff=0.0)
            raise UsageError(f"SCENARIO={name!r} is not a scenario; did you mean {close[0]}? (--list shows all)")
    return [SCENARIOS[name] for name in dict.fromkeys(names or SCENARIOS)]


def _has_control(scenario: Scenario) -> bool:
    """Whether the run survives by something that can be switched off: restarts, checksums, memory, a watch."""
    return scenario.again is not Again.USER or scenario.damage is not None


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
    if not arguments.json:
        print(f"undisturbed: {len(standard.steps)} steps in {seconds:.1f} s, state {standard.state[:16]}\n\n{_HEAD}")
    verdicts, planned = [], None
    for scenario in scenarios:
        limit = SLOWEST * seconds + 60
        evidence = drive.disturbed(scenario, config, folder / scenario.name, arguments.control, limit)
        if scenario.skips and planned is None:
            bad = drive.batch_of(drive.drilled(config, folder), scenario.faults[0].step)
            planned = ending(drive.undisturbed(config, folder / "planned", [bad]).folder)
        verdicts.append(judge(scenario, evidence, planned if scenario.skips and planned is not None else standard))
        if not arguments.json:
            print(_row(scenario, verdicts[-1]), flush=True)
    return verdicts


_WIDTHS = (16, 51, 50, 9, 7, 4, 7, 4)


def _line(*cells: str) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells[:-1], _WIDTHS, strict=True)) + f"  {cells[-1]}"


_HEAD = _line("scenario", "broken", "culprit named", "noticed s", "back s", "lost", "bitwise", "left", "verdict")


def _row(scenario: Scenario, verdict: Verdict) -> str:
    """A line of the table, and one for each problem."""
    row = _line(
        verdict.scenario,
        scenario.broken,
        _short(verdict.culprit or "-"),
        _number(verdict.detected_s),
        _number(verdict.recovered_s),
        "-" if verdict.lost_steps is None else str(verdict.lost_steps),
        "equal" if verdict.bitwise_equal else "differs",
        str(len(verdict.leftovers)),
        "passed" if verdict.passed else "FAILED",
    )
    return "\n".join([row, *(f"    {problem}" for problem in verdict.problems)])


def _short(culprit: str) -> str:
    """As much as the column holds; --json has it whole."""
    return culprit if len(culprit) <= _WIDTHS[2] else f"{culprit[: _WIDTHS[2] - 3]}..."


def _number(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


if __name__ == "__main__":
    sys.exit(main())
