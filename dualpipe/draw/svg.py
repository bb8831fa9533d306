"""A simulation as one SVG picture: a lane for each rank, a box for each operation, its description as a tooltip."""

import math
from html import escape

from dualpipe.draw.boxes import COLOURS, NAMES, Box, boxes, describe
from dualpipe.simulate import Simulation

LANE, STRIP, GAP, LEFT, TOP, LEGEND = 24, 4, 8, 56, 40, 30  # pixels; a strip lies in the gap
LABEL, MARGIN = 6.5, 16  # pixels: of a letter of a label, and at the right
SMALLEST_BOX, WIDEST = 12, 16000  # pixels: what the scale aims at, and where the picture ends


def svg(result: Simulation) -> str:
    """The document. Every box is a ``rect`` of class ``box`` and its kind, with the slot in ``data-slot``."""
    rows = boxes(result)
    durations = sorted(box.end - box.start for row in rows for box in row if box.end > box.start)
    typical = durations[len(durations) // 2] if durations else 1.0
    width = min(max(1100.0, SMALLEST_BOX * result.makespan / typical), WIDEST)
    scale = width / result.makespan if result.makespan else 0.0
    bottom = TOP + result.ranks * (LANE + GAP)
    total = width + LEFT + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total:.0f}" height="{bottom + LEGEND}" '
        f'viewBox="0 0 {total:.0f} {bottom + LEGEND}" font-family="sans-serif" font-size="11">',
        _style(),
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title(result))}</text>',
        *axis(result.makespan, scale, LEFT, TOP, bottom),
    ]
    for rank, row in enumerate(rows):
        top = TOP + rank * (LANE + GAP)
        lines.append(f'<text x="{LEFT - 6}" y="{top + 16}" text-anchor="end">rank {rank}</text>')
        for box in row:
            lines += _box(box, LEFT + box.start * scale, (box.end - box.start) * scale, top)
    return "\n".join([*lines, *_legend(bottom + 18), "</svg>", ""])


def title(result: Simulation) -> str:
    return (
        f"{result.schedule}: {result.ranks} ranks, {result.microbatches} micro-batches, makespan {result.makespan:g}, "
        f"bubble {result.bubble_fraction:.2%}, peak {max(result.peak_activations, default=0)} activations"
    )


def _style() -> str:
    """The colours; a pair is its two halves."""
    rules = "".join(f".{kind}{{fill:{colour}}}" for kind, colour in COLOURS.items() if kind != "FB")
    stops = "".join(
        f'<stop offset="50%" stop-color="{COLOURS[kind]}"/>' for kind in ("F", "B")
    )  # both at the middle: a hard edge
    return (
        f"<style>{rules}.FB{{fill:url(#pair)}}.box{{stroke:white;stroke-width:.5}}text{{fill:#222}}"
        "text.label{pointer-events:none;text-anchor:middle}</style>"
        f'<defs><linearGradient id="pair" x1="0" y1="0" x2="0" y2="1">{stops}</linearGradient></defs>'
    )


def _box(box: Box, x: float, width: float, top: float) -> list[str]:
    # What runs beside the lane's boxes is a strip below them.
    y, height = (top + LANE, STRIP) if box.beside else (top, LANE)
    tooltip = escape("\n".join(describe(box)))
    lines = [
        f'<rect class="box {box.kind}" data-slot="{escape(box.text)}" x="{x:.2f}" y="{y}" width="{width:.2f}" '
        f'height="{height}"><title>{tooltip}</title></rect>'
    ]
    if not box.beside and width >= LABEL * len(box.label) + 2:
        middle = x + width / 2
        lines.append(f'<text class="label" x="{middle:.2f}" y="{top + 16}">{escape(box.label)}</text>')
    return lines


def axis(until: float, scale: float, left: float, top: float, bottom: float) -> list[str]:
    """A line and its time at every round number up to ``until``, so many that they stand at least 60 pixels apart.
    ``scale``: pixels a unit of time; the rest are pixels from the corner of the picture."""
    if not scale:
        return []
    power = 10.0 ** math.floor(math.log10(60 / scale))
    tick = next(factor * power for factor in (1, 2, 5, 10) if factor * power * scale >= 60)
    lines = []
    for count in range(int(until / tick) + 1):
        x = left + count * tick * scale
        lines.append(f'<path d="M{x:.2f} {top - 6}V{bottom}" stroke="#ddd"/>')
        lines.append(f'<text x="{x:.2f}" y="{top - 9}" text-anchor="middle" font-size="9">{count * tick:g}</text>')
    return lines


def _legend(y: float) -> list[str]:
    lines, x = [], float(LEFT)
    for kind, name in NAMES.items():
        lines.append(f'<rect class="{kind}" x="{x:.0f}" y="{y - 10}" width="12" height="12"/>')
        lines.append(f'<text x="{x + 16:.0f}" y="{y}">{kind if kind != "step" else ""} {name}</text>')
        x += 44 + 6.2 * len(name)
    return lines
