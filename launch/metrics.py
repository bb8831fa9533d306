"""What a run says about itself: a line a step, a line an event, a live view, and a summary at the end."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from launch.invocation import Invocation
from launch.whole_file import write_whole


class MetricsLog:
    """``metrics.jsonl``: one JSON object a step, on disk as soon as it is appended.

    Opening it at ``resumed_step``, the last step that the restored checkpoint contains (0 for a new run), drops the
    steps after it, which are about to be taken again, and a last line that a crash cut short.
    """

    def __init__(self, path: str | Path, resumed_step: int = 0) -> None:
        self.path = Path(path)
        steps = filter(_is_step, read_jsonl(self.path))
        write_whole(self.path, "".join(_line(entry) for entry in steps if _step(entry) <= resumed_step))
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one step; ``entry`` has at least ``step``. A number that is not finite is written as null."""
        self._file.write(_line(entry))
        self._file.flush()

    def entries(self) -> list[dict[str, Any]]:
        """Every step so far, those before a resume included."""
        return read_jsonl(self.path)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EventLog:
    """``events.jsonl``: starts, failures and recoveries, one JSON object a line. Several processes may append."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, event: str, **details: Any) -> None:
        """Add ``{"time": UTC in ISO 8601, "event": event, ...}``."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = _line({"time": now, "event": event, **details}).encode()
        with self.path.open("a+b", buffering=0) as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash cut the line before short
                    line = b"\n" + line
            file.write(line)

    def entries(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none when there is no file. A torn line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    entries: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


class LiveView:
    """How training goes, for whoever watches: a progress bar on a terminal, a line now and then elsewhere.

    A context manager; leaving it, by Ctrl-C too, gives the terminal back as it was. ``start`` is the number of steps
    done before a resume. Without a terminal it prints the first step, the last one, and between them at most one line
    in ``interval_seconds``. ``quiet`` prints nothing.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        quiet: bool = False,
        console: Console | None = None,
        interval_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start = total, start
        self._quiet, self._interval, self._clock = quiet, interval_seconds, clock
        self._console = console or Console()
        self._began = clock()
        self._printed: float | None = None
        self._live: Live | None = None
        if not quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._console,
                expand=True,
            )
            self._task = self._progress.add_task("training", total=total, completed=start)
            self._numbers = Text("waiting for the first step")
            self._live = Live(Group(self._progress, self._numbers), console=self._console, refresh_per_second=4)

    def __enter__(self) -> "LiveView":
        self._began = self._clock()
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        tokens_per_second: float,
        expert_load: float | None = None,
        hidden: float | None = None,
    ) -> None:
        """Show a finished step, counted from 1; ``expert_load`` is the busiest expert's tokens over the mean,
        ``hidden`` the share of dispatch and combine that went on beside computation."""
        numbers = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  gradient norm {grad_norm:.3f}"
        if expert_load is not None:
            numbers += f"  expert load {expert_load:.2f}x mean"
        if hidden is not None:
            numbers += f"  dispatch {hidden:.0%} hidden"
        if self._live:
            self._progress.update(self._task, completed=step)
            self._numbers.plain = numbers
        elif not self._quiet and self._is_due(step):
            self._printed = self._clock()
            self._plain(f"step {step}/{self._total}  {numbers}  {self._left(step)} left")

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._quiet:
            self._plain(text)

    def _plain(self, text: str) -> None:
        # soft_wrap: a line in a log file is one line, however wide the file is thought to be.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _is_due(self, step: int) -> bool:
        first_or_last = self._printed is None or step >= self._total
        return first_or_last or self._clock() - (self._printed or 0.0) >= self._interval

    def _left(self, step: int) -> str:
        done = max(step - self._start, 1)
        seconds = (self._clock() - self._began) / done * max(self._total - step, 0)
        return str(timedelta(seconds=round(seconds)))


def print_summary(
    entries: Sequence[Mapping[str, Any]],
    *,
    validation_bits_per_byte: float | None,
    run_dir: str,
    config_path: str,
    overrides: Sequence[str] = (),
    invocation: Invocation | None,
    console: Console | None = None,
) -> None:
    """What came of a run, from the steps in its metrics, and the command that goes on with it.

    ``invocation`` is what started the run, where that is known; ``overrides`` are those that it was started with. Both
    are part of what to run next. Times are medians, which the slow first steps do not move.
    """
    console = console or Console()
    rows: list[tuple[str, str]] = []
    steps = _step(entries[-1]) if entries else 0
    if entries:
        first, last = (_number(entries[at].get("loss"), ".4f") for at in (0, -1))
        rows.append(("loss", f"{first} at step {_step(entries[0])}, {last} at step {steps}"))
        if "mtp_loss" in entries[-1]:
            first, last = (_number(entries[at].get("mtp_loss"), ".4f") for at in (0, -1))
            rows.append(("mtp loss", f"{first} at step {_step(entries[0])}, {last} at step {steps}"))
    if validation_bits_per_byte is not None:
        rows.append(("validation loss", f"{validation_bits_per_byte:.4f} bits per byte"))
    for key, label, form, unit in (
        ("step_seconds", "time per step", ".3f", "s (median)"),
        ("tokens_per_second", "speed", ",.0f", "tokens/s (median)"),
    ):
        middle = median(entries, key)
        if middle is not None:
            rows.append((label, f"{middle:{form}} {unit}"))
    rows.append(("run folder", run_dir))
    own = [given for given in overrides if given.partition("=")[0].strip() not in ("run.dir", "train.steps")]
    folder = [] if Path(config_path) == Path(run_dir) else [f"run.dir={run_dir}"]
    longer = f"train.steps={2 * max(steps, 1)}"
    if invocation is None:
        rows.append(("to go on", f"give the same command with {longer}"))
    else:
        rows.append(("to go on", invocation.of([config_path, *own, *folder, longer])))
    for label, text in rows:
        console.print(f"{label:<16} {text}", markup=False, highlight=False, soft_wrap=True)


def median(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The median of the steps that have a number under ``key``; None when none has."""
    values = [entry[key] for entry in entries if isinstance(entry.get(key), (int, float))]
    return statistics.median(values) if values else None


def _is_step(entry: Mapping[str, Any]) -> bool:
    return type(entry.get("step")) is int


def _step(entry: Mapping[str, Any]) -> int:
    step = entry.get("step")
    assert isinstance(step, int), entry
    return step


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "not finite"


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_finite(entry), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with null for every float that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
