"""Simulations as a Chrome trace: https://ui.perfetto.dev and chrome://tracing open it.

A process for each pipeline, a thread for each rank, and one more for the collectives that run beside its slots; an
arrow for each message, from the slot that made it to the slot that works on it; a counter of live activations for each
rank. A trace counts in microseconds: the unit of the costs becomes one millisecond.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from dualpipe.draw.boxes import NAMES, Box, boxes, describe
from dualpipe.program import dump_message
from dualpipe.progress import Span
from dualpipe.simulate import Simulation

MICROSECONDS = 1000.0  # of one unit of the costs


def trace(results: Sequence[Simulation]) -> dict[str, Any]:
    """The JSON object of a trace (Trace Event Format), one process for each simulation."""
    events: list[dict[str, Any]] = []
    flow = count()
    for process, result in enumerate(results):
        title = f"{result.schedule}, {result.ranks} ranks, {result.microbatches} micro-batches"
        events.append(_name("process_name", process, 0, title))
        for rank, row in enumerate(boxes(result)):
            events.append(_name("thread_name", process, rank, f"rank {rank}"))
            if any(box.beside for box in row):
                events.append(_name("thread_name", process, result.ranks + rank, f"rank {rank}, reductions"))
            events += (_slice(process, rank, result.ranks, box) for box in row)
            events += _counter(process, rank, result)
            events += _arrows(process, rank, result, flow)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _name(what: str, process: int, thread: int, text: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": text}}


def _slice(process: int, rank: int, ranks: int, box: Box) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": box.text,
        "cat": NAMES[box.kind],
        "pid": process,
        "tid": ranks + rank if box.beside else rank,
        "ts": box.start * MICROSECONDS,
        "dur": (box.end - box.start) * MICROSECONDS,
        "args": {"about": describe(box)},
    }


def _counter(process: int, rank: int, result: Simulation) -> Iterator[dict[str, Any]]:
    for time, alive, _ in result.memory[rank]:
        yield {
            "ph": "C",
            "name": f"live activations, rank {rank}",
            "pid": process,
            "tid": rank,
            "ts": time * MICROSECONDS,
            "args": {"micro-batches": alive},
        }


def _arrows(process: int, rank: int, result: Simulation, flow: Iterator[int]) -> Iterator[dict[str, Any]]:
    """The start and the end of an arrow for each message that the rank works on."""
    for span in result.spans[rank]:
        for crossing in span.inputs:
            maker = result.spans[crossing.source][crossing.maker]
            common = {"cat": "message", "name": dump_message(crossing.message), "pid": process, "id": next(flow)}
            # An arrow hangs on the slice around its time, and in the middle there is no doubt which that is.
            yield {"ph": "s", **common, "tid": crossing.source, "ts": _middle(maker)}
            yield {"ph": "f", "bp": "e", **common, "tid": rank, "ts": _middle(span)}


def _middle(span: Span) -> float:
    return (span.start + span.end) / 2 * MICROSECONDS
