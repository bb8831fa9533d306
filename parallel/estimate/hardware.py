"""A cluster as data: rates, sizes and prices, each with the source of its value.

A description is a mapping of the fields of ``Cluster`` to ``{value: NUMBER, source: TEXT}``, and under ``gemm`` the
measured matrix products, as ``{source: TEXT, points: [[KIND, m, n, k, efficiency], ...]}``. Efficiencies are fractions
of a peak rate: of the multiprocessors that compute, of the memory, or of a link.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

KINDS = tuple(
    f"{precision}{grouped}{wgrad}"
    for precision in ("fp8", "bf16", "fp32")
    for grouped in ("", "_grouped")
    for wgrad in ("", "_wgrad")
)
"""Shape classes of matrix products: format, whether grouped by expert, and weight gradients (summed over tokens)."""

WHAT_IF = {"nvlink": "nvlink_gb_per_s", "ib": "ib_gb_per_s"}
"""Short names of the two links."""


class ClusterError(ValueError):
    """A description of hardware that makes no sense; one line with the key, the value and the rule."""


class Gemm(NamedTuple):
    """A measured product [m, k] x [k, n]. ``efficiency``: of the format's peak on the multiprocessors it ran on."""

    kind: str
    m: int
    n: int
    k: int
    efficiency: float


