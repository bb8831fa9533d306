"""The curves of ``benchmarks.fp8_loss`` as one SVG picture: mean losses above, excess over BF16 below."""

import statistics
from collections.abc import Callable, Mapping, Sequence

WIDTH, LEFT, RIGHT, TOP, PANEL, GAP = 760, 56, 16, 34, 190, 52  # pixels
COLOURS = {"bf16": "#222222", "control": "#2a78b8", "fp8": "#d1592a"}
NAMES = {"bf16": "BF16", "control": "BF16, one weight moved by 1e-4", "fp8": "FP8"}
CLAIM = 0.0025
"""The excess that the picture always has room for."""
Runs = Sequence[Sequence[float]]


def svg(losses: Mapping[str, Runs], window: int) -> str:
    """``losses``: of every variant, by seed. Excess is that of means over ``window`` steps: thin lines are seeds, thick
    ones their mean."""
    steps = len(losses["bf16"][0])
    height = TOP + 2 * PANEL + GAP + 44
    means = {variant: [statistics.fmean(at) for at in zip(*runs, strict=True)] for variant, runs in losses.items()}
    excess = {
        v: [_excess(a, b, window) for a, b in zip(losses[v], losses["bf16"], strict=True)] for v in ("control", "fp8")
    }
    loss_axis = _axis(0, steps, min(map(min, means.values())), max(map(max, means.values())), TOP)
    largest = max(abs(y) for lines in excess.values() for line in lines for y in line)
    largest = 1.05 * max(largest, CLAIM)
    below = TOP + PANEL + GAP
    excess_axis = _axis(0, steps, -largest, largest, below)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<clipPath id="below"><rect x="{LEFT}" y="{below}" width="{WIDTH - LEFT - RIGHT}" height="{PANEL}"/>'
        "</clipPath>",
        f'<text x="{LEFT}" y="18" font-size="13">Loss (nats a token), mean of {len(losses["bf16"])} seeds</text>',
        *_frame(TOP, steps, [(f"{y:g}", loss_axis(0, y)[1]) for y in range(1, 7) if _inside(loss_axis(0, y)[1], TOP)]),
        f'<text x="{LEFT}" y="{below - 12}" font-size="13">Excess over BF16 of the same seed (%), '
        f"means over {window} steps; thin: each seed, dashed: {CLAIM:.2%}</text>",
    ]
    unit = next(unit for unit in (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0) if largest <= 4 * unit)
    marks = [(f"{100 * unit * n:+g}" if n else "0", excess_axis(0, unit * n)[1]) for n in range(-4, 5)]
    lines += _frame(below, steps, [mark for mark in marks if _inside(mark[1], below)])
    for variant, mean in means.items():
        width = 4.0 if variant == "bf16" else 1.2  # it shows on both sides of those that lie on it
        lines.append(_line([loss_axis(x + 1, y) for x, y in enumerate(mean)], COLOURS[variant], width))
    claim = excess_axis(0, CLAIM)[1]
    dashes = 'stroke="#888888" stroke-dasharray="5 4"'
    lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{claim:.1f}" y2="{claim:.1f}" {dashes}/>')
    lines.append('<g clip-path="url(#below)">')
    for variant, seeds in excess.items():
        curves = [(seed, 0.6, 0.35) for seed in seeds]
        curves.append(([statistics.fmean(at) for at in zip(*seeds, strict=True)], 2.2, 1.0))
        for curve, width, opacity in curves:
            points = [excess_axis(x + window, y) for x, y in enumerate(curve)]
            lines.append(_line(points, COLOURS[variant], width, opacity))
    return "\n".join([*lines, "</g>", *_legend(height - 10), "</svg>", ""])


def _excess(run: Sequence[float], base: Sequence[float], window: int) -> list[float]:
    ends = range(window, len(run) + 1)
    return [sum(run[end - window : end]) / sum(base[end - window : end]) - 1 for end in ends]


def _axis(x0: float, x1: float, y0: float, y1: float, top: float) -> Callable[[float, float], tuple[float, float]]:
    """From values to pixels."""
    across, down = (WIDTH - LEFT - RIGHT) / (x1 - x0), PANEL / (y1 - y0)
    return lambda x, y: (LEFT + (x - x0) * across, top + (y1 - y) * down)


def _inside(y: float, top: float) -> bool:
    return top <= y <= top + PANEL


def _frame(top: float, steps: int, marks: Sequence[tuple[str, float]]) -> list[str]:
    bottom, right = top + PANEL, WIDTH - RIGHT
    lines = []
    for text, y in marks:
        lines.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for step in range(0, steps + 1, max(steps // 6, 1)):
        x = LEFT + (right - LEFT) * step / steps
        label = f"{step} steps" if step == steps else str(step)
        anchor = "end" if step == steps else "middle"
        lines.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="{anchor}">{label}</text>')
    box = f'<rect x="{LEFT}" y="{top}" width="{right - LEFT}" height="{PANEL}" fill="none" stroke="#888888"/>'
    return [*lines, box]


def _line(points: Sequence[tuple[float, float]], colour: str, width: float, opacity: float = 1.0) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'


def _legend(y: float) -> list[str]:
    lines, x = [], float(LEFT)
    for variant, name in NAMES.items():
        colour = COLOURS[variant]
        lines.append(f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="2.2"/>')
        lines.append(f'<text x="{x + 28}" y="{y}">{name}</text>')
        x += 60 + 6.2 * len(name)
    return lines
