"""``trace.json`` of a run: what every rank executed in its last steps, and when.

The file is a Chrome trace (Trace Event Format), which https://ui.perfetto.dev and chrome://tracing open as it is: a
thread for each rank, a slice for each slot of its program, messages included, under the text of the slot; times count
from the first of them. Next to the events, under ``dualpipe``, stand the lowered program, the number of replicas and
the steps, so that ``read`` finds in the file alone all that a comparison with the simulation needs.

Ranks on one machine share a clock. The clock of another machine is read from rank 0 over the network before the file is
written, and what it is ahead is taken off: good to half the round trip, about 50 microseconds.
"""

import json
import platform
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from dualpipe.draw.boxes import NAMES
from dualpipe.program import Compute, Overlap, Program, ProgramError, Receive, Send, Slot, Wait, dump, dump_slot, parse
from dualpipe.progress import Span
from dualpipe.recorded import Recording
from dualpipe.validate import validate
from launch.whole_file import write_whole
from parallel.mesh import Layout

NAME = "trace.json"
STEPS = 3
"""Steps that are kept: enough for a median, and few enough for any run's memory."""
EXCHANGES = 20  # with another machine, to read its clock: the fastest counts

Times = list[tuple[float, float]]
"""(start, end) of every slot of a rank in a step, in seconds."""


class TraceError(ValueError):
    """There is no recorded run, or its file is damaged; one line that names the file."""


class Recorder:
    """The last ``STEPS`` steps of one rank, and the file of all of them."""

    def __init__(self, program: Program, layout: Layout, rank: int) -> None:
        self.program, self.layout, self.rank = program, layout, rank
        self._steps: deque[tuple[int, Times]] = deque(maxlen=STEPS)

    def add(self, step: int, spans: Sequence[Span], program: Program) -> None:
        """Keep a step, in place of the oldest; a step of another program, in place of all; one that is taken again, in
        place of itself and those after it."""
        if program.microbatches != self.program.microbatches:
            self._steps.clear()
        while self._steps and self._steps[-1][0] >= step:
            self._steps.pop()
        self.program = program
        self._steps.append((step, [(span.start, span.end) for span in spans]))

    def write(self, folder: Path) -> None:
        """Replace the run's trace by the steps that are kept, of all ranks. Collective; rank 0 writes, or raises
        OSError."""
        import torch.distributed as dist

        ahead = clock_ahead(machine())
        own = [(step, [(start - ahead, end - ahead) for start, end in times]) for step, times in self._steps]
        everywhere: list[list[tuple[int, Times]]] | None = [[] for _ in range(self.layout.world_size)]
        dist.gather_object(own, everywhere if self.rank == 0 else None)
        if self.rank == 0:
            assert everywhere is not None
            write_whole(folder / NAME, json.dumps(document(self.program, self.layout, everywhere)) + "\n")


def machine() -> str:
    """What the processes that share a clock have in common."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return platform.node()


def clock_ahead(here: str, clock: Callable[[], float] = perf_counter) -> float:
    """How far this rank's clock is ahead of rank 0's, in seconds; 0 on rank 0's machine. Collective."""
    import torch
    import torch.distributed as dist

    rank, machines = dist.get_rank(), [""] * dist.get_world_size()
    dist.all_gather_object(machines, here)
    ahead = {machines[0]: 0.0}
    box = torch.zeros((), dtype=torch.float64)
    for other in dict.fromkeys(machines[1:]):
        if other == machines[0]:
            continue
        peer, readings = machines.index(other), []
        for _ in range(EXCHANGES):
            if rank == 0:
                asked = clock()
                dist.send(box, peer)
                dist.recv(box, peer)
                readings.append((asked, box.item(), clock()))
            elif rank == peer:
                dist.recv(box, 0)
                box.fill_(clock())
                dist.send(box, 0)
        if rank == 0:
            asked, there, answered = min(readings, key=lambda reading: reading[2] - reading[0])
            ahead[other] = there - (asked + answered) / 2
    answer = [ahead]
    dist.broadcast_object_list(answer)
    return answer[0][here]


