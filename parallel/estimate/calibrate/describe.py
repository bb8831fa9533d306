"""From what ranks measured to the description of a cluster: rates, fixed parts, and where each value is from.

A phase takes its products, its core, a fixed part and bytes over a rate. Products and core are measured alone; from
what remains of the phase at two numbers of tokens follow the other two. Where an exchange takes longer than its bytes
over the links, the rest is its wait.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

from dualpipe.overlap import Part
from dualpipe.program import Op
from parallel.estimate.calibrate import links
from parallel.estimate.calibrate.kineto import KinetoTrace
from parallel.estimate.calibrate.products import DTYPES, peaks
from parallel.estimate.calibrate.ranks import Measured
from parallel.estimate.hardware import Cluster, ClusterError, Gemm
from parallel.estimate.operations import PHASES, SMALL, Operations
from parallel.estimate.workload import Workload

_EXCHANGES = ("dispatch_forward", "combine_forward", "dispatch_backward", "combine_backward")

Description = dict[str, Any]


def describe(
    measured: Measured,
    workload: Workload,
    base: Cluster,
    source: str,
    machine: Mapping[str, tuple[float, str]],
    own_peaks: bool,
) -> Description:
    """The mapping that a cluster's file holds. ``machine``: keys that were read and not measured, with their sources;
    what nobody knows is as in ``base``, the peaks too unless ``own_peaks``: then they are the best rates measured.

    Raises ClusterError for peaks that were passed.
    """
    entry = f"measured: {source}"
    numbers: dict[str, float] = {}
    core = _core_rates(measured, workload)
    best = peaks(measured.products)
    best[workload.precision] = max(best[workload.precision], *core)
    if own_peaks:
        numbers |= {f"{name}_tflops": best[name] / 1e12 for name in DTYPES}
    else:
        best = _known_peaks(best, base)
    numbers["attention_forward_efficiency"] = core[0] / best[workload.precision]
    numbers["attention_backward_efficiency"] = core[1] / best[workload.precision]
    points = [
        [
            product.kind,
            product.m,
            product.n,
            product.k,
            _rounded(_efficiency(product.operations / each, product.kind, best)),
        ]
        for product, each in sorted(measured.products.items())
    ]
    numbers |= _link_numbers(measured)
    if measured.idle is not None:
        numbers["cores_busy"] = 1 - measured.idle
    description = {
        **{key: {"value": value, "source": of} for key, (value, of) in machine.items()},
        **{key: {"value": _rounded(value), "source": entry} for key, value in numbers.items()},
        "gemm": {"source": entry, "points": points} if own_peaks else _gemm(points, base, entry),
    }
    bare = _bare(base, description)
    for key, value in {**_phase_numbers(measured, workload, bare), **_waits(measured, workload, bare)}.items():
        description[key] = {"value": _rounded(value), "source": entry}
    return {"like": base.name, **description}


def _known_peaks(best: Mapping[str, float], base: Cluster) -> dict[str, float]:
    known: dict[str, float] = {name: getattr(base, f"{name}_tflops") * 1e12 for name in best}
    for name, rate in best.items():
        if rate > known[name]:
            raise ClusterError(
                f"cluster {base.name}: {name}_tflops={known[name] / 1e12:g} is below the {rate / 1e12:.4g} measured "
                "here: name the description of this device with --cluster"
            )
    return known


def _efficiency(rate: float, kind: str, best: Mapping[str, float]) -> float:
    return rate / best[kind.partition("_")[0]]


def _core_rates(measured: Measured, workload: Workload) -> tuple[float, float]:
    """Operations a second, as ``Operations.core`` counts them."""
    c = workload.model
    heads = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    operations = 1.0 * workload.tokens * workload.sequence_length * heads
    forward, backward = measured.core
    return operations / forward, 2.5 * operations / backward


def _link_numbers(measured: Measured) -> dict[str, float]:
    """One way inside a node is half of what vendors count."""
    numbers: dict[str, float] = {}
    if not measured.links:
        return numbers
    near, far = (links.fitted(*measured.links[distance][:2]) for distance in (min(measured.links), max(measured.links)))
    numbers |= {"nvlink_gb_per_s": 2 * near.bytes_per_s / 1e9, "nvlink_efficiency": 1.0}
    numbers |= {"ib_gb_per_s": far.bytes_per_s / 1e9, "ib_efficiency": 1.0, "latency_us": far.latency_s * 1e6}
    numbers |= {f"{name}_link": 1.0 for name in _EXCHANGES}
    if measured.reduction is not None:
        passed = 2 * links.LARGE_BYTES  # summed, then gathered; a plan counts (n-1)/n of each
        rate = passed / measured.reduction
        numbers["reduce_link"] = min(rate / near.bytes_per_s, 1.0)
    return numbers


def _bare(base: Cluster, description: Description) -> Cluster:
    """The description so far, with phases that take no more than their products and core, and no waits."""
    changes: dict[str, Any] = {key: entry["value"] for key, entry in description.items() if key != "gemm"}
    changes |= {f"{name}_us": 0.0 for name in PHASES.values()}
    changes |= {f"{PHASES[part]}_memory": 1.0 for part in SMALL}
    changes |= {f"{name}_skew_us": 0.0 for name in _EXCHANGES}
    changes |= {"memory_gb_per_s": 1e12, "memory_efficiency": 1.0, "end_us": 0.0, "cores_per_node": 0}
    changes["communication_multiprocessors"] = description.get("communication_multiprocessors", {"value": 0})["value"]
    return replace(base, **changes, gemm=tuple(Gemm(*point) for point in description["gemm"]["points"]))


def _phase_numbers(measured: Measured, workload: Workload, bare: Cluster) -> dict[str, float]:
    """Rates of memory as fractions of the best one, and fixed parts."""
    rates: dict[str, float] = {}
    numbers: dict[str, float] = {}
    for part, name in PHASES.items():
        remaining = {tokens: _remaining(measured, workload, bare, tokens, part) for tokens in measured.phases}
        sizes = _small_bytes(measured, workload, bare, part)
        fixed, rate = _line(sizes, remaining)
        numbers[f"{name}_us"] = fixed * 1e6
        if part in SMALL:
            rates[f"{name}_memory"] = rate if sizes else measured.optimizer_bytes_per_s
    rates["memory_efficiency"] = measured.optimizer_bytes_per_s
    best = max(rates.values())
    head = Operations(workload, replace(bare, memory_gb_per_s=measured.optimizer_bytes_per_s / 1e9)).head()
    ends = sum(measured.head) - sum(head)
    return {
        "memory_gb_per_s": best / 1e9,
        **{key: rate / best for key, rate in rates.items()},
        **numbers,
        "end_us": max(ends / 2, 0.0) * 1e6,
    }


def _remaining(measured: Measured, workload: Workload, bare: Cluster, tokens: int, part: Part) -> float:
    """Seconds of a phase beside its products and core. What a local exchange does stands beside the MLP."""
    took = measured.phases[tokens]
    seconds = took[part]
    phase, op = part
    if phase.value == "mlp" and op is not Op.BACKWARD_WEIGHT:
        seconds += sum(
            each for (other, way), each in took.items() if way is op and other.value in ("dispatch", "combine")
        )
    return seconds - _at(workload, bare, tokens).layer(True)[part]


def _small_bytes(measured: Measured, workload: Workload, bare: Cluster, part: Part) -> dict[int, float]:
    """By tokens; empty for a phase that moves none."""
    if part not in SMALL:
        return {}
    sizes = {tokens: _at(workload, bare, tokens).small_bytes(part, True) for tokens in measured.phases}
    return sizes if all(sizes.values()) else {}


def _at(workload: Workload, bare: Cluster, tokens: int) -> Operations:
    """The workload's operations with micro-batches of so many tokens, all experts on every rank."""
    alone = replace(workload.layout, data=workload.layout.data, expert=1)
    length = tokens // workload.micro_batch_size
    return Operations(replace(workload, layout=alone, imbalance=1.0, sequence_length=length), bare)


