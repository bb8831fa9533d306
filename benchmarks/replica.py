"""What it costs to keep every rank's state in a peer's memory (``recovery.replicate_every``).

    python -m benchmarks.replica [CONFIG] [key.sub=value ...] [--pairs 10] [--json]

One run of CONFIG (configs/small-cpu.yaml) takes a snapshot after every second step, so that steps with one to copy and
send beside them and steps without take turns. Steps: medians of the wall clock, and their ratio, which a busy machine
spoils first. Waited: what STEP waited for the snapshot, at the end of forward and backward. CPU: of the thread that
copies, computes checksums and sends, in rank 0, beside what the median rank computes in a step. With
``replicate_every: 1`` every step is one with a snapshot. Bytes: what rank 0 sends for one, and what it holds, two
snapshots of its own and two of its peer's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.metrics import EventLog, read_jsonl

CONFIG = Path(__file__).parents[1] / "configs" / "small-cpu.yaml"
WARM_UP_STEPS = 2


def measure(config: Path, overrides: Sequence[str], pairs: int) -> dict[str, float]:
    """Medians over ``pairs`` of steps, seconds and bytes. Raises RuntimeError when the run fails."""
    with tempfile.TemporaryDirectory(prefix="dualpipe-replica-") as folder:
        run = Path(folder) / "run"
        own = [f"train.steps={WARM_UP_STEPS + 2 * pairs}", "recovery.max_restarts=1", "recovery.replicate_every=2"]
        quiet = ["checkpoint.every=0", "data.validation_sequences=0", f"run.dir={run}"]
        words = [sys.executable, "-m", "launch.cli", "train", str(config), *overrides, *own, *quiet, "--json"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the run ended with status {done.returncode}: {done.stderr}")
        events = EventLog(run / "events.jsonl").entries()
        held = next(event["bytes"] for event in events if event["event"] == "replica")
        ranks = next(event["world_size"] for event in events if event["event"] == "start")
        return _figures(read_jsonl(run / "metrics.jsonl")[WARM_UP_STEPS:], held, ranks)


def _figures(entries: Sequence[dict[str, Any]], held: int, ranks: int) -> dict[str, float]:
    """``held``: bytes that rank 0 holds of snapshots, its own and its peer's."""
    taken = [entry for entry in entries if entry["replica"]["bytes"]]
    rest = [entry for entry in entries if not entry["replica"]["bytes"]]
    computed = statistics.median(entry["compute"]["median_seconds"] for entry in rest)
    thread = statistics.median(entry["replica"]["cpu_seconds"] for entry in taken)
    with_one, without = (statistics.median(entry["step_seconds"] for entry in of) for of in (taken, rest))
    return {
        "ranks": ranks,
        "steps": len(entries),
        "step_seconds": without,
        "step_with_snapshot_seconds": with_one,
        "ratio": with_one / without,
        "waited_seconds": statistics.median(entry["replica"]["waited_seconds"] for entry in taken),
        "thread_cpu_seconds": thread,
        "thread_cpu_of_computing": thread / computed,
        "sent_bytes": taken[0]["replica"]["bytes"],
        "held_bytes": held,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replica", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG)
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--pairs", type=int, default=10, help="of a step with a snapshot beside it and one without")
    parser.add_argument("--json", action="store_true", help="print one object")
    arguments = parser.parse_intermixed_args(argv)
    found = measure(arguments.config, arguments.overrides, arguments.pairs)
    if arguments.json:
        print(json.dumps({"config": str(arguments.config), **found}))
        return 0
    print(f"{arguments.config}: {found['ranks']:.0f} ranks, {found['steps']:.0f} steps")
    print(
        f"  step without a snapshot {found['step_seconds']:.3f} s, with one {found['step_with_snapshot_seconds']:.3f} s"
    )
    print(f"  ratio {found['ratio']:.3f}; STEP waited {1e3 * found['waited_seconds']:.1f} ms")
    share = found["thread_cpu_of_computing"]
    print(f"  thread {1e3 * found['thread_cpu_seconds']:.1f} ms of CPU, {share:.1%} of what a rank computes")
    print(f"  rank 0 sends {found['sent_bytes'] / 1e6:.2f} MB a snapshot, holds {found['held_bytes'] / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
