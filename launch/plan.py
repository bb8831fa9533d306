"""``dualpipe plan``: what a configuration costs on a described cluster, before anybody pays for it."""

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from launch import plan_phases, plan_table
from launch.command import Parser, UsageError, reported
from launch.config import Config, ConfigError, load
from launch.config_file import read
from parallel.estimate.fit import check
from parallel.estimate.hardware import WHAT_IF, Cluster, changed, from_mapping, numbers
from parallel.estimate.memory import active_parameters
from parallel.estimate.operations import Operations
from parallel.estimate.plan import Plan, Run, make_plan
from parallel.estimate.search import search
from parallel.estimate.spread import spread
from parallel.estimate.workload import PRECISIONS, Precision, Workload, recompute_of

CLUSTERS = Path(__file__).parents[1] / "configs" / "clusters"
DEFAULT_CLUSTER = "h800"

_EPILOG = f"""\
what-if, KEY=VALUE,...:
  cluster.gpu=h100            another cluster's description
  nvlink=900  ib=100          links: GB/s inside a node, both ways together; between nodes, one way, for each GPU
  memory_gb=141  ...          any other key of a cluster, as in configs/clusters
  precision                   of products: {", ".join(PRECISIONS)}; otherwise the configuration's
  recompute=norm+mla_up       what backward makes again (docs/recompute.md): some of norm+mla_up+swiglu, full, or none;
                              otherwise the configuration's model.recompute
  mtp=1                       multi-token-prediction modules; otherwise the configuration's
  imbalance=1.1               rows of the busiest expert-parallel rank over the mean

examples:
  dualpipe plan configs/deepseek-v3.yaml --what-if cluster.gpu=h200,recompute=norm
  dualpipe plan configs/deepseek-v3.yaml layout.expert=128 --what-if ib=25
  dualpipe plan configs/deepseek-v3.yaml --search --what-if precision=bf16
  dualpipe plan configs/deepseek-v3.yaml --phases configs/phases/deepseek-v3.yaml --what-if precision=fp8
  dualpipe plan configs/tiny-cpu.yaml --calibrate here.yaml
  dualpipe plan configs/tiny-cpu.yaml --cluster here.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one line on stderr when the arguments ask for what cannot be."""

    def command() -> None:
        args = _parser().parse_intermixed_args(argv)
        try:
            _check_options(args)
            kinds = ((args.calibrate, _calibrate), (args.phases, _phases), (args.search, _search))
            answer = next((answer for wanted, answer in kinds if wanted), _plan)
            if (text := answer(args)) is not None:
                print(text)
        except ConfigError:
            raise
        except ValueError as error:  # hardware, workload and memory name their own keys
            raise UsageError(str(error)) from None

    return reported(command)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together. Raises UsageError."""
    for option in ("cluster", "phases", "calibrate", "trace", "html"):
        if getattr(args, option) == "":
            raise UsageError(f"--{option} must not be empty")
    if args.trace and not args.calibrate:
        raise UsageError(f"--trace {args.trace} needs --calibrate FILE, the file that its rates go to")
    for option, others, why in (
        ("calibrate", ("phases", "search", "json", "html"), "what is measured is planned with later"),
        ("phases", ("search",), "the hours of a run are those of one layout"),
        ("html", ("phases", "search"), "a page is of one layout's step"),
        ("draws", ("calibrate", "phases", "search"), "drawn steps are those of one layout"),
    ):
        for other in others:
            if getattr(args, option) not in (None, False) and getattr(args, other):
                raise UsageError(f"{_given(args, option)} and {_given(args, other)} exclude each other: {why}")


def _given(args: argparse.Namespace, option: str) -> str:
    """An option as it was given."""
    value = getattr(args, option)
    return f"--{option}" if value is True else f"--{option} {value}"


def _plan(args: argparse.Namespace) -> str:
    """Plan one layout, write the page if asked for, and return what is to be printed."""
    workload, cluster, run = _inputs(args)
    plan = make_plan(workload, cluster, run)
    check(plan)
    if args.html:
        _write(args.html, plan)
    drawn = None if args.draws is None else spread(plan, args.draws)
    if args.json:
        return json.dumps({**plan.to_json(), **({"drawn_step_seconds": asdict(drawn)} if drawn else {})})
    return plan_table.report(plan) + (f"\n\n{plan_table.drawn(plan, drawn)}" if drawn else "")


def _calibrate(args: argparse.Namespace) -> str | None:
    from launch.calibrate import calibrate, calibrate_from  # needs torch

    workload, cluster, _ = _inputs(args)
    if args.trace:
        return calibrate_from(Path(args.trace), cluster, Path(args.calibrate))
    return calibrate(load(args.config, args.overrides), workload, cluster, Path(args.calibrate))


def _phases(args: argparse.Namespace) -> str:
    return plan_phases.answer(args.phases, *_inputs(args), as_json=args.json)


def _search(args: argparse.Namespace) -> str:
    workload, cluster, run = _inputs(args)
    # A ramp's small batches run in few of the layouts: all of them take the run's tokens in full batches.
    batch = workload.microbatches * workload.layout.data * workload.micro_batch_size
    found = search(workload, cluster, run.in_full_batches(batch))
    if not found.plans:
        raise UsageError(
            f"none of {found.tried} layouts of {workload.layout.world_size} GPUs fits on {cluster.name}: "
            f"{plan_table.named(found.smallest.workload)} needs least, "
            f"{found.smallest.memory_bytes / 1e9:.1f} of {cluster.memory_gb * cluster.usable_memory:.1f} GB"
        )
    if args.json:
        plans = [plan.to_json() for plan in found.plans]
        return json.dumps({"tried": found.tried, "feasible": len(found.candidates), "plans": plans})
    return plan_table.ranking(found)


@dataclass(frozen=True)
class _WhatIf:
    """What ``--what-if`` changes: the name of a cluster, its keys, and the workload's."""

    cluster: str | None
    hardware: Mapping[str, str]
    workload: Mapping[str, Any]