def _line(sizes: Mapping[int, float], seconds: Mapping[int, float]) -> tuple[float, float]:
    """(fixed seconds, bytes a second) through two points; a part that would be negative is nought, and where nothing
    remains beside the products, the bytes take the smallest time that can be told."""
    (few, many), least = sorted(seconds), 1e-9
    if not sizes:
        return max(seconds[many], 0.0), math.inf
    slope = (seconds[many] - seconds[few]) / (sizes[many] - sizes[few])
    fixed = seconds[many] - slope * sizes[many]
    if fixed < 0:
        fixed, slope = 0.0, seconds[many] / sizes[many]
    if slope <= 0:
        fixed, slope = max(seconds[many] - least, 0.0), least / sizes[many]
    return fixed, 1 / slope


def _waits(measured: Measured, workload: Workload, bare: Cluster) -> dict[str, float]:
    """Half of what an exchange takes beyond its bytes for each of its two ways."""
    if measured.exchanged is None:
        return {}
    operations = Operations(workload, replace(bare, latency_us=0.0))
    waits = {}
    for op, seconds in zip((Op.FORWARD, Op.BACKWARD_INPUT), measured.exchanged, strict=True):
        parts = [part for part in operations.layer(True) if part[1] is op and part[0].value in ("dispatch", "combine")]
        over = max(seconds - sum(operations.exchange(part) for part in parts), 0.0) / 2
        for phase, _ in parts:
            way = "forward" if op is Op.FORWARD else "backward"
            waits[f"{phase.value}_{way}_skew_us"] = max(over - bare.latency_us * 1e-6, 0.0) * 1e6
    return waits


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def describe_trace(trace: KinetoTrace, base: Cluster, source: str) -> Description:
    """The mapping for what a profiler's trace says; the rest is as in ``base``, on a GPU the peaks too. Raises
    ClusterError for peaks that were passed."""
    entry = f"measured: {source}"
    seconds = trace.product_seconds()
    best: dict[str, float] = {}
    for (kind, m, n, k), each in seconds.items():
        name = kind.partition("_")[0]
        best[name] = max(best.get(name, 0.0), 2.0 * m * n * k / each)
    cores = {
        f"attention_{way}_efficiency": median(operations / each for operations, each in found)
        for way, found in zip(("forward", "backward"), trace.core, strict=True)
        if found
    }
    widest = "bf16" if "bf16" in best else "fp32"  # the core runs in it, and its efficiency is a fraction of its peak
    best[widest] = max([best.get(widest, 0.0), *cores.values()])
    numbers: dict[str, float] = {}
    if trace.on_gpu:
        best = _known_peaks(best, base)
    else:
        numbers |= {f"{name}_tflops": rate / 1e12 for name, rate in best.items()}
    numbers |= {key: rate / best[widest] for key, rate in cores.items()}
    if trace.copies:
        rate = median(size / each for size, each in trace.copies)
        known = base.memory_gb_per_s * 1e9 if trace.on_gpu else rate
        numbers |= {"memory_gb_per_s": known / 1e9, "memory_efficiency": min(rate / known, 1.0)}
    numbers |= _rates_of_messages(trace, base)
    points = [
        [kind, m, n, k, _rounded(2.0 * m * n * k / each / best[kind.partition("_")[0]])]
        for (kind, m, n, k), each in sorted(seconds.items())
    ]
    return {
        "like": base.name,
        **{key: {"value": _rounded(value), "source": entry} for key, value in numbers.items()},
        "gemm": _gemm(points, base, entry),
    }


def _gemm(points: list[list[Any]], base: Cluster, entry: str) -> dict[str, Any]:
    """The measured points, and those of ``base`` for kinds that were not measured."""
    measured = {point[0] for point in points}
    others = [list(point) for point in base.gemm if point.kind not in measured]
    kept = f"; kinds that were not, as {base.name}" if others else ""
    return {"source": entry + kept, "points": points + others}


def _rates_of_messages(trace: KinetoTrace, base: Cluster) -> dict[str, float]:
    """A group no larger than a node has its messages inside it; what a rank sends, over the time that it takes."""
    inside, between = (
        [m.size / m.seconds for m in trace.messages if (m.peers <= base.ranks_per_node) is near]
        for near in (True, False)
    )
    numbers = {}
    if inside:
        numbers["nvlink_efficiency"] = min(median(inside) / (base.nvlink_gb_per_s / 2 * 1e9), 1.0)
    if between:
        numbers["ib_efficiency"] = min(median(between) / (base.ib_gb_per_s * 1e9), 1.0)
    return numbers