def document(program: Program, layout: Layout, ranks: Sequence[Iterable[tuple[int, Times]]]) -> dict[str, Any]:
    """The object in the file. ``ranks``: for each rank of the world its steps, all of the same ones."""
    kept = [list(steps) for steps in ranks]
    zero = min((times[0][0] for steps in kept for _, times in steps if times), default=0.0)
    title = f"{program.schedule}, {program.ranks} pipeline ranks, {program.microbatches} micro-batches, as run"
    events: list[dict[str, Any]] = [_name("process_name", 0, title)]
    for rank, steps in enumerate(kept):
        position, replica = layout.pipeline_index(rank), layout.data_index(rank)
        events.append(_name("thread_name", rank, f"rank {rank} (pipeline {position}, data {replica})"))
        for step, times in steps:
            for slot, (start, end) in zip(program.slots[position], times, strict=True):
                events.append(_slice(rank, step, slot, _microseconds(start - zero), _microseconds(end - zero)))
    about = {"program": dump(program), "data": layout.data, "steps": [step for step, _ in kept[0]]}
    return {"displayTimeUnit": "ms", "traceEvents": events, "dualpipe": about}


def _name(what: str, thread: int, text: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 0, "tid": thread, "args": {"name": text}}


def _slice(rank: int, step: int, slot: Slot, start: float, end: float) -> dict[str, Any]:
    # The duration is that of rounded ends: slices of a thread must not overlap by a rounding.
    times = {"ts": start, "dur": _round(end - start)}
    name = {"ph": "X", "name": dump_slot(slot), "cat": _category(slot)}
    return {**name, "pid": 0, "tid": rank, **times, "args": {"step": step}}


def _category(slot: Slot) -> str:
    match slot:
        case Compute(op, _):
            return NAMES[op.value]
        case Overlap():
            return NAMES["FB"]
        case Send() | Receive() | Wait():
            return "message"
        case _:
            return NAMES["step"]


def _microseconds(seconds: float) -> float:
    return _round(seconds * 1e6)


def _round(microseconds: float) -> float:
    """To a nanosecond, which is what a trace viewer keeps."""
    return round(microseconds, 3)


def read(run: Path) -> Recording:
    """The recording of a run's folder, in milliseconds. Raises TraceError."""
    if not run.is_dir():
        raise TraceError(f"{run} must be the folder of a run")
    file = run / NAME
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TraceError(f"{run} has no {NAME}: a run records one with run.trace=true") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{file} must be readable: {error}") from None
    try:
        return _recording(json.loads(text))
    except ProgramError as error:
        raise TraceError(f"{file} is damaged: its program: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TraceError(f"{file} is damaged: {error!r}") from None


def _recording(found: Any) -> Recording:
    """Raises ValueError, KeyError, TypeError or AttributeError for an object that ``document`` does not return."""
    about = found["dualpipe"]
    program = parse(about["program"])
    validate(program)
    replicas, numbers = about["data"], about["steps"]
    if not isinstance(replicas, int) or replicas < 1 or not numbers:
        raise ValueError("it must have a replica and a step")
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in found["traceEvents"]:
        if event["ph"] == "X":
            rows.setdefault((event["args"]["step"], event["tid"]), []).append(event)
    steps = {}
    for number in numbers:
        # The layout of the mesh: rank = pipeline * data + replica.
        steps[number] = tuple(
            [
                _spans(program.slots[p], rows.get((number, p * replicas + d), []), p, number)
                for p in range(program.ranks)
            ]
            for d in range(replicas)
        )
    return Recording(program, steps)


def _spans(slots: Sequence[Slot], events: Sequence[dict[str, Any]], position: int, step: int) -> list[Span]:
    names = [event["name"] for event in events]
    if names != [dump_slot(slot) for slot in slots]:
        raise ValueError(f"the slots of pipeline rank {position} in step {step} are not those of the program")
    spans = []
    for slot, event in zip(slots, events, strict=True):
        start, duration = event["ts"] / 1e3, event["dur"] / 1e3
        if not 0 <= start < float("inf") or not 0 <= duration < float("inf"):
            raise ValueError(f"ts={event['ts']} and dur={event['dur']} of {event['name']} must not be negative")
        spans.append(Span(slot, start, start + duration))
    return spans
