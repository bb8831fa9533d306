"""Local search on an order: a slot moved, a backward split or made whole, a pair made or undone.

The makespan is the length of a critical path: slots of which each begins when the one before it ends, or when its
message arrives. Only a change on that path can shorten the step, as in job-shop scheduling (van Laarhoven, Aarts and
Lenstra, "Job Shop Scheduling by Simulated Annealing", 1992), so most changes are made there. A change stays by the rule
of late acceptance (Burke and Bykov, 2017): when the step is no longer than that of some tries ago. The rule needs no
schedule of temperatures, so a search can stop at any time.
"""

from itertools import chain, pairwise
from random import Random

from dualpipe.search.block import meeting
from dualpipe.search.timing import EPSILON, Order, Pipeline, Times

_MEMORY = 50  # tries that late acceptance looks back
_REACH = 8  # slots that a change moves a slot by
_STALE = 1000  # tries without a better order, after which the search goes back to its best one


class Refiner:
    """``best`` is the best order so far, ``makespan`` its time. ``limit``: the most works that a rank may hold."""

    def __init__(self, pipeline: Pipeline, order: Order, limit: int, rng: Random) -> None:
        times = pipeline.play(order)
        assert times is not None and max(map(pipeline.peak, order)) <= limit
        self.p, self.limit, self.rng = pipeline, limit, rng
        self.best, self.makespan = order, times.makespan
        self.order, self.times = order, times
        self.past = [times.makespan] * _MEMORY
        self.tries = self.stale = 0
        self.critical: list[tuple[int, int]] = []  # found when it is asked for
        self.saves = any(
            meeting(pipeline, f * pipeline.empty.microbatches, 3 * pipeline.works + b * pipeline.empty.microbatches + 1)
            for f in range(pipeline.empty.stages)
            for b in range(pipeline.empty.stages)
            if pipeline.empty.microbatches > 1
        )

    def step(self) -> bool:
        """Try one change. Returns whether there is a new best order."""
        rank, slots = self._change()
        self.tries += 1
        self.stale += 1
        if self.stale > _STALE:
            self._accept(self.best, self.p.play(self.best))
            self.past, self.stale = [self.makespan] * _MEMORY, 0
            return False
        if slots == self.order[rank] or not self._legal(slots):
            return False
        order = [*self.order[:rank], slots, *self.order[rank + 1 :]]
        times = self.p.play(order)
        place = self.tries % _MEMORY
        if times is not None and times.makespan <= max(self.past[place], self.times.makespan) + EPSILON:
            self._accept(order, times)
        self.past[place] = min(self.past[place], self.times.makespan)
        if self.times.makespan < self.makespan - EPSILON:
            self.best, self.makespan, self.stale = self.order, self.times.makespan, 0
            return True
        return False

    def _accept(self, order: Order, times: Times | None) -> None:
        assert times is not None
        self.order, self.times, self.critical = order, times, []

    def _change(self) -> tuple[int, list[int]]:
        """A rank and its changed slots; unchanged when nothing can be changed there."""
        rng = self.rng
        if rng.random() < 0.15:
            rank = rng.randrange(len(self.order))
            index = rng.randrange(len(self.order[rank]))
        else:
            self.critical = self.critical or self._critical()
            rank, index = rng.choice(self.critical)
        slots = list(self.order[rank])
        kind = rng.random()
        if kind < 0.3 and (changed := self._reshaped(slots, index)):
            return rank, changed
        here = index
        if kind < 0.65:  # let the slot before go later
            here, there = max(index - 1, 0), index + rng.randrange(_REACH)
        else:  # go earlier
            there = max(0, index - 1 - rng.randrange(_REACH))
        slot = slots.pop(here)
        slots.insert(there, slot)
        return rank, slots

    def _reshaped(self, slots: list[int], index: int) -> list[int] | None:
        """B split and its W put off, I and W joined, a pair made or undone: what fits the slot at this place."""
        works, slot, rng = self.p.works, slots[index], self.rng
        op, work = divmod(slot, works)
        if op >= 4:
            halves = self.p.halves(slot)
            slots[index : index + 1] = halves if rng.random() < 0.5 else reversed(halves)
            return slots
        if self.saves and op in (0, 3) and rng.random() < 0.7:
            for other in range(max(0, index - _REACH), min(len(slots), index + _REACH + 1)):
                if other != index and (pair := meeting(self.p, slot, slots[other])) is not None:
                    slots[min(index, other)] = pair
                    del slots[max(index, other)]
                    return slots
        if op == 3:
            slots[index] = works + work
            slots.insert(min(len(slots), index + 1 + rng.randrange(2 * _REACH)), 2 * works + work)
            return slots
        if op in (1, 2):
            one, other = slots.index(works + work), slots.index(2 * works + work)
            slots[rng.choice((one, other))] = 3 * works + work
            slots.remove(2 * works + work if slots[one] == 3 * works + work else works + work)
            return slots
        return None

    def _legal(self, slots: list[int]) -> bool:
        """Whether a rank could run the slots in this order, in the memory that it has."""
        works, seen = self.p.works, set[int]()
        for slot in slots:
            if slot < 4 * works:
                op, work = divmod(slot, works)
                if op and (works + work if op == 2 else work) not in seen:
                    return False
                seen.add(slot)
            else:
                forward, backward = divmod(slot - 4 * works, works)
                if backward not in seen:
                    return False
                seen.add(forward)
        return self.p.peak(slots) <= self.limit

    def _critical(self) -> list[tuple[int, int]]:
        """The slots of a critical path, as (rank, place), that begin when the slot before them ends; the last slot of
        the path when there is none."""
        starts, ends = self.times.starts, self.times.ends
        place = {
            half: (rank, index)
            for rank, slots in enumerate(self.order)
            for index, slot in enumerate(slots)
            for half in self.p.halves(slot)
        }
        rank = max(range(len(ends)), key=lambda r: ends[r][-1])
        at, found = (rank, len(ends[rank]) - 1), []
        last = at
        while True:
            rank, index = at
            follows = index > 0 and starts[rank][index] == ends[rank][index - 1]
            makers = [place[maker] for maker in self._makers(self.order[rank][index], place) if place[maker][0] != rank]
            # The message that arrived last is that of the maker that ended last, up to the speed of its link.
            maker = max(makers, key=lambda m: ends[m[0]][m[1]], default=None)
            if follows:
                found.append(at)
            if follows and (maker is None or ends[maker[0]][maker[1]] < starts[rank][index] - EPSILON):
                at = rank, index - 1
            elif maker is not None:
                at = maker
            elif index > 0:
                at = rank, index - 1
            else:
                return found or [last]

    def _makers(self, slot: int, place: dict[int, tuple[int, int]]) -> list[int]:
        """The operations that make a slot's inputs."""
        works, per_stage = self.p.works, self.p.empty.microbatches
        found = []
        for half in self.p.halves(slot):
            op, work = divmod(half, works)
            if self.p.needs[half] >= 0:
                found.append(
                    [work - per_stage] if op == 0 else [works + work + per_stage, 3 * works + work + per_stage]
                )
        return [maker for maker in chain.from_iterable(found) if maker in place]


