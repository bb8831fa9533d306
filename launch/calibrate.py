"""``dualpipe plan CONFIG --calibrate FILE``: measure this machine, and write the description of a cluster.

    dualpipe plan configs/tiny-cpu.yaml --calibrate here.yaml
    dualpipe plan configs/deepseek-v3.yaml --cluster h800 --calibrate here.yaml --trace profile.json
    torchrun --nnodes 4 --nproc-per-node 8 ... -m launch.plan configs/X.yaml --cluster h100 --calibrate here.yaml

With ``--trace`` nothing is run: the rates are those of a profiler's trace. Otherwise every rank measures the operations
of the configuration while all the others measure the same: as many ranks as the layout has, started here, or those that
torchrun started.
"""

import logging
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch.distributed.launcher.api import elastic_launch

from launch import rank, train
from launch.attempts import rendezvous_alone
from launch.command import UsageError
from launch.config import Config
from launch.local import launch_config
from launch.whole_file import check_whole, write_whole
from parallel.cores import own_cores
from parallel.estimate.calibrate import kineto
from parallel.estimate.calibrate.describe import Description, describe, describe_trace
from parallel.estimate.calibrate.products import DTYPES, measured_products
from parallel.estimate.calibrate.ranks import ROUNDS, Measured, measure
from parallel.estimate.hardware import Cluster
from parallel.estimate.workload import Workload

CPU_OPERATIONS = 2e12
"""What the products of a configuration may come to on a CPU: beyond, measuring them takes minutes each time."""


def calibrate(config: Config, workload: Workload, base: Cluster, path: Path) -> str | None:
    """Measure, write ``path``, and return what is to be printed; None on a rank of torchrun that has nothing to say.
    ``base`` describes what is not measured. Raises UsageError."""
    if workload.precision not in DTYPES:
        raise UsageError(
            f"precision={workload.precision} must be one of {', '.join(DTYPES)} with --calibrate, which measures no "
            f"FP8 products: --what-if precision=bf16 measures all else, on GPUs FP8 is then as in {base.name}"
        )
    if "RANK" in os.environ:
        here = rank.place(os.environ)
        if here.rank == 0:
            _check_path(path)
        measured, device = measure_as_rank(config, workload, base, here)
        world, local = here.world_size, here.local_world_size
        if here.rank:
            return None
    else:
        world = local = _local_ranks(config)
        device = rank.device_of(config, rank.Place(0, world, 0, local))
        _check_size(workload, base, device)
        _check_path(path)
        measured = measure_here(config, workload, base, world)
    description = description_of(measured, workload, base, device, world, local)
    _write(path, _text(description, f"`dualpipe plan --calibrate` with {world} ranks"))
    return "\n".join([f"wrote {path}: dualpipe plan CONFIG --cluster {path} plans with it", *_said(measured)])


def calibrate_from(trace: Path, base: Cluster, path: Path) -> str:
    """Read a profiler's trace, write ``path``, and return what is to be printed. Raises ValueErrors of one line."""
    found = kineto.read(trace)
    description = describe_trace(found, base, f"the trace {trace.name}")
    _write(path, _text(description, f"`dualpipe plan --trace {trace.name}`"))
    core = sum(len(each) for each in found.core)
    return (
        f"wrote {path}: {len(found.product_seconds())} shapes of products, {core} attention cores, "
        f"{len(found.copies)} long copies and {len(found.messages)} long messages of {trace}"
    )


def measure_here(config: Config, workload: Workload, base: Cluster, ranks: int, rounds: int = ROUNDS) -> Measured:
    """Start ``ranks`` processes on this machine and measure in all of them at once."""
    multiprocessing.set_forkserver_preload(["launch.calibrate"])
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what torch's launcher logs, the ranks' own error says better
    try:
        with tempfile.TemporaryDirectory(prefix="dualpipe-", ignore_cleanup_errors=True) as scratch:
            launch = launch_config(rendezvous_alone(), ranks, scratch)
            answers: dict[int, Measured] = elastic_launch(launch, _as_rank)(config, workload, base, rounds)
    finally:
        logging.disable(before)
    return answers[0]


