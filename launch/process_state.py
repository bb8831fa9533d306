"""What the kernel says of a process that does not come further: stopped, asleep, or at work. Linux only."""

import enum
import os
from collections.abc import Collection
from pathlib import Path


class ProcessState(enum.Enum):
    STOPPED = "stopped by a signal"
    ASLEEP = "asleep"
    """None of its threads runs, waits for a core, or waits for a disk: each waits to be woken."""
    AT_WORK = "at work"
    """Or held by a debugger, or gone."""


def state_of(process: int, besides: Collection[int] = ()) -> ProcessState:
    """At this moment. ``besides``: threads that run whatever becomes of the others, and tell nothing of them."""
    tasks = Path(f"/proc/{process}/task")
    try:
        # As in proc(5): what follows the name, which is in brackets and may hold any character.
        states = {
            int(task): (tasks / task / "stat").read_text().rpartition(")")[2].split()[0] for task in os.listdir(tasks)
        }
    except OSError:  # the process, or one of its threads, just ended
        return ProcessState.AT_WORK
    if states.get(process) == "T":
        return ProcessState.STOPPED
    awake = any(state != "S" for task, state in states.items() if task not in besides)
    return ProcessState.AT_WORK if awake else ProcessState.ASLEEP
