"""The state of every rank in host memory, its own and a peer's, so that a lost rank or node costs no more than a step.

After a step each rank copies what it would lose into memory that outlives it, and sends it to its *keeper*, a rank on
another node where there is one (``Layout.keeper``). Both hold the last two such snapshots. The copying happens during
the next forward and backward, and STEP waits until every rank has sealed its own snapshot and the one that it keeps for
its peer: when masters change, the snapshot before is whole everywhere, and the one that is next overwritten is the one
before that. So whatever dies whenever, a common step is left, at most one behind the last that was done.

The memory is two regions a rank, files that somebody who outlives the ranks holds (``launch/keeper.py``). A region has
two slots, each a page with the mark of what is in it, pages that say which pieces these are, and their values one
behind the other. A slot whose mark is absent or torn holds nothing. Ranks of another layout cannot go on from it, but
make a checkpoint of it (``rescue.py``).
"""

import hashlib
import json
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from mmap import mmap
from os import posix_fallocate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.activity import collective_timeout
from parallel.checkpoint import Progress, adopt, pieces
from parallel.flips import Flip
from parallel.recovery import Choice, Copy, newest_whole
from parallel.snapshot import Piece, Snapshot, as_bytes, size_bytes
from parallel.worker import Worker

_PAGE_BYTES = 4096
_SLOTS = 2
_BLOCK_BYTES = 1 << 20
_WHAT = {
    "rng": "generator",
    "master": "master weights",
    "first_moment": "first moments",
    "second_moment": "second moments",
    "ema": "average",
    "bias": "router biases",
}
"""What the pieces of a snapshot are, by the first word of their names."""


@dataclass(frozen=True)
class Mark:
    """What a slot holds: the state of ``owner`` of so many ``ranks``, in so many ``bytes``; ``digest`` says which
    pieces in which order, ``layout`` how ranks divide them."""

    owner: int
    ranks: int
    layout: str
    step: int
    sequences: int
    digest: str
    bytes: int
    crc32: int


class Slot:
    """Room for one snapshot: ``page`` for its mark and ``values``, both uint8."""

    def __init__(self, page: Tensor, values: Tensor) -> None:
        self.page, self.values = page, values

    def clear(self) -> None:
        self.page.zero_()

    def seal(self, mark: Mark) -> None:
        text = json.dumps(asdict(mark)).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        self.page[: len(line)] = torch.frombuffer(bytearray(line), dtype=torch.uint8)

    def mark(self) -> Mark | None:
        """What was sealed; whether the values are still that is for ``is_whole`` to say."""
        checksum, _, text = bytes(as_bytes(self.page)).partition(b"\n")[0].partition(b" ")
        try:
            return Mark(**json.loads(text)) if int(checksum, 16) == zlib.crc32(text) else None
        except (ValueError, TypeError):
            return None

    def is_whole(self) -> bool:
        mark = self.mark()
        return mark is not None and checksum_of(self.values) == mark.crc32


def checksum_of(values: Tensor) -> int:
    checksum, data = 0, as_bytes(values).data
    for low in range(0, len(data), _BLOCK_BYTES):
        checksum = zlib.crc32(data[low : low + _BLOCK_BYTES], checksum)
    return checksum