def _as_rank(config: Config, workload: Workload, base: Cluster, rounds: int) -> Measured:
    return measure_as_rank(config, workload, base, rank.place(os.environ), rounds)[0]


def measure_as_rank(
    config: Config, workload: Workload, base: Cluster, here: rank.Place, rounds: int = ROUNDS
) -> tuple[Measured, torch.device]:
    """What this rank and its peers measured, and on what."""
    device = rank.device_of(config, here)
    one_thread = replace(config, train=replace(config.train, threads=1))
    rank.prepare(one_thread, here, device)
    measured = measure(workload, base, device, here.local_world_size, rounds)
    rank.leave()
    return measured, device


def description_of(
    measured: Measured, workload: Workload, base: Cluster, device: torch.device, world: int, local: int
) -> Description:
    """The mapping of the cluster's file. ``local``: ranks on a node."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    ranks = f"{world} rank{'s' if world > 1 else ''} at once"
    source = f"dualpipe plan --calibrate on {name}, {ranks}"
    read = f"derived: read from the machine ({name})"
    machine: dict[str, tuple[float, str]] = {"ranks_per_node": (float(local), read)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["memory_gb"] = round(properties.total_memory / 1e9, 1), read
        machine["multiprocessors"] = float(properties.multi_processor_count), read
        return describe(measured, workload, base, source, machine, own_peaks=False)
    machine["memory_gb"] = round(psutil.virtual_memory().total / local / 1e9, 3), f"{read}, shared by {local} ranks"
    machine["cores_per_node"] = float(len(own_cores())), read
    machine["multiprocessors"] = 1.0, "derived: a rank computes on one core at a time"
    machine["communication_multiprocessors"] = 0.0, "derived: communication is work of the same cores"
    machine["computing_busy"] = 1.0, "derived: gaps between operators are in the fixed parts"
    machine["fp8_tflops"] = 0.0, "derived: a CPU has no FP8 products"
    machine["dollars_per_gpu_hour"] = 0.0, "assumed: a machine of one's own"
    return describe(measured, workload, base, source, machine, own_peaks=True)


def _local_ranks(config: Config) -> int:
    world, most = config.layout.world_size, train.most_local_ranks()
    if world > most:
        raise UsageError(
            f"--calibrate starts every rank of the layout here, and {world} are more than {most}: start them with "
            "torchrun, or give a smaller layout"
        )
    return world


def _check_size(workload: Workload, base: Cluster, device: torch.device) -> None:
    operations = sum(product.operations for product in measured_products(workload, base))
    if device.type == "cpu" and operations > CPU_OPERATIONS:
        raise UsageError(
            f"--calibrate measures the products of its configuration, and {operations / 1e12:.3g} TFLOP of them are "
            f"too many for a CPU (at most {CPU_OPERATIONS / 1e12:g}): give one that this machine trains"
        )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {len(own_cores())} cores"


def _check_path(path: Path) -> None:
    """Measuring takes a while: what could not be written is refused before."""
    with _writing(path):
        check_whole(path)


def _write(path: Path, text: str) -> None:
    with _writing(path):
        write_whole(path, text)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"--calibrate {path} cannot be written: {error.strerror}") from None


def _text(description: Description, by: str) -> str:
    """YAML, a line for each key and for each product."""
    lines = [
        f"# Measured by {by}; keys: parallel/estimate/hardware.py.",
        f"like: {description['like']}",
    ]
    for key, entry in description.items():
        if isinstance(entry, dict) and "value" in entry:
            lines.append(f"{key}: {_inline(entry)}")
    gemm: dict[str, Any] = description["gemm"]
    lines += ["gemm:", f"  source: {_inline(gemm['source'])}", "  points:"]
    lines += [f"    - {_inline(point)}" for point in gemm["points"]]
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _said(measured: Measured) -> Sequence[str]:
    """What a person should know beside the file."""
    said = []
    if measured.alone is not None:
        said.append(f"a layer on one rank alone takes {measured.alone:.2f} of what it takes while all ranks are busy")
    for what, ranks in measured.slow.items():
        if ranks:
            said.append(f"slow at {what}: rank {', '.join(map(str, ranks))}")
    return said
