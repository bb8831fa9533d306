"""Whether FP8's loss follows BF16's: paired runs of a small model through DualPipe with expert parallelism.

    python -m benchmarks.fp8_loss [--seeds 12] [--svg docs/fp8_loss.svg]
    python -m benchmarks.fp8_loss --report --results docs/fp8_loss.jsonl    # those of docs/fp8.md

One seed proves nothing at this size: two BF16 runs that differ in one weight by 1e-4 drift as far apart as FP8 and
BF16. So every seed, which draws the weights and the order of the text, trains three times (``fp8_loss.yaml``): in BF16,
in BF16 with one weight moved (the control), and in FP8. A run's result is its mean loss over the last 50 steps, and its
excess is relative to the BF16 run of the same seed. FP8 follows if the 95 % interval of its mean excess (Student's t,
over the seeds) lies below 0.25 %, the gap that DeepSeek-V3's report gives (3.3).

Every finished run is a line of the results file, and the command goes on from there. A run takes four ranks one to two
minutes of two cores; ``--report`` runs nothing and says what there is.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from benchmarks.fp8_loss_ranks import CONFIG, VARIANTS, Run, configuration, work
from benchmarks.loss_curves import CLAIM, svg
from launch.command import progress_bar
from launch.config_file import read
from launch.data import DataError, open_dataset

RESULTS = Path("runs/fp8_loss.jsonl")
LAST = 50
Losses = dict[Run, list[float]]


@dataclass(frozen=True)
class Interval:
    """The mean of one number a seed, and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.3f} %, 95 % interval {100 * self.low:+.3f} to {100 * self.high:+.3f} %"


MARKS = ("settings", "text")
"""What ``stamp`` says."""


class ResultsError(ValueError):
    """A results file that these runs cannot go on with."""


def stamp(steps: int) -> dict[str, str]:
    """What the runs of a results file must have in common: the settings, and the text that they read."""
    settings = json.dumps(read(CONFIG), sort_keys=True)
    text = open_dataset(configuration(Run(1, "bf16"), steps)).fingerprint
    return {"settings": hashlib.sha256(settings.encode()).hexdigest()[:12], "text": text[:12]}


def read_results(file: Path, mark: dict[str, str] | None, steps: int) -> Losses:
    """The finished runs of ``steps`` steps, all with this ``mark``, or with that of the first. A last line that was cut
    short is not one, and is taken away."""
    if not file.exists():
        return {}
    lines = file.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        file.write_bytes(b"".join(lines := lines[:-1]))
    losses = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            mark = {key: entry[key] for key in MARKS} if mark is None else mark
            same = all(entry[key] == value for key, value in mark.items())
            run, count, loss = Run(entry["seed"], entry["variant"]), entry["steps"], entry["loss"]
        except (ValueError, TypeError, KeyError) as error:
            raise ResultsError(f"{file}, line {number} is not a run: {error!r}") from None
        if not same:
            raise ResultsError(f"{file} has runs of other settings or of another text; name a new file with --results")
        if count == steps:
            losses[run] = loss
    return losses


