"""The schedules by name. A generator is a function of (ranks, micro-batches) that returns compute order only."""

import difflib
from collections.abc import Callable

from dualpipe.program import Program
from dualpipe.schedules import dualpipe

SCHEDULES: dict[str, Callable[[int, int], Program]] = {"dualpipe": dualpipe.dualpipe}


def generate(name: str, ranks: int, microbatches: int) -> Program:
    """The compute-only program of a schedule. Raises ValueError for an unknown name, or sizes the schedule refuses."""
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"schedule.name={name} is not a schedule ({', '.join(sorted(SCHEDULES))}){hint}")
    return SCHEDULES[name](ranks, microbatches)
