"""``dualpipe simulate --compare-run RUN``: a run that was recorded with ``run.trace=true``, over its simulation.

The costs of the simulation are those of the recording (``dualpipe/derive.py``), so that what differs is not how long an
operation takes but what the schedule makes of it: the order, the messages, ranks that were slow once. All times are in
milliseconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualpipe.compare import Comparison, Difference, compare
from dualpipe.derive import as_text
from dualpipe.draw import text
from dualpipe.program import Wait, dump_message, dump_slot
from dualpipe.recorded import Recording
from dualpipe.simulate import Simulation
from launch import trace


def load(run: str) -> tuple[Recording, Comparison]:
    """The recording in a run's folder, and what comes of it. Raises TraceError."""
    recording = trace.read(Path(run))
    return recording, compare(recording)


def to_json(run: str, recording: Recording, found: Comparison) -> dict[str, Any]:
    """The object that ``--json`` prints."""
    return {
        "run": run,
        "unit": "ms",
        "steps": list(recording.steps),
        "runs": found.runs,
        "step": found.step,
        "replica": found.replica,
        "difference": found.difference,
        "costs": as_text(found.costs),
        "measured": found.measured.to_json(),
        "simulated": found.simulated.to_json(),
        "handling": list(found.handling),
        "differences": [
            {**difference.to_json(), "world_rank": world_rank(recording, difference)}
            for difference in found.differences
        ],
    }


def world_rank(recording: Recording, difference: Difference) -> int:
    """The rank of the run, replicas counted, as its trace has it: pipeline rank x replicas + replica."""
    replicas = len(next(iter(recording.steps.values())))
    return difference.rank * replicas + difference.replica


def report(recording: Recording, found: Comparison, columns: int) -> str:
    """Both pictures, the ranks side by side, the largest differences, and the step in one line."""
    measured, simulated = found.measured, found.simulated
    lines = [f"measured, step {found.step}, replica {found.replica} (the median of {found.runs}), in ms"]
    lines += [*_picture(measured, columns), "simulated", *_picture(simulated, columns), text.legend(), ""]
    lines += [*_ranks(found), "", f"the largest of {found.runs} x {_slots(simulated)} differences of a slot's duration"]
    lines += [*_differences(recording, found), "", f"costs: {as_text(found.costs)}"]
    return "\n".join(
        [
            *lines,
            f"{measured.schedule}: {measured.ranks} ranks, {measured.microbatches} micro-batches, "
            f"measured {measured.makespan:.5g} ms, simulated {simulated.makespan:.5g} ms ({found.difference:+.2%}), "
            f"bubble {measured.bubble_fraction:.2%}, simulated {simulated.bubble_fraction:.2%}",
        ]
    )


def _picture(result: Simulation, columns: int) -> list[str]:
    return ["".join(piece for piece, _ in row) for row in text.picture(result, columns)]


def _slots(result: Simulation) -> int:
    return sum(map(len, result.spans))


def _ranks(found: Comparison) -> list[str]:
    """A row for each rank. ``other`` is what it does beside computing and waiting: sending, posting, freeing."""
    measured, simulated = found.measured, found.simulated
    rows = [["rank", "busy", "simulated", "bubble", "simulated", "other"]]
    for rank in range(measured.ranks):
        times = (measured.busy, simulated.busy, measured.bubble, simulated.bubble, found.handling)
        rows.append([str(rank), *(f"{of[rank]:.5g}" for of in times)])
    return _aligned(rows)


def _differences(recording: Recording, found: Comparison) -> list[str]:
    rows = [["step", "rank", "slot", "start", "simulated", "duration", "simulated", "excess"]]
    for one in found.differences:
        times = (one.measured_start, one.simulated_start, one.measured, one.simulated)
        place = [str(one.step), str(world_rank(recording, one)), _name(one)]
        rows.append([*place, *(f"{time:.5g}" for time in times), f"{one.excess:+.4g}"])
    return _aligned(rows)


def _name(difference: Difference) -> str:
    if isinstance(difference.slot, Wait):
        return f"message {dump_message(difference.slot.message)} from pipeline rank {difference.slot.peer}"
    return dump_slot(difference.slot)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
