"""Whether a schedule that runs takes what its simulation says, and how torch's own implementation of it does.

    python -m benchmarks.bubble [--ranks 4,8] [--rounds 5] [--stage-ms 20] [--pair 2.4] [--json]

Every schedule runs in real processes, one a rank, with real messages over gloo, through the runtime and the transport
that train; only the stages wait instead of computing (``timed.py``). All run the same model: one of 2P stages of it
takes ``--stage-ms`` for each of F, I and W, one of P stages twice as long. A pair of F and B takes F + B, and in a
second setting ``--pair`` times F, for the overlap that it exists for; torch runs the halves one after the other.
The simulation gets the same durations, and the latency of a message between neighbours, measured in between. Ours and
torch's (``torch.distributed.pipelining``) take turns in the same processes, and the figure is a ratio of medians.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bubble_ranks import TORCH, Contestant, Ours, Torchs, started
from dualpipe import schedules
from dualpipe.cost import Costs
from dualpipe.lower import lower
from dualpipe.program import Overlap
from dualpipe.schedules import SCHEDULES, generate
from dualpipe.simulate import simulate


@dataclass(frozen=True)
class Row:
    """One schedule in one setting: seconds of its steps, ours and torch's, None where torch has no such schedule."""

    schedule: str
    overlapped: bool
    ours_s: tuple[float, ...]
    torchs_s: tuple[float, ...] | None
    simulated_s: float

    @property
    def measured_s(self) -> float:
        return statistics.median(self.ours_s)

    @property
    def torch_s(self) -> float | None:
        return None if self.torchs_s is None else statistics.median(self.torchs_s)

    @property
    def difference(self) -> float:
        return self.measured_s / self.simulated_s - 1

    @property
    def ratio(self) -> float | None:
        return None if self.torch_s is None else self.measured_s / self.torch_s

    def to_json(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule,
            "overlapped_pairs": self.overlapped,
            "measured_s": self.measured_s,
            "simulated_s": self.simulated_s,
            "difference": self.difference,
            "torch_s": self.torch_s,
            "ratio": self.ratio,
            "steps_s": self.ours_s,
            "torch_steps_s": self.torchs_s,
        }


@dataclass(frozen=True)
class Outcome:
    """All schedules on so many ranks. ``latency_s``: of a message, as measured and simulated."""

    ranks: int
    microbatches: int
    latency_s: float
    rows: tuple[Row, ...]

    @property
    def dualpipe_to_torchs_best(self) -> float:
        """A step of DualPipe with overlapped pairs to the fastest step of torch's."""
        ours = next(row for row in self.rows if row.schedule == "dualpipe" and row.overlapped)
        return ours.measured_s / min(row.torch_s for row in self.rows if row.torch_s is not None)

    def to_json(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks,
            "microbatches": self.microbatches,
            "latency_s": self.latency_s,
            "rows": [row.to_json() for row in self.rows],
            "dualpipe_to_torchs_best": self.dualpipe_to_torchs_best,
        }


def contestants_of(ranks: int, stage_s: float, pair: float) -> dict[str, Contestant]:
    """Every schedule, ours and torch's, on the fewest micro-batches that all of them take: twice the ranks."""
    apart = Costs(2 * stage_s, 2 * stage_s, 2 * stage_s)
    found: dict[str, Contestant] = {}
    for name in SCHEDULES:
        program = lower(generate(name, ranks, 2 * ranks), training=False)
        share = ranks / program.stages
        found[name] = Ours(program, apart.scaled(share))
        if any(isinstance(slot, Overlap) for slots in program.slots for slot in slots):
            found[f"{name} overlapped"] = Ours(program, replace(apart, overlapped=pair * apart.forward).scaled(share))
        if name in TORCH:
            stages = tuple(tuple(sorted(program.stages_of(rank))) for rank in range(ranks))
            found[f"{name} torch"] = Torchs(TORCH[name], 2 * ranks, stages, apart.scaled(share))
    return found