def joined(pipeline: Pipeline, order: Order) -> Order:
    """The order with every I and W that stand side by side as a B, where that does not lengthen the step: the whole
    backward is what layers do best. Memory only shrinks."""
    times = pipeline.play(order)
    assert times is not None
    works, makespan = pipeline.works, times.makespan

    def join(order: Order, chosen: set[int]) -> Order:
        """``chosen``, as long as the step stays as short: all at once, or half by half."""
        changed = [_join(slots, works, chosen) for slots in order]
        times = pipeline.play(changed)
        if times is not None and times.makespan <= makespan + EPSILON:
            return changed
        if len(chosen) == 1:
            return order
        middle = sorted(chosen)[len(chosen) // 2]
        first = join(order, {work for work in chosen if work < middle})
        return join(first, {work for work in chosen if work >= middle})

    candidates = {
        one - works
        for slots in order
        for one, other in pairwise(slots)
        if works <= one < 2 * works and other == one + works
    }
    return join(order, candidates) if candidates else order


def _join(slots: list[int], works: int, chosen: set[int]) -> list[int]:
    out = []
    for slot in slots:
        op, work = divmod(slot, works)
        if op not in (1, 2) or work not in chosen:
            out.append(slot)
        elif op == 1:
            out.append(3 * works + work)
    return out
