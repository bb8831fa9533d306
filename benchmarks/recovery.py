"""From a fault to training again: ours from peers' memory and from checkpoints, beside plain torchrun.

    python -m benchmarks.recovery [--rounds 5] [--fault kill] [--json]

The run of ``dualpipe drill``, four ranks of a small model, is broken in the sixth of eight steps:

- kill: its last rank dies by SIGKILL. Ours are the drills kill-unsaved and kill-forward.
- hang: its last rank is there and does nothing more, by SIGSTOP (drill stop); or rank 0 never comes back from a
  backward (drill hang).
- node: two nodes of two ranks and a spare one, all on this machine; the launcher and the ranks of one die, in turns of
  the second node and of the first, which has the store (drills lose-node and lose-node-store).
- partition: the same on nodes with a network each, one of which is cut off (drill partition, which needs root). That
  the rest has the run's only history is the drill's verdict: every step once, in one file.

In the first two, torchrun has the same model and layout, the ranks of ``recovery_ranks.py`` and torch's distributed
checkpoint of every second step; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, because with its defaults it never recovers; a
timeout of 10 seconds, because with the default of its process group it notices a stopped rank after half an hour. In
the others there is nothing to compare with: a torchrun job whose lost node had the store is over.

Contestants take turns; medians of: seconds from the fault until it was noticed, until the first forward begins, until
the first step is done; the most steps taken again; and processes that were left, all rounds together.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.dispatch import positive
from benchmarks.recovery_ranks import STEPS
from launch import hosts
from launch.config import Config, dump, load
from launch.drill import DEFAULT, SHRUNK
from launch.drills import drive
from launch.drills.scenarios import SCENARIOS
from launch.drills.verdict import ending, judge

LIMIT_SECONDS = 600.0
TIMEOUT_SECONDS = 10.0
FAULTS = ("kill", "hang", "node", "partition")
MARK = "DUALPIPE_BENCHMARK"


@dataclass(frozen=True)
class Sample:
    """Seconds from the fault, and steps that were taken again; ``left``: processes that outlived the run."""

    noticed: float
    forward: float
    back: float
    lost: int
    left: int


def ours(config: Config, scenario: str, folder: Path) -> Sample:
    evidence = drive.disturbed(SCENARIOS[scenario], config, folder, control=False, limit_seconds=LIMIT_SECONDS)
    verdict = judge(SCENARIOS[scenario], evidence, ending(evidence.folder))  # the bits are the drill's business
    if not verdict.passed:
        raise RuntimeError(f"{scenario}: {'; '.join(verdict.problems)}\n{evidence.attempts[0].output}")
    noticed, forward, back, lost = verdict.detected_s, verdict.forward_s, verdict.recovered_s, verdict.lost_steps
    assert noticed is not None and forward is not None and back is not None and lost is not None
    return Sample(noticed, forward, back, lost, len(verdict.leftovers))


def torchrun(config: Config, number: str, folder: Path) -> Sample:
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config))
    mark = uuid.uuid4().hex
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    words += ["--nproc-per-node", str(config.layout.world_size), "--monitor-interval", "0.1"]
    words += ["-m", "benchmarks.recovery_ranks", str(folder / "config.yaml"), str(folder), number]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", MARK: mark}
    done = subprocess.run(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_SECONDS
    )
    time.sleep(0.5)
    left = _end_marked(mark)
    if done.returncode:
        raise RuntimeError(f"torchrun ended with status {done.returncode}:\n{done.stdout}")
    ((struck, step),) = _lines(folder / "struck")
    noticed = min(when for when, _ in _lines(folder / "noticed"))
    forward = min(when for when, _ in _lines(folder / "forwards") if when > struck)
    again = [(when, number) for when, number in _lines(folder / "steps") if when > noticed]
    assert again[-1][1] == STEPS
    return Sample(noticed - struck, forward - struck, again[0][0] - struck, int(step - again[0][1]), left)


def _lines(file: Path) -> list[tuple[float, float]]:
    return [(float(when), float(number)) for when, number in map(str.split, file.read_text().splitlines())]


def _end_marked(mark: str) -> int:
    """How many processes are there that were started with this mark; they are ended."""
    left = 0
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                left += 1
                process.kill()
        except psutil.Error:
            continue
    return left


def contestants(fault: str) -> dict[str, Callable[[Path], Sample]]:
    config = load(DEFAULT, SHRUNK)
    impatient = load(DEFAULT, [*SHRUNK, f"train.timeout_seconds={TIMEOUT_SECONDS}"])
    match fault:
        case "kill":
            return {
                "ours, peers' memory": lambda folder: ours(config, "kill-unsaved", folder),
                "ours, checkpoints": lambda folder: ours(config, "kill-forward", folder),
                "torchrun + DCP": lambda folder: torchrun(config, "SIGKILL", folder),
            }
        case "hang":
            return {
                "ours, stopped": lambda folder: ours(config, "stop", folder),
                "ours, never comes back": lambda folder: ours(config, "hang", folder),
                "torchrun + DCP, stopped": lambda folder: torchrun(impatient, "SIGSTOP", folder),
            }
        case "node":
            return {
                "ours, second node": lambda folder: ours(config, "lose-node", folder),
                "ours, the store's node": lambda folder: ours(config, "lose-node-store", folder),
            }
        case "partition":
            return {"ours": lambda folder: ours(config, "partition", folder)}
        case _:
            raise AssertionError(fault)


def measure(fault: str, rounds: int, folder: Path) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    of = contestants(fault)
    for turn in range(rounds):
        for name in of if turn % 2 == 0 else reversed(of):
            place = folder / f"{fault}-{turn}-{len(found.setdefault(name, []))}-{list(of).index(name)}"
            found[name].append(of[name](place))
    return found


def _middle(samples: Sequence[Sample]) -> dict[str, Any]:
    times = ("noticed", "forward", "back")
    middle = {key: round(statistics.median(getattr(s, key) for s in samples), 3) for key in times}
    lost, left = max(s.lost for s in samples), sum(s.left for s in samples)
    return {**middle, "lost": lost, "left": left, "rounds": len(samples)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--fault", choices=FAULTS, help="one of them; all by default")
    parser.add_argument("--json", action="store_true", help="print one object")
    arguments = parser.parse_args(argv)
    table = Table(title=f"seconds from the fault, medians of {arguments.rounds}")
    for column in ("fault", "", "noticed", "first forward", "first step", "steps lost", "processes left"):
        table.add_column(column, justify="left" if column in ("fault", "") else "right")
    rows: dict[str, dict[str, Any]] = {}
    lacking = hosts.missing()
    if lacking and arguments.fault == "partition":
        parser.error(f"--fault partition: {lacking}")
    for fault in (arguments.fault,) if arguments.fault else FAULTS:
        if lacking and fault == "partition":
            print(f"left out: partition: {lacking}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="dualpipe-recovery-") as folder:
            samples = measure(fault, arguments.rounds, Path(folder))
        rows[fault] = {name: _middle(of) for name, of in samples.items()}
        for name, row in rows[fault].items():
            times = [f"{row[key]:.2f}" for key in ("noticed", "forward", "back")]
            table.add_row(fault, name, *times, str(row["lost"]), str(row["left"]))
    if arguments.json:
        print(json.dumps(rows))
    else:
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