def measure(ranks: int, rounds: int, stage_s: float, pair: float) -> Outcome:
    """All contestants in turns, every other round in reverse."""
    contestants = contestants_of(ranks, stage_s, pair)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    pings: list[float] = []
    with started(ranks, contestants) as processes:
        for turn in range(rounds):
            pings += processes.ping()
            for name in contestants if turn % 2 == 0 else reversed(contestants):
                seconds[name].append(processes.step(name))
    latency = statistics.median(pings)
    rows = []
    for name, contestant in contestants.items():
        if isinstance(contestant, Ours):
            simulated = simulate(contestant.program, replace(contestant.costs, message=latency)).makespan
            schedule = contestant.program.schedule
            torchs = seconds.get(f"{schedule} torch")
            samples = tuple(seconds[name]), None if torchs is None else tuple(torchs)
            rows.append(Row(schedule, name != schedule, *samples, simulated))
    return Outcome(ranks, 2 * ranks, latency, tuple(rows))


def print_outcome(console: Console, outcome: Outcome, rounds: int) -> None:
    title = f"A step on {outcome.ranks} ranks, {outcome.microbatches} micro-batches (median of {rounds})"
    table = Table(title=title)
    for column in ("schedule", "pair", "ms", "simulated", "difference", "torch's", "ratio"):
        table.add_column(column, justify="left" if column in ("schedule", "pair") else "right")
    for row in outcome.rows:
        has_pairs = any(other.schedule == row.schedule and other.overlapped for other in outcome.rows)
        table.add_row(
            row.schedule,
            "overlapped" if row.overlapped else "F + B" if has_pairs else "",
            f"{1e3 * row.measured_s:.1f}",
            f"{1e3 * row.simulated_s:.1f}",
            f"{row.difference:+.1%}",
            "" if row.torch_s is None else f"{1e3 * row.torch_s:.1f}",
            "" if row.ratio is None else f"{row.ratio:.3f}",
        )
    console.print(table)
    console.print(f"a message takes {1e6 * outcome.latency_s:.0f} us between neighbours")
    console.print(f"dualpipe, pairs overlapped / fastest of torch's: {outcome.dualpipe_to_torchs_best:.3f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 after one line on stderr when the arguments ask for what cannot be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bubble", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", default="4,8", help="pipeline ranks, one number or several (default 4,8)")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each contestant")
    parser.add_argument("--stage-ms", type=float, default=20.0, help="of F, I and W each, in one of 2P stages")
    parser.add_argument("--pair", type=float, default=2.4, help="what an overlapped pair takes, in times of F")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        wanted = _ranks(options.ranks)
        _check(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(stderr=options.json)
    outcomes = []
    for ranks in wanted:
        outcomes.append(measure(ranks, options.rounds, options.stage_ms / 1e3, options.pair))
        print_outcome(console, outcomes[-1], options.rounds)
    if options.json:
        settings = {"rounds": options.rounds, "stage_ms": options.stage_ms, "pair": options.pair}
        print(json.dumps({**settings, "outcomes": [outcome.to_json() for outcome in outcomes]}))
    return 0


def _ranks(text: str) -> list[int]:
    """Numbers of ranks that every schedule takes. Raises ValueError."""
    try:
        wanted = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--ranks {text} must be numbers such as 4,8") from None
    for ranks in wanted:
        if ranks < 2:
            raise ValueError(f"--ranks {ranks} must be at least 2: one rank has no pipeline")
        for name in SCHEDULES:
            schedules.check(name, ranks, 2 * ranks)
    return wanted


def _check(options: argparse.Namespace) -> None:
    if options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds} must be at least 1")
    if not 0 < options.stage_ms <= 1000:
        raise ValueError(f"--stage-ms {options.stage_ms:g} must be above 0 and at most 1000")
    if not 1 <= options.pair <= 3:
        raise ValueError(f"--pair {options.pair:g} must be from 1, wholly hidden, to 3, not overlapped at all")


if __name__ == "__main__":
    sys.exit(main())
