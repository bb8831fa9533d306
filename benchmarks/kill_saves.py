"""Is the last committed checkpoint there after a kill at any moment of a save?

    python -m benchmarks.kill_saves [--kills 1000 | --every] [--seed 0] [--folder FOLDER] [--json]

A small state is saved over and over into one folder, each time by a process of its own that is ended by SIGKILL at a
moment drawn at random, first its kind and then its number: before, in the middle of or after a write, before or after
an fsync, or as a file or folder is opened, made, renamed or removed; at once or behind a loop; a new step or the same
one again. What such a save left is there when the next one begins. After each kill the disk loses what nobody made it
keep, as when the power goes: half of every file that was written and not flushed since. Then the newest whole
checkpoint has to be the one that was committed before, or the one that was being saved, and that one for certain if the
save had returned.

Exit status: 0 when no committed checkpoint was lost, 1 otherwise.
"""

import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from parallel.checkpoint import Progress, damage, published, step_of
from parallel.mesh import Layout
from parallel.optimizer_config import OptimizerConfig
from parallel.saver import Saver
from parallel.worker import Job, Worker

AUDITED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=16,
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
)


@dataclass
class Outcome:
    """``at``: kills by what the save was doing; ``lost``: what went wrong, a line each."""

    kills: int = 0
    finished: int = 0
    at: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