_OF_THE_WORKLOAD: dict[str, Callable[[str], Any]] = {
    "precision": str,
    "recompute": recompute_of,
    "mtp": int,
    "imbalance": float,
}


def _inputs(args: argparse.Namespace) -> tuple[Workload, Cluster, Run]:
    config = load(args.config, args.overrides)
    if config.schedule.program is not None:
        raise UsageError(
            f"schedule.program={config.schedule.program} must be null: plan compares schedules that it can make for "
            "other sizes; dualpipe simulate plays a program"
        )
    wanted = _what_if(args.what_if)
    if wanted.cluster is not None and args.cluster is not None:
        raise UsageError(f"--cluster {args.cluster} and cluster.gpu={wanted.cluster} in --what-if exclude each other")
    cluster = read_cluster(wanted.cluster or args.cluster or DEFAULT_CLUSTER)
    for key, text in wanted.hardware.items():
        cluster = changed(cluster, key, text)
    every = config.checkpoint.every or None
    workload = workload_of(config, wanted.workload)
    run = Run(config.train.steps, every, active_parameters(Operations(workload, cluster)), _ramp(config))
    return workload, cluster, run


def _ramp(config: Config) -> tuple[tuple[int, int], ...]:
    """(steps, sequences of each) of the run's levels below the full batch."""
    steps, levels = config.train.steps, config.values().batches.levels
    ends = [*(level.step for level in levels[1:]), steps]
    return tuple(
        (min(end, steps) - level.step, level.size)
        for level, end in zip(levels, ends, strict=True)
        if level.step < steps and level.size < config.train.global_batch_size
    )


def workload_of(config: Config, changes: Mapping[str, Any] = MappingProxyType({})) -> Workload:
    """What a configuration trains, with what ``--what-if`` changes of it."""
    workload = Workload(
        model=config.model,
        layout=config.layout,
        schedule=config.schedule.name,
        sequence_length=config.train.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        microbatches=config.microbatches,
        precision=cast(Precision, changes.get("precision", config.precision.compute)),
        moment_bytes={"fp32": 4, "bf16": 2}[config.optimizer.moments],
        chunks=config.schedule.chunks,
        mtp=config.model.num_nextn_predict_layers,
        hierarchical=config.dispatch.kind == "hierarchical",
        # A change of precision takes DeepSeek-V3's payload with it, unless the configuration says otherwise.
        fp8_payload=config.dispatch.payload != "plain",
    )
    workload = workload.recomputing(changes.get("recompute", config.model.recompute))
    return replace(workload, **{key: value for key, value in changes.items() if key in ("mtp", "imbalance")})


