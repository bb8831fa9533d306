"""When the slots of a compute order run, computed fast enough to try thousands of orders.

The times are those that ``simulate`` gives the same order once it is lowered, on an eager transport, without the end of
the step; a test compares the two. A slot is an integer here. With N works (stage x micro-batches + micro-batch, as in
``holdings.Codes``) and a work w: F is w, I is N + w, W is 2N + w, B is 3N + w, and the pair of a forward f and a
backward b is 4N + f N + b.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from dualpipe.cost import Costs, CostTable
from dualpipe.holdings import Codes
from dualpipe.program import Compute, Op, Overlap, Program, Slot, Work

Order = list[list[int]]
"""The slots of each rank."""

_OPS = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT, Op.BACKWARD)
EPSILON = 1e-9  # sums of the same durations in another order differ by less


@dataclass(frozen=True)
class Times:
    starts: list[list[float]]  # of each rank's slots
    ends: list[list[float]]
    makespan: float


class Pipeline:
    """Placement and costs as tables. A message is the work that it is an input of, plus N for a gradient."""

    def __init__(self, empty: Program, costs: Costs) -> None:
        codes, table = Codes(empty), CostTable(costs, empty)
        self.empty = empty
        self.works = works = empty.stages * empty.microbatches
        self.rank_of = codes.owner
        self.duration = [table.of[op][work // empty.microbatches] for op in _OPS for work in range(works)]
        self.pair_duration = [[table.pair(f, b) for b in range(empty.stages)] for f in range(empty.stages)]
        self.needs = [-1] * (4 * works)
        self.gives = [-1] * (4 * works)
        self.link = [-1] * (2 * works)  # of each message: from rank x ranks + to rank; -1 when it stays on its rank
        for work in range(works):
            self._connect(work)
        pairs = [(a, b) for a in range(empty.ranks) for b in range(empty.ranks)]
        self.transfer = [table.transfer(a, b) if a != b else (0.0, 0.0) for a, b in pairs]

    def _connect(self, work: int) -> None:
        n, per_stage = self.works, self.empty.microbatches
        if work >= per_stage:
            self.needs[work] = work
            self.gives[n + work] = self.gives[3 * n + work] = n + work - per_stage
            self._set_link(n + work - per_stage, work, work - per_stage)
        if work < n - per_stage:
            self.gives[work] = work + per_stage
            self.needs[n + work] = self.needs[3 * n + work] = n + work
            self._set_link(work + per_stage, work, work + per_stage)

    def _set_link(self, message: int, source: int, target: int) -> None:
        one, other = self.rank_of[source], self.rank_of[target]
        self.link[message] = one * self.empty.ranks + other if one != other else -1

    def pair(self, forward: int, backward: int) -> int:
        return 4 * self.works + forward * self.works + backward

    def halves(self, slot: int) -> tuple[int, ...]:
        """The operations of a slot, none of them a pair, as they are done."""
        if slot < 4 * self.works:
            return (slot,)
        forward, backward = divmod(slot - 4 * self.works, self.works)
        return forward, 3 * self.works + backward

    def length(self, slot: int) -> float:
        if slot < 4 * self.works:
            return self.duration[slot]
        forward, backward = divmod(slot - 4 * self.works, self.works)
        return self.pair_duration[forward // self.empty.microbatches][backward // self.empty.microbatches]

    def play(self, order: Order) -> Times | None:
        """Every slot as soon as its rank and its inputs are there; None when the ranks wait for each other for ever."""
        works, needs, gives, duration = self.works, self.needs, self.gives, self.duration
        ranks, single = len(order), 4 * self.works
        arrival = [inf] * (2 * works)
        links = [0.0] * (ranks * ranks)
        asleep = [False] * (2 * works)
        starts: list[list[float]] = [[] for _ in order]
        ends: list[list[float]] = [[] for _ in order]
        awake = list(reversed(range(ranks)))

        def send(message: int, end: float) -> None:
            link = self.link[message]
            if link < 0:
                arrival[message] = end
                return
            occupied, latency = self.transfer[link]
            links[link] = free = max(end, links[link]) + occupied
            arrival[message] = free + latency
            if asleep[message]:
                awake.append(link % ranks)

        while awake:
            rank = awake.pop()
            slots, started, ended = order[rank], starts[rank], ends[rank]
            clock = ended[-1] if ended else 0.0
            for index in range(len(started), len(slots)):
                slot = slots[index]
                start, second, backward = clock, -1, slot
                if slot >= single:
                    slot, backward = self.halves(slot)
                    second = needs[slot]
                    if second >= 0 and arrival[second] > start:
                        start = arrival[second]
                first = needs[backward]
                if first >= 0 and arrival[first] > start:
                    start = arrival[first]
                if start == inf:
                    asleep[first if first >= 0 and arrival[first] == inf else second] = True
                    break
                clock = start + (duration[slot] if slot == backward else self.length(slots[index]))
                started.append(start)
                ended.append(clock)
                if gives[slot] >= 0:
                    send(gives[slot], clock)
                if backward != slot and gives[backward] >= 0:
                    send(gives[backward], clock)
        if any(len(ended) < len(slots) for ended, slots in zip(ends, order, strict=True)):
            return None
        return Times(starts, ends, max(ended[-1] for ended in ends if ended))

    def peak(self, slots: Sequence[int]) -> int:
        """The most works that a rank holds at once: from F to B, or to W."""
        alive = most = 0
        for slot in slots:
            if slot >= 4 * self.works:
                most = max(most, alive + 1)
            elif slot < self.works:
                alive += 1
                most = max(most, alive)
            elif slot >= 2 * self.works:
                alive -= 1
        return most

    def read(self, program: Program) -> Order:
        """The order of a compute-only program of this placement."""
        return [[self._code(slot) for slot in slots] for slots in program.slots]

    def write(self, order: Order, schedule: str) -> Program:
        """The compute-only program of an order."""
        slots = tuple(tuple(map(self._slot, rank)) for rank in order)
        return Program(schedule, self.empty.microbatches, self.empty.routes, slots)

    def _code(self, slot: Slot) -> int:
        match slot:
            case Compute(op, work):
                return _OPS.index(op) * self.works + self._work(work)
            case Overlap(forward, backward):
                return self.pair(self._work(forward), self._work(backward))
            case _:
                raise AssertionError(slot)

    def _work(self, work: Work) -> int:
        return work.stage * self.empty.microbatches + work.microbatch

    def _slot(self, code: int) -> Slot:
        halves = [divmod(half, self.works) for half in self.halves(code)]
        works = [Work(*divmod(work, self.empty.microbatches)) for _, work in halves]
        return Overlap(*works) if len(works) == 2 else Compute(_OPS[halves[0][0]], works[0])