class _Doom:
    """Ends this process at moment number ``number``, counted from 0, of its ``kind``. Files that the disk may lose are
    reported: one line for each write and each flush of an inode, into ``report``."""

    def __init__(self, folder: Path, kind: str, number: int, report: int) -> None:
        self.folder, self.kind, self.number, self.report = os.fspath(folder), kind, number, report
        self.seen: Counter[str] = Counter()
        self._fsync, self._open = os.fsync, io.open
        sys.addaudithook(self._audit)
        setattr(os, "fsync", self._flush)  # noqa: B010
        setattr(io, "open", self._opened)  # noqa: B010

    def moment(self, kind: str) -> None:
        if kind == self.kind and self.seen[kind] == self.number:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen[kind] += 1

    def tell(self, what: str, descriptor: int) -> None:
        os.write(self.report, f"{what} {os.fstat(descriptor).st_ino}\n".encode())

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in AUDITED and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            if str(path).startswith(self.folder):
                self.moment(event)

    def _flush(self, descriptor: Any) -> None:
        self.moment("fsync")
        self._fsync(descriptor)
        self.tell("flushed", descriptor)
        self.moment("fsync")

    def _opened(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = self._open(file, mode, *arguments, **options)
        if "w" not in mode or not str(file).startswith(self.folder):
            return opened
        opened.close()
        written = io.BufferedWriter(_Torn(os.fspath(file), self))
        return written if "b" in mode else io.TextIOWrapper(written, encoding="utf-8")


class _Torn(io.FileIO):
    """A file whose writes may end in their middle."""

    def __init__(self, path: str, doom: _Doom) -> None:
        super().__init__(path, "w")
        self._doom = doom

    def write(self, data: Any) -> int:
        self._doom.tell("written", self.fileno())
        self._doom.moment("write")
        view = memoryview(data).cast("B")
        half = super().write(view[: len(view) // 2])
        self._doom.moment("write")
        rest = super().write(view[half:])
        self._doom.moment("write")
        return (half or 0) + (rest or 0)


def tiny_worker() -> Worker:
    """A process that is the whole job."""
    return Worker(
        Job(
            model=MODEL,
            layout=Layout(),
            schedule="dualpipe",
            dtype=torch.float32,
            device=torch.device("cpu"),
            seed=1,
            sequence_length=4,
            global_batch_size=2,
            micro_batch_size=1,
            optimizer=OptimizerConfig(),
        ),
        0,
    )


def kill_saves(folder: Path, kills: int, seed: int) -> Outcome:
    """Kill so many saves into ``folder`` at random and look after each."""
    draw, saves = random.Random(seed), _Saves(folder)
    numbers = saves.count_moments()
    while saves.outcome.kills < kills:
        again, asynchronous = draw.random() >= 0.8, draw.random() < 0.5
        kind = draw.choice(sorted(numbers))
        saves.kill(again, asynchronous, kind, draw.randrange(numbers[kind] + 1))
    return saves.outcome


def kill_every_save(folder: Path) -> Outcome:
    """Kill a save at each of its moments, one after the other: of a new step and of the same one again, at once and
    behind a loop; and look after each."""
    saves = _Saves(folder)
    for again, asynchronous in product((False, True), (False, True)):
        for kind in sorted(saves.count_moments()):
            number = 0
            while saves.kill(again, asynchronous, kind, number):
                number += 1
    return saves.outcome


class _Saves:
    """Saves into one folder, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.outcome = Outcome()
        self._folder, self._worker, self._committed = folder, tiny_worker(), 0

    def count_moments(self) -> dict[str, int]:
        """How many moments of each kind an undisturbed save has."""
        whole = _one(self._folder, self._worker, self._committed, False, "none", 0)
        counts = [line.split()[1:] for line in whole.report if line.startswith("of ")]
        return {kind: int(count) for kind, count in counts}

    def kill(self, again: bool, asynchronous: bool, kind: str, number: int) -> bool:
        """Save a new step, or the last one ``again``, and kill that at the moment -> whether there was such a one."""
        committed, outcome = self._committed, self.outcome
        step = committed + (not again)
        save = _one(self._folder, self._worker, step, asynchronous, kind, number)
        outcome.finished += save.returned
        outcome.kills += not save.returned
        outcome.at[kind] += not save.returned
        _lose_power(self._folder, save.report)
        newest = max((step_of(path) for path in published(self._folder) if damage(path) is None), default=-1)
        if not (step if save.returned else committed) <= newest <= step:
            how = "behind a loop" if asynchronous else "at once"
            outcome.lost.append(
                f"save of step {step} {how}, {kind} number {number}: the newest whole checkpoint is of step {newest}, "
                f"and {committed} was committed"
            )
        self._committed = max(newest, 0)
        return not save.returned


@dataclass(frozen=True)
class _Save:
    """A save in a process of its own; ``returned``: it was not killed."""

    returned: bool
    report: list[str]


def _one(folder: Path, worker: Worker, step: int, asynchronous: bool, kind: str, number: int) -> _Save:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            warnings.simplefilter("ignore")
            saver = Saver(folder, worker, keep=2, asynchronous=asynchronous)
            doom = _Doom(folder, kind, number, write)
            saver.begin(Progress(step, step))
            saver.finish()
            for name, count in doom.seen.items():
                os.write(write, f"of {name} {count}\n".encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with open(read, "rb") as pipe:
        report = pipe.read().decode().splitlines()
    _, ended = os.waitpid(child, 0)
    if os.WIFEXITED(ended) and os.WEXITSTATUS(ended):
        raise RuntimeError(f"a save of step {step} failed by itself")
    return _Save(os.WIFEXITED(ended), report)


def _lose_power(folder: Path, report: list[str]) -> None:
    """Cut in half what was written and not flushed since."""
    unsafe: set[int] = set()
    for line in report:
        what, _, inode = line.partition(" ")
        if what == "written":
            unsafe.add(int(inode))
        elif what == "flushed":
            unsafe.discard(int(inode))
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_ino in unsafe:
            os.truncate(file, file.stat().st_size // 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill_saves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--every", action="store_true", help="not at random: at each moment once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to make the folder that is saved into")
    parser.add_argument("--json", action="store_true", help="print one object")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        place = Path(folder)
        outcome = kill_every_save(place) if arguments.every else kill_saves(place, arguments.kills, arguments.seed)
    if arguments.json:
        print(json.dumps({"kills": outcome.kills, "at": outcome.at, "lost": outcome.lost}))
    else:
        where = ", ".join(f"{count} {what}" for what, count in outcome.at.most_common())
        print(f"{outcome.kills} saves killed ({where}), {outcome.finished} not: {len(outcome.lost)} lost")
        for line in outcome.lost:
            print(line)
    return int(bool(outcome.lost))


if __name__ == "__main__":
    sys.exit(main())