def _what_if(texts: Sequence[str]) -> _WhatIf:
    """From KEY=VALUE,..., each key once."""
    values: dict[str, str] = {}
    for part in (part for text in texts for part in text.split(",")):
        key, equals, value = (side.strip() for side in part.partition("="))
        if not key or not equals or not value:
            raise UsageError(f"--what-if {part!r} must have the form KEY=VALUE")
        name = WHAT_IF.get(key, key)
        if name in values:
            raise UsageError(f"--what-if {key} is given twice")
        values[name] = value
    known = ["cluster.gpu", *_OF_THE_WORKLOAD, *WHAT_IF, *numbers()]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; the nearest is {near[0]}" if near else f"; the keys are {', '.join(known)}"
            raise UsageError(f"--what-if {name} is not a key of a cluster or of the workload{hint}")
    cluster = values.pop("cluster.gpu", None)
    workload = {key: _number(key, values.pop(key)) for key in _OF_THE_WORKLOAD if key in values}
    return _WhatIf(cluster, values, workload)


def _number(key: str, text: str) -> Any:
    kind = _OF_THE_WORKLOAD[key]
    try:
        return kind(text)
    except ValueError as error:
        if kind is recompute_of:
            raise UsageError(f"--what-if {error}") from None
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"--what-if {key}={text} must be {wanted}") from None


def read_cluster(name: str, seen: tuple[str, ...] = ()) -> Cluster:
    """A description by its name in ``configs/clusters``, or the path of a .yaml file. Raises UsageError,
    ConfigError and ClusterError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CLUSTERS / f"{name}.yaml"
    if not name.endswith((".yaml", ".yml")) and not path.is_file():
        known = ", ".join(sorted(each.stem for each in CLUSTERS.glob("*.yaml")))
        raise UsageError(f"cluster {name} is not known: it must be one of {known}, or the path of a .yaml file")
    values = read(path, "cluster", "keys to {value: NUMBER, source: TEXT}")
    like = values.pop("like", None)
    if like is not None and (not isinstance(like, str) or like in (*seen, name)):
        raise UsageError(f"cluster {path}: like={like!r} must be the name of another cluster, without a circle")
    base = None if like is None else read_cluster(like, (*seen, name))
    return from_mapping(path.stem, values, base)


def _write(path: str, plan: Plan) -> None:
    from launch.plan_page import page

    try:
        Path(path).write_text(page(plan), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {path} cannot be written: {error.strerror}") from None


def _parser() -> Parser:
    parser = Parser(
        prog="dualpipe plan",
        description="Predict time, memory and price of a training run on a described cluster.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML configuration of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    parser.add_argument(
        "--cluster", metavar="NAME|FILE", help=f"in configs/clusters, or a .yaml file (default {DEFAULT_CLUSTER})"
    )
    parser.add_argument("--what-if", action="append", default=[], metavar="KEY=VALUE,...", help="see below")
    parser.add_argument("--search", action="store_true", help="rank all layouts of these GPUs that fit in memory")
    parser.add_argument(
        "--draws", type=int, metavar="N", help="simulate N steps with drawn waits and loads, and give an interval"
    )
    parser.add_argument("--phases", metavar="FILE", help="price a run of several phases, as configs/phases has them")
    parser.add_argument(
        "--calibrate", metavar="FILE", help="measure CONFIG's operations on this machine and write a cluster's file"
    )
    parser.add_argument(
        "--trace", metavar="TRACE", help="with --calibrate: take the rates from a torch.profiler trace instead"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="write timeline, memory and a roofline as a page")
    return parser


if __name__ == "__main__":
    import sys

    sys.exit(main())
