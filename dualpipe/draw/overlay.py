"""A recorded run over its simulation, as a picture and as a page: each rank has two lanes on one scale of time."""

from collections.abc import Sequence
from html import escape

from dualpipe.draw.boxes import COLOURS, NAMES, Box, boxes, describe
from dualpipe.draw.html import html as interactive
from dualpipe.draw.svg import axis
from dualpipe.simulate import Simulation

LEFT, TOP, LANE, GAP, MARGIN = 120, 48, 20, 10, 16  # pixels; the two lanes of a rank touch
SMALLEST_BOX, NARROWEST, WIDEST, LETTER = 12, 1100, 16000, 6.5  # pixels


def svg(measured: Simulation, simulated: Simulation) -> str:
    """The document. Every box is a ``rect`` of class ``measured`` or ``simulated``, with the slot in ``data-slot``."""
    until = max(measured.makespan, simulated.makespan)
    durations = sorted(box.end - box.start for row in boxes(simulated) for box in row if box.end > box.start)
    typical = durations[len(durations) // 2] if durations else until
    width = min(max(NARROWEST, SMALLEST_BOX * until / typical), WIDEST) if until else NARROWEST
    scale = width / until if until else 0.0
    bottom = TOP + measured.ranks * (2 * LANE + GAP)
    size = f'width="{LEFT + width + MARGIN:.0f}" height="{bottom + 28}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        "<style>rect{stroke:white;stroke-width:.5}rect.simulated{opacity:.55}text{fill:#222}</style>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title(measured, simulated))}</text>',
        *axis(until, scale, LEFT, TOP, bottom),
    ]
    for rank, rows in enumerate(zip(boxes(measured), boxes(simulated), strict=True)):
        top = TOP + rank * (2 * LANE + GAP)
        for place, (name, row) in enumerate(zip(("measured", "simulated"), rows, strict=True)):
            y = top + place * LANE
            lines.append(f'<text x="{LEFT - 6}" y="{y + 14}" text-anchor="end">rank {rank} {name}</text>')
            lines += [_rect(box, name, scale, y) for box in row if not box.beside]
    return "\n".join([*lines, *_legend(bottom + 16), "</svg>", ""])


def html(measured: Simulation, simulated: Simulation) -> str:
    """One page that needs nothing else: both on one scale, then each as an interactive page of its own."""
    parts = ["<!DOCTYPE html>", '<html lang="en"><meta charset="utf-8">', '<link rel="icon" href="data:,">']
    parts.append(f"<title>{escape(title(measured, simulated))}</title>")
    parts.append("<style>body{margin:0;font:13px sans-serif}div{overflow-x:auto}iframe{width:100%;border:0}</style>")
    parts.append(f"<div>{svg(measured, simulated)}</div>")
    for name, result in (("measured", measured), ("simulated", simulated)):
        height = 140 + 64 * result.ranks  # pixels: its head and its rows
        page = escape(interactive(result))
        parts.append(f'<h2>{name}</h2><iframe title="{name}" style="height:{height}px" srcdoc="{page}"></iframe>')
    return "\n".join([*parts, "</html>", ""])


def title(measured: Simulation, simulated: Simulation) -> str:
    return (
        f"{measured.schedule}: {measured.ranks} ranks, {measured.microbatches} micro-batches, "
        f"measured {measured.makespan:g}, simulated {simulated.makespan:g}"
    )


def _rect(box: Box, name: str, scale: float, y: float) -> str:
    x, width = LEFT + box.start * scale, (box.end - box.start) * scale
    drawn = (
        f'<rect class="{name}" data-slot="{escape(box.text)}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{LANE}" '
        f'fill="{COLOURS[box.kind]}"><title>{escape(chr(10).join([name, *describe(box)]))}</title></rect>'
    )
    if width < LETTER * len(box.label) + 2:
        return drawn
    return f'{drawn}<text x="{x + width / 2:.2f}" y="{y + 14}" text-anchor="middle">{escape(box.label)}</text>'


def _legend(y: float) -> Sequence[str]:
    lines, x = [], float(LEFT)
    for kind, name in NAMES.items():
        lines.append(f'<rect x="{x:.0f}" y="{y - 10}" width="12" height="12" fill="{COLOURS[kind]}"/>')
        lines.append(f'<text x="{x + 16:.0f}" y="{y}">{name}</text>')
        x += 32 + LETTER * len(name)
    return lines
