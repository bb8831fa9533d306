"""A Chrome trace as torch's profiler (Kineto) writes it, read for what a cluster's description needs: matrix products
by shape, the attention core, long copies, and collectives.

An operator's shapes stand at its own event (``record_shapes=True``), which on a CPU has its duration too; on a GPU its
duration is that of the kernels that it launched, which name it by ``External id``. Collectives carry their sizes
themselves. A trace does not say what a product is for: one of two matrices counts for forward and for weight gradients.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

LONG_BYTES = 1 << 20
"""Copies and messages of fewer bytes say more about latency than about rates."""

FORMATS = {"float": ("fp32", 4), "c10::BFloat16": ("bf16", 2), "c10::Float8_e4m3fn": ("fp8", 1)}
_MESSAGE_BYTES = {"Float": 4, "BFloat16": 2, "Half": 2, "Byte": 1, "Int": 4, "Long": 8, "Double": 8}
_COPIES = ("aten::copy_", "aten::add", "aten::add_", "aten::mul", "aten::mul_")
_CORE = "scaled_dot_product"

Shape = tuple[str, int, int, int]
"""Kind, m, n, k of a product, as in a cluster's ``gemm`` points."""


class TraceFileError(ValueError):
    """Not a trace that says what is needed; one line with the file and the reason."""


@dataclass(frozen=True)
class Message:
    """One collective on one rank. ``peers``: ranks of its group."""

    peers: int
    size: float
    seconds: float


@dataclass
class KinetoTrace:
    """Seconds; medians are for the reader of it. ``core``: (operations, seconds) of causal cores, forward and backward;
    ``copies``: (bytes moved, seconds)."""

    products: dict[Shape, list[float]] = field(default_factory=lambda: defaultdict(list))
    core: tuple[list[tuple[float, float]], list[tuple[float, float]]] = field(default_factory=lambda: ([], []))
    copies: list[tuple[float, float]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    on_gpu: bool = False

    def product_seconds(self) -> dict[Shape, float]:
        return {shape: median(seconds) for shape, seconds in self.products.items()}


def read(path: Path) -> KinetoTrace:
    """A .json or .json.gz file. Raises TraceFileError."""
    try:
        raw = path.read_bytes()
        document = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except OSError as error:
        raise TraceFileError(f"trace {path} must be a readable file: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise TraceFileError(f"trace {path}: not a Chrome trace: {' '.join(str(error).split())}") from None
    events = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(events, list):
        raise TraceFileError(f"trace {path}: not a Chrome trace: it has no list traceEvents")
    trace = _collected([event for event in events if isinstance(event, dict) and event.get("ph") == "X"])
    if not trace.products:
        raise TraceFileError(
            f"trace {path} has no matrix product with its shapes: record it with torch.profiler and record_shapes=True"
        )
    return trace


def _collected(events: Sequence[dict[str, Any]]) -> KinetoTrace:
    kernels: defaultdict[Any, float] = defaultdict(float)
    trace = KinetoTrace()
    for event in events:
        if event.get("cat") == "kernel":
            trace.on_gpu = True
            kernels[_arguments(event).get("External id")] += float(event.get("dur", 0.0)) * 1e-6
    for event in events:
        about = _arguments(event)
        if event.get("cat") == "cpu_op":
            seconds = kernels.get(about.get("External id"), 0.0) if trace.on_gpu else float(event["dur"]) * 1e-6
            shapes = [shape for shape in about.get("Input Dims") or [] if isinstance(shape, list)]
            if seconds > 0 and shapes:
                _operator(trace, str(event.get("name")), shapes, about.get("Input type") or [], seconds)
        if "Collective name" in about and (event.get("cat") == "kernel" or not trace.on_gpu):
            trace.messages += _message(about, float(event.get("dur", 0.0)) * 1e-6)
    return trace


def _arguments(event: Mapping[str, Any]) -> Mapping[str, Any]:
    about = event.get("args")
    return about if isinstance(about, dict) else {}


def _operator(trace: KinetoTrace, name: str, shapes: list[list[int]], types: Sequence[str], seconds: float) -> None:
    found = FORMATS.get(types[0]) if types else None
    if found is None:
        return
    precision, width = found
    reader = _PRODUCTS.get(name)
    if reader is not None:
        for shape in reader(precision, shapes):
            trace.products[shape].append(seconds)
    elif _CORE in name and name != "aten::scaled_dot_product_attention" and len(shapes[0]) == 4:
        backward = name.endswith("backward")
        query, value = (shapes[1], shapes[3]) if backward else (shapes[0], shapes[2])
        batch, heads, length, key_width = query
        operations = 1.0 * batch * heads * length * length * (key_width + value[3])
        trace.core[backward].append((2.5 * operations if backward else operations, seconds))
    elif name in _COPIES and len(shapes) > 1 and shapes[0] == shapes[1]:
        other = FORMATS.get(types[1], found)[1]
        written = 0 if name == "aten::copy_" else width
        size = float(prod(shapes[0]) * (width + other + written))
        if size >= LONG_BYTES:
            trace.copies.append((size, seconds))


def _two(precision: str, shapes: list[list[int]]) -> Iterator[Shape]:
    (m, k), (_, n) = shapes[0], shapes[1]
    yield precision, m, n, k
    yield f"{precision}_wgrad", m, n, k


def _added(precision: str, shapes: list[list[int]]) -> Iterator[Shape]:
    """A product that is added to something: in place, a weight's gradient."""
    (m, k), (_, n) = shapes[1], shapes[2]
    yield f"{precision}_wgrad", m, n, k


def _biased(precision: str, shapes: list[list[int]]) -> Iterator[Shape]:
    (m, k), (_, n) = shapes[1], shapes[2]
    yield precision, m, n, k


def _grouped(precision: str, shapes: list[list[int]]) -> Iterator[Shape]:
    left, right = shapes[0], shapes[1]
    if len(left) == 2 and len(right) == 3:  # rows sorted by expert
        yield f"{precision}_grouped", left[0], right[2], left[1]


_PRODUCTS: Mapping[str, Callable[[str, list[list[int]]], Iterator[Shape]]] = {
    "aten::mm": _two,
    "aten::addmm": _biased,
    "aten::addmm_": _added,
    "aten::_scaled_mm": _two,
    "aten::_grouped_mm": _grouped,
}


def _message(about: Mapping[str, Any], seconds: float) -> Iterator[Message]:
    width = _MESSAGE_BYTES.get(str(about.get("dtype")), 0)
    size = float(about.get("In msg nelems", 0)) * width
    if size >= LONG_BYTES and seconds > 0:
        yield Message(int(about.get("Group size", 0)), size, seconds)