def region(path: Path, size: int) -> list[Slot]:
    """The slots of a region for snapshots of ``size`` bytes, with what is in them; its memory is taken here. Raises
    OSError when there is not enough."""
    length = _PAGE_BYTES * (1 + -(-size // _PAGE_BYTES))  # whole pages: CUDA pins a page once only
    with path.open("r+b") as file:
        posix_fallocate(file.fileno(), 0, _SLOTS * length)
        memory = torch.frombuffer(mmap(file.fileno(), _SLOTS * length), dtype=torch.uint8)
    slots = [memory[number * length : (number + 1) * length] for number in range(_SLOTS)]
    return [Slot(slot[:_PAGE_BYTES], slot[_PAGE_BYTES : _PAGE_BYTES + size]) for slot in slots]


@dataclass(frozen=True)
class Cost:
    """Of one snapshot, on this rank. ``bytes``: sent to the keeper; ``waited_seconds``: by STEP, for all of it;
    ``cpu_seconds``: of the thread that copies, computes the checksum and sends."""

    bytes: int = 0
    waited_seconds: float = 0.0
    cpu_seconds: float = 0.0


class Replica:
    """A rank's side of it, for snapshots after each ``every``-th step. Collective, and so are its methods but for those
    that forget. ``own`` and ``kept``: the files of the regions for its own snapshots and its peer's. Raises OSError
    when memory is short.

    ``begin`` after a step; the masters must not change until ``finish`` returns.
    """

    def __init__(self, worker: Worker, every: int, own: Path, kept: Path) -> None:
        self.every = every
        layout = worker.job.layout
        self.worker, self.rank, self.ranks = worker, worker.rank, layout.world_size
        self.keeper, self.peer = layout.keeper(worker.rank), layout.kept(worker.rank)
        self._rng = torch.get_rng_state()
        self._pieces = pieces(worker, self._rng, loading=True)
        self.layout, described = layout_of(worker), describe(self._pieces)
        self.digest = hashlib.sha256(described).hexdigest()
        self.bytes = len(described) + size_bytes(self._pieces)
        self._group = dist.new_group(backend="gloo", timeout=collective_timeout(worker.job.timeout_seconds))
        self._about: list[tuple[int, str]] = [(0, "")] * self.ranks
        dist.all_gather_object(self._about, (self.bytes, self.digest), group=self._group)
        self.own = region(own, self.bytes)
        self.kept = [] if self.peer == self.rank else region(kept, self._about[self.peer][0])
        for slot in self.own:
            slot.values[: len(described)] = torch.frombuffer(bytearray(described), dtype=torch.uint8)
        self._snapshots = [Snapshot(self._pieces, slot.values[len(described) :]) for slot in self.own]
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._current: int | None = None
        """The slot with the snapshot of the state that the rank is in."""
        self.held_bytes = _SLOTS * (self.bytes + (self._about[self.peer][0] if self.kept else 0))
        self.cost = Cost()

    def begin(self, progress: Progress) -> None:
        """Take a snapshot of the state as it is, if one is due. ``cost`` is then this one's, and nothing otherwise."""
        self.cost, self._current = Cost(), None
        if progress.step % self.every:
            return
        assert self._thread is None
        self._rng.copy_(torch.get_rng_state())
        number = self._current = self._number(progress.step)
        self._snapshots[number].mark()
        self._thread = threading.Thread(target=self._run, args=(progress, number), name="replica", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the snapshot that was begun, if any, here and at the keeper."""
        if self._thread is None:
            return
        began = time.perf_counter()
        with self.worker.activity.waiting("snapshot of the step before", [self.keeper, self.peer]):
            self._thread.join()
        self._thread = None
        self.cost = Cost(self.cost.bytes, time.perf_counter() - began, self.cost.cpu_seconds)
        if self._error is not None:
            raise self._error

    def flips(self) -> list[Flip]:
        """What of this rank is not as it was when the snapshot of the state that it is in was taken, though nothing has
        changed it: masters and moments, among others. Nothing where no such snapshot was taken. The snapshot is right
        if it has its checksum, which the keeper has too. To be called after ``finish``, before the update; not
        collective."""
        if self._current is None:
            return []
        changed = self._snapshots[self._current].changed()
        if not changed or not self.own[self._current].is_whole():
            return []
        kinds = {self._pieces[number].name.partition(".")[0] for number in changed}
        return [Flip(self.rank, what) for kind, what in _WHAT.items() if kind in kinds]

    def newest(self) -> Choice | None:
        """The newest step that can be restored, every copy of it read and found whole."""

        def damaged_of(copies: list[Copy]) -> list[Copy]:
            mine = [copy for copy in copies if copy.holder == self.rank]
            return self._gather([copy for copy in mine if not self._slot(copy).is_whole()])

        return newest_whole(self._marked(), self.ranks, damaged_of)

    def restore(self, choice: Choice) -> Progress:
        """Go on from a step that ``newest`` gave."""
        progress: Progress | None = None
        if self.worker.average is not None:
            self.worker.average.finish()
        for copy in choice.copies():
            if copy.holder == self.rank:
                slot = self._slot(copy)
                if copy.owner == self.rank:
                    progress = self._take(slot)
                else:
                    dist.send(slot.page, copy.owner, group=self._group)
                    dist.send(slot.values, copy.owner, group=self._group)
            elif copy.owner == self.rank:
                slot = self.own[self._number(copy.step)]
                slot.clear()
                page = torch.zeros_like(slot.page)
                dist.recv(page, copy.holder, group=self._group)
                dist.recv(slot.values, copy.holder, group=self._group)
                slot.page.copy_(page)
                progress = self._take(slot)
        assert progress is not None, "every rank owns a copy"
        adopt(self.worker, progress, self._rng)
        return progress

    def forget_after(self, step: int) -> None:
        """Drop what is of later steps: they will be taken again, maybe with other bits. The rank is in another state
        now than the last snapshot."""
        self._current = None
        for slot in [*self.own, *self.kept]:
            mark = slot.mark()
            if mark is not None and mark.step > step:
                slot.clear()

    def forget(self) -> None:
        """Lose all that this rank holds, as the end of its node would."""
        for slot in [*self.own, *self.kept]:
            slot.clear()

    def _number(self, step: int) -> int:
        """The slot of a step: the other one than that of the snapshot before."""
        return step // self.every % _SLOTS

    def _run(self, progress: Progress, number: int) -> None:
        began = time.thread_time()
        try:
            slot = self.own[number]
            slot.clear()
            if self.worker.average is not None:  # its thread may still be taking in the last step
                self.worker.average.finish()
            self._snapshots[number].fill()
            where = progress.step, progress.sequences, self.digest, self.bytes
            slot.seal(Mark(self.rank, self.ranks, self.layout, *where, checksum_of(slot.values)))
            if self.kept:
                self._exchange(slot, self.kept[number])
        except Exception as error:  # raised where the loop waits
            self._error = error
        self.cost = Cost(slot.values.nbytes if self.kept else 0, 0.0, time.thread_time() - began)

    def _exchange(self, own: Slot, kept: Slot) -> None:
        kept.clear()
        page = torch.zeros_like(kept.page)
        work = [
            dist.irecv(kept.values, self.peer, group=self._group, tag=1),
            dist.irecv(page, self.peer, group=self._group, tag=2),
            dist.isend(own.values, self.keeper, group=self._group, tag=1),
            dist.isend(own.page, self.keeper, group=self._group, tag=2),
        ]
        for one in work:
            assert one is not None
            one.wait()
        kept.page.copy_(page)

    def _marked(self) -> list[Copy]:
        """What all ranks hold by the marks of their slots."""
        own = []
        for slot in [*self.own, *self.kept]:
            mark = slot.mark()
            if mark is not None and mark.layout == self.layout and mark.digest == self._about[mark.owner][1]:
                own.append(Copy(mark.owner, self.rank, mark.step))
        return self._gather(own)

    def _slot(self, copy: Copy) -> Slot:
        slots = self.own if copy.owner == self.rank else self.kept
        return next(s for s in slots if (mark := s.mark()) is not None and mark.step == copy.step)

    def _take(self, slot: Slot) -> Progress:
        mark = slot.mark()
        assert mark is not None and mark.owner == self.rank, mark
        snapshot = self._snapshots[next(n for n, one in enumerate(self.own) if one is slot)]
        for piece, value in zip(self._pieces, snapshot.tensors, strict=True):
            piece.tensor.copy_(value)
        return Progress(mark.step, mark.sequences)

    def _gather(self, own: list[Copy]) -> list[Copy]:
        """Those of all ranks."""
        found: list[list[Copy]] = [[]] * self.ranks
        dist.all_gather_object(found, own, group=self._group)
        return [copy for part in found for copy in part]


def layout_of(worker: Worker) -> str:
    layout = worker.job.layout
    return f"{layout.pipeline} x {layout.data} x {layout.expert}"


def describe(pieces: Sequence[Piece]) -> bytes:
    """Which elements of which tensors, in which order and type; whole pages."""
    rows = [(p.name, p.offset, p.tensor.numel(), p.total, str(p.tensor.dtype)) for p in pieces]
    line = json.dumps(rows).encode() + b"\n"
    return line.ljust(-(-len(line) // _PAGE_BYTES) * _PAGE_BYTES, b"\0")


def described(values: Tensor) -> list[Piece]:
    """The pieces that a snapshot says it has, as they are there."""
    data = as_bytes(values)
    line = bytes(data[: int((data == ord("\n")).argmax())])
    start, found = -(-(len(line) + 1) // _PAGE_BYTES) * _PAGE_BYTES, []
    for name, offset, numel, total, dtype in json.loads(line):
        kind = getattr(torch, dtype.removeprefix("torch."))
        tensor = values[start : start + numel * kind.itemsize].view(kind)
        found.append(Piece(name, tensor, offset, total))
        start += size_bytes(found[-1:])
    return found


def left_in(path: Path) -> list[Slot]:
    """The slots of a region whose size is not known, with marks."""
    length = path.stat().st_size // _SLOTS
    if not length:
        return []
    with path.open("r+b") as file:
        memory = torch.frombuffer(mmap(file.fileno(), _SLOTS * length), dtype=torch.uint8)
    found = []
    for low in (number * length for number in range(_SLOTS)):
        slot = Slot(memory[low : low + _PAGE_BYTES], memory[low + _PAGE_BYTES : low + length])
        if (mark := slot.mark()) is not None:
            found.append(Slot(slot.page, slot.values[: mark.bytes]))
    return found