@dataclass(frozen=True)
class Cluster:
    """Units are in the names; decimal prefixes. Rates are those of one GPU. Raises ClusterError."""

    name: str
    bf16_tflops: float
    """Peak of dense products, as all the following."""
    fp8_tflops: float
    """0: the device has no FP8."""
    fp32_tflops: float
    multiprocessors: float
    communication_multiprocessors: float
    """Those that expert dispatch and combine occupy while a pipeline runs, and products do without."""
    memory_gb: float
    usable_memory: float
    """Fraction of the memory that tensors can have: the rest is the context, communication buffers and fragments."""
    memory_gb_per_s: float
    memory_efficiency: float
    """Fraction of the memory's rate that long, fused kernels reach: optimizer, loss."""
    attn_forward_us: float
    """What a phase takes whatever its sizes: the operators' own overhead, where it is not hidden behind a device."""
    attn_backward_us: float
    attn_weight_us: float
    mlp_forward_us: float
    mlp_backward_us: float
    mlp_weight_us: float
    end_us: float
    """The same for a pass of the embedding or of the head."""
    ranks_per_node: float
    cores_per_node: float
    """Cores that the ranks of a node share, each of them one core's worth at a time; all other rates are then those of
    one core while all are busy, and communication is work of theirs. 0: every rank has a device of its own."""
    cores_busy: float
    """Fraction of the cores' time that ranks use while they outnumber them: ranks that wait for each other's messages
    leave a core idle now and then while two of them are ready on another one."""
    nvlink_gb_per_s: float
    """Inside a node, both ways together, as vendors count it."""
    nvlink_efficiency: float
    reduce_link: float
    """Fraction of a link's rate that reductions and gatherings reach."""
    ib_gb_per_s: float
    """Between nodes, one way, for each GPU."""
    ib_efficiency: float
    latency_us: float
    """Of one message between two ranks."""
    attention_forward_efficiency: float
    """The causal core, of the BF16 peak; half of the score matrix counts."""
    attention_backward_efficiency: float
    """The same for 2.5 times the operations of the forward."""
    attn_forward_memory: float
    """Fraction of the memory's rate that the small kernels of this phase reach, gaps between them included."""
    attn_backward_memory: float
    mlp_forward_memory: float
    mlp_backward_memory: float
    mlp_weight_memory: float
    computing_busy: float
    """Fraction of a computing phase in which a kernel runs; in the gaps nothing hides communication."""
    dispatch_forward_link: float
    """Fraction of the link's rate that this all-to-all reaches."""
    combine_forward_link: float
    dispatch_backward_link: float
    combine_backward_link: float
    dispatch_forward_skew_us: float
    """Mean wait of a rank for its peers at this all-to-all."""
    combine_forward_skew_us: float
    dispatch_backward_skew_us: float
    combine_backward_skew_us: float
    skew_variation: float
    """Standard deviation of such a wait over its mean, from layer to layer."""
    dollars_per_gpu_hour: float
    gpu_hours_between_failures: float
    """Of one GPU and its share of everything else that can end the job."""
    detection_seconds: float
    restart_seconds: float
    """From the detection to the first step after it, the loading of the checkpoint included."""
    checkpoint_seconds: float
    """How long a checkpoint holds up training."""
    gemm: tuple[Gemm, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where each value is from."""

    def __post_init__(self) -> None:
        for key in numbers():
            value = getattr(self, key)
            if not 0 <= value < math.inf or (value == 0 and key not in _MAY_BE_ZERO):
                raise ClusterError(f"cluster {self.name}: {key}={value:g} must be finite and above 0")
            if key.endswith(("_efficiency", "_memory", "_link", "_busy")) and value > 1:
                raise ClusterError(f"cluster {self.name}: {key}={value:g} must be a fraction, at most 1")
        for key in ("ranks_per_node", "cores_per_node"):
            if (value := getattr(self, key)) != int(value):
                raise ClusterError(f"cluster {self.name}: {key}={value:g} must be a whole number")
        if self.communication_multiprocessors >= self.multiprocessors:
            raise ClusterError(
                f"cluster {self.name}: communication_multiprocessors={self.communication_multiprocessors:g} must be "
                f"below multiprocessors ({self.multiprocessors:g})"
            )
        for point in self.gemm:
            if point.kind not in KINDS or min(point[1:4]) < 1 or not 0 < point.efficiency <= 1:
                rule = f"must be [KIND, m, n, k, efficiency], KIND one of {', '.join(KINDS)}, efficiency a fraction"
                raise ClusterError(f"cluster {self.name}: gemm point {list(point)} {rule}")

    @cached_property
    def _points(self) -> Mapping[str, list[Gemm]]:
        """The measured products by kind."""
        points: dict[str, list[Gemm]] = {}
        for point in self.gemm:
            points.setdefault(point.kind, []).append(point)
        return points

    def knows(self, kind: str) -> bool:
        """Whether products of this kind were measured."""
        return kind in self._points

    @property
    def shares_cores(self) -> bool:
        return self.cores_per_node > 0

    @property
    def nvlink_one_way(self) -> float:
        """Bytes a second that a rank gets into its node."""
        return self.nvlink_gb_per_s / 2 * 1e9 * self.nvlink_efficiency

    @property
    def ib_one_way(self) -> float:
        """Bytes a second that a rank gets to other nodes, in long messages."""
        return self.ib_gb_per_s * 1e9 * self.ib_efficiency

    @property
    def computing_share(self) -> float:
        """Of the multiprocessors, those that products have while a pipeline runs."""
        return 1 - self.communication_multiprocessors / self.multiprocessors

    def efficiency(self, kind: str, m: int, n: int, k: int) -> float:
        """Of a product, from the measured ones of its kind: the mean weighted with 1 / distance² in log2 of the three
        sizes, and a measured shape's own value. Raises ClusterError where the kind was never measured."""
        total = weight = 0.0
        for point in self._points.get(kind, ()):
            distance = sum(math.log2(a / b) ** 2 for a, b in zip((m, n, k), point[1:4], strict=True))
            if distance == 0:
                return point.efficiency
            total, weight = total + point.efficiency / distance, weight + 1 / distance
        if not weight:
            raise ClusterError(f"cluster {self.name}: gemm has no point of kind {kind}, so its rate is not known")
        return total / weight


_MAY_BE_ZERO = {
    "fp8_tflops",
    "fp32_tflops",
    "communication_multiprocessors",
    "cores_per_node",
    "latency_us",
    "end_us",
    *(f"{phase}_{way}_us" for phase in ("attn", "mlp") for way in ("forward", "backward", "weight")),
    "detection_seconds",
    "restart_seconds",
    "checkpoint_seconds",
    "dollars_per_gpu_hour",
    "skew_variation",
    *(f"{phase}_{way}_skew_us" for phase in ("dispatch", "combine") for way in ("forward", "backward")),
}


def numbers() -> list[str]:
    """The fields of a cluster that are numbers."""
    return [f.name for f in fields(Cluster) if f.name not in ("name", "gemm", "sources")]


def from_mapping(name: str, values: Mapping[str, Any], base: Cluster | None = None) -> Cluster:
    """A cluster from a description. What it leaves out is as in ``base``, and so marked. Raises ClusterError."""
    known = numbers()
    for key in values:
        if key not in (*known, "gemm"):
            raise ClusterError(f"cluster {name}: {_unknown(str(key), [*known, 'gemm'])}")
    numeric: dict[str, float] = {}
    sources: dict[str, str] = {}
    for key in known:
        if key in values:
            numeric[key], sources[key] = _entry(name, key, values[key])
        elif base is not None:
            numeric[key], sources[key] = getattr(base, key), f"assumed, as {base.name}: {base.sources[key]}"
        else:
            raise ClusterError(f"cluster {name}: {key} is missing")
    points = () if base is None else base.gemm
    sources["gemm"] = "" if base is None else f"assumed, as {base.name}: {base.sources['gemm']}"
    if "gemm" in values:
        points, sources["gemm"] = _gemm(name, values["gemm"])
    return Cluster(name=name, gemm=points, sources=sources, **numeric)


def changed(cluster: Cluster, key: str, text: str) -> Cluster:
    """The cluster with another value under a key or a short name of a link. Raises ClusterError."""
    key = WHAT_IF.get(key, key)
    if key not in numbers():
        raise ClusterError(f"what-if {_unknown(key, [*WHAT_IF, *numbers()])}")
    try:
        value = float(text)
    except ValueError:
        raise ClusterError(f"what-if {key}={text} must be a number, in the unit of its name") from None
    changes: dict[str, Any] = {key: value, "sources": {**cluster.sources, key: "given as what-if"}}
    return replace(cluster, **changes)


def _entry(cluster: str, key: str, entry: Any) -> tuple[float, str]:
    """The value and the source of one key."""
    if not isinstance(entry, Mapping) or set(entry) != {"value", "source"}:
        raise ClusterError(f"cluster {cluster}: {key} must be {{value: NUMBER, source: TEXT}}, not {entry!r}")
    value, source = entry["value"], entry["source"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClusterError(f"cluster {cluster}: {key}={value!r} must be a number, in the unit of its name")
    if not isinstance(source, str) or not source.strip():
        raise ClusterError(f"cluster {cluster}: {key} must say where its value is from: source={source!r}")
    return float(value), source


def _gemm(cluster: str, entry: Any) -> tuple[tuple[Gemm, ...], str]:
    shape = "{source: TEXT, points: [[KIND, m, n, k, efficiency], ...]}"
    if not isinstance(entry, Mapping) or set(entry) != {"points", "source"} or not isinstance(entry["points"], list):
        raise ClusterError(f"cluster {cluster}: gemm must be {shape}")
    points = []
    for row in entry["points"]:
        whole = isinstance(row, list) and len(row) == 5 and all(type(size) is int for size in row[1:4])
        if not whole or not isinstance(row[0], str) or type(row[4]) not in (int, float):
            raise ClusterError(f"cluster {cluster}: gemm point {row!r} must be as in {shape}")
        points.append(Gemm(*row))
    return tuple(points), str(entry["source"])


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; the nearest is {near[0]}" if near else f"; the keys are {', '.join(known)}"
    return f"{key} is not a key of a cluster{hint}"