def excess(losses: Losses, variant: str, last: int = LAST) -> list[float]:
    """By seed, the mean of the ``last`` losses over that of the BF16 run, less one."""
    pairs = [
        (losses[run], losses[base])
        for run in sorted(losses)
        if (base := Run(run.seed, "bf16")) in losses and run.variant == variant
    ]
    return [statistics.fmean(a[-last:]) / statistics.fmean(b[-last:]) - 1 for a, b in pairs]


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of two numbers or more."""
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def t_quantile(degrees: int, share: float = 0.95) -> float:
    """t with ``share`` of Student's distribution between -t and t, by bisection of its closed form (Abramowitz and
    Stegun, 26.7.3 and 26.7.4)."""

    def between(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        odd = degrees % 2
        term, total = math.cos(angle) if odd else 1.0, 0.0
        for j in range(2 + odd, degrees + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (j - 1) / j
        sine = math.sin(angle) * total
        return (angle + sine) * 2 / math.pi if odd else sine

    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if between(middle) < share else (low, middle)
    return high


def verdict(fp8: Interval) -> str:
    if fp8.high < CLAIM:
        return f"FP8 follows BF16: the interval lies below {CLAIM:.2%}"
    if fp8.low > CLAIM:
        return f"FP8 does not follow BF16: the interval lies above {CLAIM:.2%}"
    return f"inconclusive: the interval holds {CLAIM:.2%}; more seeds would narrow it"


def summary(losses: Losses) -> dict[str, Any]:
    """Of the seeds whose three runs are done."""
    seeds = sorted({run.seed for run in losses if all(Run(run.seed, v) in losses for v in VARIANTS)})
    whole = {run: loss for run, loss in losses.items() if run.seed in seeds}
    result: dict[str, Any] = {"seeds": seeds, "last": LAST}
    for variant in ("fp8", "control"):
        values = excess(whole, variant)
        result[variant] = {"excess": values}
        if len(values) > 1:
            result[variant] |= asdict(found := interval(values))
            result |= {"verdict": verdict(found)} if variant == "fp8" else {}
    return result


def print_summary(result: dict[str, Any]) -> None:
    print("seed      FP8  control   excess of the mean loss over the last 50 steps, %")
    for seed, *values in zip(result["seeds"], result["fp8"]["excess"], result["control"]["excess"], strict=True):
        print(f"{seed:4}  " + "  ".join(f"{100 * value:+7.3f}" for value in values))
    if "verdict" not in result:
        print("no interval without two seeds whose three runs are done")
        return
    for variant, name in (("fp8", "FP8"), ("control", "BF16, one weight moved")):
        print(f"{name}: {Interval(*(result[variant][key] for key in ('mean', 'low', 'high')))}")
    print(f"{len(result['seeds'])} seeds; {result['verdict']}")


def run_all(runs: list[Run], steps: int, results: Path, mark: dict[str, str]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    world = configuration(runs[0], steps).layout.world_size
    with tempfile.TemporaryDirectory() as stores:
        told: SimpleQueue[str] = get_context("spawn").SimpleQueue()
        # Ranks that are daemons end with this process, also where a signal ends it alone.
        ranks = spawn(work, (runs, steps, results, mark, Path(stores), told), nprocs=world, join=False, daemon=True)
        with progress_bar("train", len(runs) * steps, "steps") as advance:
            over = False
            while not over:
                over = ranks.join(timeout=0.25)
                while not told.empty():
                    print(line, file=sys.stderr) if (line := told.get()) else advance()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_loss", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=12, help="seeds 1 to this, three runs each")
    parser.add_argument("--steps", type=int, default=300, help="of a run; at least 50, of which the last count")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"a line for each finished run ({RESULTS})")
    parser.add_argument("--svg", type=Path, help="draw the curves there")
    parser.add_argument("--report", action="store_true", help="run nothing, and say what the results file holds")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < LAST:
        parser.error(f"--seeds must be at least 1 and --steps at least {LAST}")
    try:
        if options.report and not options.results.exists():
            raise ResultsError(f"--results={options.results} is not there; without --report it is begun")
        if options.svg is not None and not options.svg.parent.is_dir():
            raise ResultsError(f"--svg={options.svg} must lie in a folder that is there")
        mark = None if options.report else stamp(options.steps)
        losses = read_results(options.results, mark, options.steps)
        wanted = [Run(seed, variant) for seed in range(1, options.seeds + 1) for variant in VARIANTS]
        if mark is not None and (lacking := [run for run in wanted if run not in losses]):
            run_all(lacking, options.steps, options.results, mark)
            losses = read_results(options.results, mark, options.steps)
    except (ResultsError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on after the runs that {options.results} has", file=sys.stderr)
        return 130
    result = summary(losses)
    if options.svg is not None and "verdict" not in result:
        print(f"--svg={options.svg} was not drawn: it needs two seeds", file=sys.stderr)
    elif options.svg is not None:
        options.svg.write_text(svg({v: [losses[Run(s, v)] for s in result["seeds"]] for v in VARIANTS}, LAST))
    print(json.dumps(result)) if options.json else print_summary(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
