"""Whether ``dualpipe plan`` knows this machine: predicted against measured step times of four layouts, in one run.

    python -m benchmarks.plan [--rounds 4] [--json]

The operations of configs/tiny-cpu.yaml are measured (``dualpipe plan --calibrate``) on as many ranks as a layout has:
what a rank's share of a core does depends on how many share it. The steps are those of the runtime's worker, on random
tokens, one thread a rank; the first ones, in which heaps still grow, are not counted. No layout's step enters any
prediction.

A machine is faster in one minute than in the next. So calibrations and the layouts' steps take turns, the median of
the predictions stands beside the median of the steps.

On a machine that is not idle the wall time of a step says more about the neighbours; CPU time, summed over the ranks,
does not count them. Both are predicted.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.pipeline_overhead import CONFIG, Usage, started
from launch.calibrate import description_of, measure_here
from launch.config import Config, load
from launch.plan import read_cluster, workload_of
from parallel.estimate.hardware import Cluster, from_mapping
from parallel.estimate.plan import Plan, Run, make_plan

LAYOUTS: dict[str, list[str]] = {
    "dualpipe 4 x 2, expert 2": [],
    "1f1b 2 x 2, expert 2, micro-batch 1": [
        "schedule.name=1f1b",
        "layout.pipeline=2",
        "train.micro_batch_size=1",
        "train.global_batch_size=16",
    ],
    "zb1p 4 x 1": ["schedule.name=zb1p", "layout.data=1", "layout.expert=1", "train.global_batch_size=16"],
    "1f1b 1 x 4, expert 2": [
        "schedule.name=1f1b",
        "layout.pipeline=1",
        "layout.data=4",
        "train.global_batch_size=16",
    ],
}
WITHIN = 0.15


@dataclass(frozen=True)
class Row:
    """Seconds of one step; CPU seconds are summed over the ranks."""

    layout: str
    predicted_s: float
    measured_s: float
    predicted_cpu_s: float
    measured_cpu_s: float

    @property
    def ratio(self) -> float:
        return self.predicted_s / self.measured_s

    @property
    def cpu_ratio(self) -> float:
        return self.predicted_cpu_s / self.measured_cpu_s


def compare(rounds: int) -> list[Row]:
    """Calibrations and steps in turns, a calibration first and last."""
    configs = {name: load(str(CONFIG), overrides) for name, overrides in LAYOUTS.items()}
    worlds = {config.layout.world_size for config in configs.values()}
    # The same layers, in as many stages as make that many ranks.
    usual = {world: load(str(CONFIG), [f"layout.pipeline={world // 2}"]) for world in worlds}
    clusters: dict[int, list[Cluster]] = {world: [] for world in worlds}
    usages: dict[str, list[Usage]] = {name: [] for name in configs}

    def calibrate() -> None:
        for world, config in usual.items():
            clusters[world].append(calibrated(config))

    with started([(config, 1) for config in configs.values()]) as groups:
        for group in groups:
            group.warm_up()
        for turn in range(rounds):
            calibrate()
            turns = list(zip(configs, groups, strict=True))
            for name, group in turns if turn % 2 else reversed(turns):
                usages[name].append(group.steps(1))
        calibrate()
    return [_row(name, config, clusters[config.layout.world_size], usages[name]) for name, config in configs.items()]


def calibrated(config: Config) -> Cluster:
    """This machine, as the ranks of a configuration find it."""
    workload, base = workload_of(config), read_cluster("h800")
    ranks = config.layout.world_size
    measured = measure_here(config, workload, base, ranks, rounds=1)
    description = description_of(measured, workload, base, torch.device("cpu"), ranks, ranks)
    description.pop("like")
    return from_mapping("here", description, base)


def _row(name: str, config: Config, clusters: Sequence[Cluster], used: Sequence[Usage]) -> Row:
    return Row(
        name,
        statistics.median(_plan(config, cluster).step_seconds for cluster in clusters),
        statistics.median(each.wall_s for each in used),
        statistics.median(_work(_plan(config, replace(cluster, cores_per_node=1e6))) for cluster in clusters),
        statistics.median(each.cpu_s for each in used),
    )


def _work(apart: Plan) -> float:
    """CPU seconds of all ranks, from a plan that gives each of them a core."""
    return sum(apart.step_seconds - rank.bubble_s for rank in apart.seconds) * apart.workload.layout.data


def _plan(config: Config, cluster: Cluster) -> Plan:
    return make_plan(workload_of(config), cluster, Run(1, None, 1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="measured steps of each layout")
    parser.add_argument("--json", action="store_true", help="print one JSON object; the table goes to stderr")
    options = parser.parse_args(arguments)
    rows = compare(options.rounds)
    table = Table(title="a step, predicted and measured")
    for column in ("layout", "predicted s", "measured s", "ratio", "predicted CPU s", "measured CPU s", "ratio"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for row in rows:
        walls = f"{row.predicted_s:.3f}", f"{row.measured_s:.3f}", f"{row.ratio:.3f}"
        table.add_row(
            row.layout, *walls, f"{row.predicted_cpu_s:.3f}", f"{row.measured_cpu_s:.3f}", f"{row.cpu_ratio:.3f}"
        )
    console = Console(stderr=options.json)
    console.print(table)
    worst = max(abs(row.ratio - 1) for row in rows)
    console.print(f"worst by wall time {worst:.1%}, by CPU time {max(abs(row.cpu_ratio - 1) for row in rows):.1%}")
    if options.json:
        print(json.dumps([{**row.__dict__, "ratio": row.ratio, "cpu_ratio": row.cpu_ratio} for row in rows]))
    return 0 if worst <= WITHIN else 1


if __name__ == "__main__":
    sys.exit(main())
