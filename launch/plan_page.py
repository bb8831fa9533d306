"""The page that ``dualpipe plan --html`` writes: numbers, the step's timeline, every rank's memory, and a roofline."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from html import escape

from dualpipe.draw.html import html
from launch.plan_table import report
from parallel.estimate.memory import RankMemory
from parallel.estimate.plan import Plan
from parallel.estimate.products import Product, products_of

WIDTH, LEFT, RIGHT, TOP = 1000, 70, 150, 26  # pixels
BAR, GAP = 18, 6
ROOF_HEIGHT = 380
COLOURS = ("#4c78a8", "#72b7b2", "#54a24b", "#f58518", "#b279a2", "#e45756")
FORMATS = {"fp8": "#e45756", "bf16": "#4c78a8", "fp32": "#54a24b"}


def page(plan: Plan) -> str:
    """A document that needs nothing else."""
    sections = (
        f"<pre>{escape(report(plan))}</pre>",
        f"<h1>memory of each rank, GB</h1>{memory_svg(plan)}",
        f"<h1>roofline: the products of a layer and of the head on one GPU, TFLOPS over operations a byte</h1>"
        f"{roofline_svg(plan)}",
    )
    return html(plan.result, "\n".join(f'<section style="padding: 8px 12px">{each}</section>' for each in sections))


def memory_svg(plan: Plan) -> str:
    """A bar for each rank, in parts; a line at what the device has for tensors."""
    most = max(plan.usable_bytes, max(rank.total for rank in plan.memory))
    scale = (WIDTH - LEFT - RIGHT) / most
    bottom = TOP + len(plan.memory) * (BAR + GAP)
    lines = [_open(bottom + 30)]
    for rank, memory in enumerate(plan.memory):
        y = TOP + rank * (BAR + GAP)
        lines.append(f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end">rank {rank}</text>')
        lines += _bar(memory, y, scale)
    x = LEFT + plan.usable_bytes * scale
    lines.append(f'<path d="M{x:.1f} {TOP - 4}V{bottom}" stroke="#222" stroke-dasharray="4 3"/>')
    lines.append(
        f'<text x="{x:.1f}" y="{TOP - 9}" text-anchor="middle">{plan.usable_bytes / 1e9:.1f} for tensors</text>'
    )
    for place, (part, colour) in enumerate(zip(_parts(), COLOURS, strict=True)):
        at = LEFT + place * 130
        lines.append(f'<rect x="{at}" y="{bottom + 10}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{at + 16}" y="{bottom + 20}">{part}</text>')
    return "\n".join([*lines, "</svg>"])


def _parts() -> list[str]:
    return [part.name for part in fields(RankMemory)]


def _bar(memory: RankMemory, y: float, scale: float) -> Iterator[str]:
    x = float(LEFT)
    for (part, size), colour in zip(asdict(memory).items(), COLOURS, strict=True):
        yield (
            f'<rect class="memory" x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{BAR}" fill="{colour}">'
            f"<title>{part}: {size / 1e9:.2f} GB</title></rect>"
        )
        x += size * scale
    yield f'<text x="{x + 6:.1f}" y="{y + 13}">{memory.total / 1e9:.1f}</text>'


def roofline_svg(plan: Plan) -> str:
    """Logarithmic both ways. The roofs are memory's rate and each format's peak on the multiprocessors that compute."""
    cluster = plan.cluster
    products = products_of(plan.workload, cluster)
    rates = {product: _rate(plan, product) for product in products}
    intensities = [product.operations / product.bytes for product in products]
    peaks = {name: getattr(cluster, f"{name}_tflops") * 1e12 * cluster.computing_share for name in FORMATS}
    memory = cluster.memory_gb_per_s * 1e9
    across = _Logarithmic(
        min(intensities) / 2, max(*intensities, *(p / memory for p in peaks.values())) * 2, LEFT, WIDTH - RIGHT
    )
    up = _Logarithmic(min(rates.values()) / 2, max(peaks.values()) * 2, TOP + ROOF_HEIGHT, TOP)
    lines = [_open(TOP + ROOF_HEIGHT + 30), *_grid(across, up)]
    for name, peak in peaks.items():
        if peak and any(product.precision == name for product in products):
            start = max(peak / memory, across.low)
            lines.append(_line((across.low, across.low * memory), (start, peak), across, up, "#888"))
            lines.append(_line((start, peak), (across.high, peak), across, up, FORMATS[name]))
            lines.append(
                f'<text x="{across(across.high) + 6:.1f}" y="{up(peak) + 4:.1f}">{name} {peak / 1e12:.4g}</text>'
            )
    for product, rate in rates.items():
        about = f"{product.kind} [{product.m}, {product.k}] x [{product.k}, {product.n}]: {rate / 1e12:.4g} TFLOPS"
        lines.append(
            f'<circle class="product" cx="{across(product.operations / product.bytes):.1f}" cy="{up(rate):.1f}" r="4" '
            f'fill="{FORMATS[product.precision]}" fill-opacity=".7"><title>{about}</title></circle>'
        )
    return "\n".join([*lines, "</svg>"])


def _rate(plan: Plan, product: Product) -> float:
    """Operations a second, as the plan has it."""
    cluster = plan.cluster
    peak: float = getattr(cluster, f"{product.precision}_tflops")
    efficiency = cluster.efficiency(product.kind, product.m, product.n, product.k)
    return peak * 1e12 * cluster.computing_share * efficiency


class _Logarithmic:
    """Values from ``low`` to ``high`` -> pixels from ``first`` to ``last``."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.high, self._first = low, high, first
        self._scale = (last - first) / math.log(high / low)

    def __call__(self, value: float) -> float:
        return self._first + math.log(value / self.low) * self._scale

    def ticks(self) -> Sequence[float]:
        """1, 2 and 5 in every power of ten between the ends."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = (factor * 10.0**power for power in powers for factor in (1, 2, 5))
        return [value for value in values if self.low <= value <= self.high]


def _grid(across: _Logarithmic, up: _Logarithmic) -> Iterator[str]:
    bottom, right = up(up.low), across(across.high)
    for value in across.ticks():
        yield f'<path d="M{across(value):.1f} {TOP}V{bottom:.1f}" stroke="#ddd"/>'
        yield f'<text x="{across(value):.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{value:g}</text>'
    for value in up.ticks():
        yield f'<path d="M{LEFT} {up(value):.1f}H{right:.1f}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value / 1e12:g}</text>'


def _line(
    start: tuple[float, float], end: tuple[float, float], across: _Logarithmic, up: _Logarithmic, colour: str
) -> str:
    """Between two points of the chart; what lies below it is cut off."""
    (x, y), (to_x, to_y) = start, end
    if y < up.low:  # memory's roof rises with the intensity
        x, y = x * up.low / y, up.low
    return (
        f'<path d="M{across(x):.1f} {up(y):.1f}L{across(to_x):.1f} {up(to_y):.1f}" stroke="{colour}" '
        'stroke-width="2" fill="none"/>'
    )


def _open(height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="11">'
    )
