"""A simulation in the terminal: one row a rank, as wide as the terminal, time from left to right."""

from bisect import bisect_right
from itertools import groupby

from dualpipe.draw.boxes import NAMES, Box, boxes
from dualpipe.simulate import Simulation

# A piece of a row and the kind of the box that it shows, None for idle time.
Run = tuple[str, str | None]


def picture(result: Simulation, width: int) -> list[list[Run]]:
    """Rows of at most ``width`` characters, at least 20: one for each rank, and a time axis.

    A column shows what its rank does in the middle of the column's time; a box with room for it has its letter and
    micro-batch, any other its letter.
    """
    gutter = len(str(result.ranks - 1)) + 1
    columns = max(width, 20) - gutter
    rows: list[list[Run]] = []
    for rank, row in enumerate(boxes(result)):
        drawn = [box for box in row if not box.beside and box.end > box.start]
        rows.append([(f"{rank}".rjust(gutter - 1) + " ", None), *_row(drawn, columns, result.makespan)])
    return [*rows, [(" " * gutter + _axis(columns, result.makespan), None)]]


def legend() -> str:
    """What the letters mean."""
    return "  ".join(f"{_letter(kind)} {name}" for kind, name in NAMES.items())


def _row(row: list[Box], columns: int, makespan: float) -> list[Run]:
    starts = [box.start for box in row]
    cells: list[int] = []  # the box in the middle of each column, -1 for none
    for column in range(columns):
        middle = (column + 0.5) / columns * makespan
        index = bisect_right(starts, middle) - 1
        cells.append(index if index >= 0 and middle < row[index].end else -1)
    runs: list[Run] = []
    for index, group in groupby(cells):
        size = len(list(group))
        runs.append((" " * size, None) if index < 0 else (_fill(row[index], size), row[index].kind))
    return runs


def _fill(box: Box, size: int) -> str:
    """Its name, or its letter where that does not fit, and a line to the box's end."""
    letter = _letter(box.kind)
    name = box.label if box.kind == "FB" else letter + box.label
    return (name if len(name) <= size and box.kind != "step" else letter).ljust(size, "-")


def _letter(kind: str) -> str:
    match kind:
        case "FB":
            return "&"
        case "step":
            return "="
        case _:
            return kind


def _axis(columns: int, makespan: float) -> str:
    """The times at the two ends."""
    end = f"{makespan:g}"
    return "0" + end.rjust(columns - 1)
