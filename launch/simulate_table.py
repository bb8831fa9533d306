"""What ``dualpipe simulate`` prints for people: the picture and the table of one schedule, the comparison of all."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from dualpipe.draw import text
from dualpipe.draw.boxes import COLOURS
from dualpipe.program import Program
from dualpipe.search import NAME, Found
from dualpipe.simulate import OPERATIONS, Simulation

_CAUSES = {
    "warmup": "warm-up",
    "dependency": "dependency",
    "communication": "comm.",
    "drain": "drain",
    "step_end": "end",
}


@dataclass(frozen=True)
class Ran:
    """A schedule in a comparison. ``share``: what one of its stages holds of a stage when each rank has one."""

    name: str
    program: Program
    result: Simulation
    share: float

    def to_json(self, ranks: int, microbatches: int) -> dict[str, Any]:
        return {
            **self.result.to_json(),
            "schedule": self.name,
            "stage_share": self.share,
            "parameters": self.parameters,
        }

    @property
    def parameters(self) -> float:
        """The most that a rank holds, in P-ths of the model: 2 where every stage is there twice."""
        return max(len(self.program.stages_of(rank)) for rank in range(self.program.ranks)) * self.share


@dataclass(frozen=True)
class Refused:
    """A schedule that these sizes or costs do not suit, and the rule."""

    name: str
    why: str

    def to_json(self, ranks: int, microbatches: int) -> dict[str, Any]:
        return {"schedule": self.name, "ranks": ranks, "microbatches": microbatches, "error": self.why}


Row = Ran | Refused


def report(program: Program, result: Simulation, columns: int, terminal: bool) -> str:
    """Picture, table of the ranks, and the step in one line. In colour on a ``terminal`` that has so many columns."""
    rows = text.picture(result, columns)
    drawn = _coloured(rows, columns) if terminal else "\n".join("".join(piece for piece, _ in row) for row in rows)
    summary = (
        f"{result.schedule}: {result.ranks} ranks, {result.microbatches} micro-batches, "
        f"makespan {result.makespan:g}, bubble {result.bubble_fraction:.2%}"
    )
    lines = [drawn, text.legend(), "", _ranks(program, result), "", summary]
    if result.stages > result.ranks and result.schedule != NAME:
        lines.append(
            f"times and peaks are of stages of 1/{result.stages} of the model; --compare and --schedule search take "
            f"costs of 1/{result.ranks}"
        )
    return "\n".join(lines)


def comparison(rows: Sequence[Row], ranks: int, microbatches: int) -> str:
    """One row for each schedule. Percentages are of all ranks' time; peak and parameters are in stages of one P-th of
    the model, whatever the stages of the schedule."""
    has_bytes = any(isinstance(row, Ran) and row.result.peak_bytes is not None for row in rows)
    head = ["schedule", "stages", "makespan", "bubble", *_CAUSES.values(), "peak", "parameters"]
    lines = [head + (["peak bytes"] if has_bytes else [])]
    for row in rows:
        if isinstance(row, Ran):
            result = row.result
            total = result.makespan * result.ranks or 1.0
            causes = [sum(getattr(rank, name) for rank in result.bubble_by_cause) / total for name in _CAUSES]
            lines.append(
                [
                    row.name,
                    str(result.stages),
                    f"{result.makespan:g}",
                    *(f"{fraction:.2%}" for fraction in (result.bubble_fraction, *causes)),
                    f"{max(result.peak_activations) * row.share:g}",
                    f"{row.parameters:g}x",
                    *([f"{max(result.peak_bytes):g}"] if result.peak_bytes is not None else []),
                ]
            )
    table = _aligned(lines).split("\n")
    refused = [
        f"{row.name.ljust(len('interleaved'))}  cannot run: {row.why}" for row in rows if isinstance(row, Refused)
    ]
    return "\n".join([f"{ranks} ranks, {microbatches} micro-batches", *table, *refused])


def searched(found: Found) -> list[str]:
    """What a search adds to the report of its program: where the stages are, and what it was compared with."""
    best = found.best_named
    lines = [
        f"placement {found.placement.name}, parameters {found.parameters:g}x, peak {found.peak:g} "
        "(activations of a micro-batch in 1/P of the model)"
    ]
    if best is None:
        smallest = min((named for named in found.named if not named.why), key=lambda named: named.peak, default=None)
        needs = f"; {smallest.name} needs {smallest.peak:g} and takes {smallest.makespan:g}" if smallest else ""
        lines.append(f"no named schedule fits{needs}")
    else:
        assert found.gain is not None
        lines.append(f"best named schedule that fits: {best.name}, makespan {best.makespan:g}; gain {found.gain:.2%}")
    lines += [f"left out, placement {name}: {why}" for name, why in found.left_out.items()]
    lines.append(f"{found.tried} orders tried; nothing searched computes in less than {found.bound:g}")
    return lines


def searched_json(found: Found) -> dict[str, Any]:
    """The object of ``--json``, with what was searched. Times are in the unit of the costs but for ``seconds``."""
    best = found.best_named
    row = Ran(NAME, found.program, found.result, found.placement.share)
    return {
        **row.to_json(found.result.ranks, found.result.microbatches),
        "search": {
            "placement": found.placement.name,
            "peak": found.peak,
            "tried": found.tried,
            "seconds": found.seconds,
            "bound": found.bound,
            "best_named": None if best is None else best.name,
            "best_named_makespan": None if best is None else best.makespan,
            "gain": found.gain,
            "named": [
                {"schedule": named.name, "error": named.why}
                if named.why
                else {"schedule": named.name, "makespan": named.makespan, "peak": named.peak, "fits": named.fits}
                for named in found.named
            ],
            "left_out": found.left_out,
        },
    }


def _ranks(program: Program, result: Simulation) -> str:
    """A row for each rank, with the causes of its bubble that occur at all."""
    causes = [asdict(rank) for rank in result.bubble_by_cause]
    shown = {name: word for name, word in _CAUSES.items() if any(rank[name] > 0 for rank in causes)}
    rows = [["rank", "stages", *OPERATIONS, "busy", "bubble", *shown.values(), "peak"]]
    rows[0] += ["peak bytes"] if result.peak_bytes is not None else []
    for rank in range(result.ranks):
        row = [str(rank), ",".join(map(str, program.stages_of(rank)))]
        row += [str(result.operations[rank][name]) for name in OPERATIONS]
        row += [f"{result.busy[rank]:g}", f"{result.bubble[rank]:g}"]
        row += [f"{causes[rank][name]:.6g}" for name in shown]
        row.append(str(result.peak_activations[rank]))
        row += [f"{result.peak_bytes[rank]:g}"] if result.peak_bytes is not None else []
        rows.append(row)
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _coloured(rows: Sequence[Sequence[text.Run]], columns: int) -> str:
    """The picture as a terminal's text. rich is loaded here: it takes as long as the rest of the command."""
    from rich.console import Console
    from rich.text import Text

    out = StringIO()
    console = Console(file=out, force_terminal=True, width=columns)
    for row in rows:
        line = Text()
        for piece, kind in row:
            line.append(piece, style="" if kind is None else f"black on {COLOURS[kind]}")
        console.print(line, no_wrap=True, crop=False)
    return out.getvalue().rstrip("\n")
