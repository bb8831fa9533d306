"""An order made by list scheduling: time goes forward, and a rank that is free takes the most urgent of what it can.

How urgent is a matter of the nominal times of a ``Block``, which only rank what is ready: the actual times are those of
the costs, messages included. Weight gradients fill what is left, as in the automatic scheduler of Qi et al., "Zero
Bubble Pipeline Parallelism" (2023).

A rank must never fill up with micro-batches that cannot go on. So each keeps room for the oldest micro-batch that is
not done on it: the oldest of all then finds room wherever it goes, ends, and leaves its room to the next.
"""

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import inf
from random import Random

from dualpipe.search.block import Block
from dualpipe.search.timing import EPSILON, Order, Pipeline


@dataclass(frozen=True)
class Policy:
    """What list scheduling leaves open."""

    block: Block
    ahead: tuple[int, ...]  # of each rank: the most works that it holds after a forward that is no part of a pair
    deferred: int  # the most weight gradients that a rank puts off while it has other work
    tail: int  # the last backwards of a rank, among which it may put off all
    patience: float  # how long to wait for what is under way, rather than begin W; in durations of W
    courtship: float  # how long to wait for the other half of a pair; in durations of its forward

    @classmethod
    def drawn(cls, rng: Random, passes: int, ranks: int, backwards: int, limit: int) -> "Policy":
        """Any at all; most ranks go ahead as far as their memory lets them."""
        return cls(
            Block.drawn(rng, passes, backwards),
            (max(1, limit - rng.choice((0, 0, 0, 1, 2, 4))),) * ranks,
            deferred=rng.choice((0, 0, 1, 2, 4, 8)),
            tail=rng.choice((0, backwards // 8, backwards // 4, backwards // 2, backwards)),
            patience=rng.choice((0.0, 0.0, 0.3, 0.7, 1.0)),
            courtship=rng.choice((0.0, 0.5, 1.0, 2.0)),
        )

    def mutated(self, rng: Random, backwards: int, limit: int) -> "Policy":
        """One value changed. ``backwards``: of a rank; ``limit``: the most works that it may hold."""
        fields = ["block", "block", "ahead", "deferred", "tail", "patience", "courtship"]
        match name := rng.choice(fields):
            case "block":
                return replace(self, block=self.block.mutated(rng, backwards))
            case "ahead":
                ahead = list(self.ahead)
                for rank in range(len(ahead)) if rng.random() < 0.5 else [rng.randrange(len(ahead))]:
                    ahead[rank] = min(limit, max(1, ahead[rank] + rng.choice((-2, -1, 1, 2))))
                return replace(self, ahead=tuple(ahead))
            case "deferred":
                return replace(self, deferred=rng.choice((0, 1, 2, 4, 8)))
            case "tail":
                return replace(self, tail=rng.randint(0, backwards))
            case "patience":
                return replace(self, patience=rng.choice((0.0, 0.3, 0.5, 0.7, 1.0, 2.0)))
            case "courtship":
                return replace(self, courtship=rng.choice((0.0, 0.3, 0.5, 0.7, 1.0, 2.0)))
            case _:
                raise AssertionError(name)


@dataclass
class _Lane:
    """A stage as a route brings it to a rank. Its works are taken in order, forward and backward."""

    forward: int  # the next work
    backward: int
    first: int
    end: int
    due_forward: float  # of the first work
    due_backward: float


@dataclass
class _Rank:
    """How far a rank is. A micro-batch's age counts from the first, those of all routes in turn."""

    lanes: list[_Lane] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    clock: float = 0.0
    held: int = 0
    backwards: int = 0  # to be begun
    deferred: deque[int] = field(default_factory=deque)
    to_begin: Counter[int] = field(default_factory=Counter)  # age -> works whose forward is to be begun
    to_end: Counter[int] = field(default_factory=Counter)
    oldest: int = 0  # age of the oldest micro-batch that is not done


@dataclass(frozen=True)
class _Choice:
    work: int
    at: float  # when its input is there; infinite while that is not known
    due: float


class Greedy:
    """One run. ``limit``: the most works that a rank may hold, at least the stages that a micro-batch has there."""

    def __init__(self, pipeline: Pipeline, policy: Policy, limit: int) -> None:
        self.p, self.policy, self.limit = pipeline, policy, limit
        self.works, self.per_stage = pipeline.works, pipeline.empty.microbatches
        self.arrival = [inf if pipeline.needs[w] >= 0 else 0.0 for w in range(self.works)]
        self.arrival += [inf if pipeline.needs[self.works + w] >= 0 else 0.0 for w in range(self.works)]
        self.links = [0.0] * len(pipeline.transfer)
        self.ranks = [_Rank() for _ in range(pipeline.empty.ranks)]
        self.lane_of: list[_Lane] = []  # of each work
        self.age: list[int] = []  # of each micro-batch
        self._place()
        self.events = [(0.0, rank) for rank in range(len(self.ranks))]  # a heap of (when, who decides)

    def order(self) -> Order:
        while self.events:
            now, rank = heappop(self.events)
            if now + EPSILON >= self.ranks[rank].clock:
                self._decide(rank, max(now, self.ranks[rank].clock))
        assert not any(rank.to_end.total() for rank in self.ranks), "the room for the oldest is not kept"
        return [rank.slots for rank in self.ranks]

    def _place(self) -> None:
        """Lanes with their nominal times, and what each rank has to do."""
        empty, p = self.p.empty, self.p
        forward, backward, self.period = self.policy.block.nominal(p)
        directions = [empty.direction(m) for m in range(empty.microbatches)]
        first = [directions.index(d) for d in range(len(empty.routes))]
        self.age = [(m - first[d]) * len(empty.routes) + d for m, d in enumerate(directions)]
        for stage in range(empty.stages):
            lanes = []
            for d, route in enumerate(empty.routes):
                start = stage * self.per_stage + first[d]
                count = directions.count(d)
                lanes.append(_Lane(start, start, start, start + count, forward[stage], backward[stage]))
                self.ranks[route[stage]].lanes.append(lanes[-1])
            self.lane_of += [lanes[d] for d in directions]
        for work, owner in enumerate(p.rank_of):
            rank = self.ranks[owner]
            rank.backwards += 1
            rank.to_begin[self.age[work % self.per_stage]] += 1
        for rank in self.ranks:
            rank.to_end = Counter(rank.to_begin)
            rank.oldest = min(rank.to_end)

    def _decide(self, number: int, now: float) -> None:
        """Begin something on a rank that is free, or wait for what is under way."""
        rank, policy = self.ranks[number], self.policy
        if len(rank.deferred) > policy.deferred and rank.backwards > policy.tail:
            return self._begin(number, 2 * self.works + rank.deferred[0], now)
        forwards, backwards = self._forwards(rank), self._backwards(rank)
        if pair := self._pair(rank, now, forwards, backwards):
            slot, at = pair
            return self._begin(number, slot, now) if at <= now else heappush(self.events, (at, number))
        alone = [c for c in forwards if self._may_go_ahead(rank, c.work)]
        forward = min((c for c in alone if c.at <= now + EPSILON), key=lambda c: c.due, default=None)
        backward = min((c for c in backwards if c.at <= now + EPSILON), key=lambda c: c.due, default=None)
        if backward and not (forward and forward.due < backward.due):
            split = rank.backwards <= policy.block.split
            return self._begin(number, (1 if split else 3) * self.works + backward.work, now)
        if forward:
            return self._begin(number, forward.work, now)
        coming = min((c.at for c in alone + backwards), default=inf)
        if rank.deferred:
            weights = 2 * self.works + rank.deferred[0]
            if coming > now + policy.patience * self.p.duration[weights]:
                return self._begin(number, weights, now)
        if coming < inf:
            heappush(self.events, (coming, number))

    def _pair(
        self, rank: _Rank, now: float, forwards: list[_Choice], backwards: list[_Choice]
    ) -> tuple[int, float] | None:
        """The pair to begin and when, if any gains time and its halves are there or worth waiting for."""
        pairs = []
        for f in forwards if self.policy.block.pairs else ():
            for b in backwards:
                slot = self.p.pair(f.work, b.work)
                at = max(f.at, b.at, now) if max(f.at, b.at) > now + EPSILON else now
                wait = self.policy.courtship * self.p.duration[f.work]
                apart = self.p.duration[f.work] + self.p.duration[3 * self.works + b.work]
                different = f.work % self.per_stage != b.work % self.per_stage
                if different and at <= now + wait and self.p.length(slot) < apart - EPSILON:
                    pairs.append((at, f.due + b.due, slot))
        return (min(pairs)[2], min(pairs)[0]) if pairs else None

    def _forwards(self, rank: _Rank) -> list[_Choice]:
        """The next forward of each lane, where there is room for it."""
        choices = []
        for lane in rank.lanes:
            work = lane.forward
            if work < lane.end and self._has_room(rank, work):
                due = lane.due_forward + (work - lane.first) * self.period
                choices.append(_Choice(work, self.arrival[work], due))
        return choices

    def _backwards(self, rank: _Rank) -> list[_Choice]:
        choices = []
        for lane in rank.lanes:
            work = lane.backward
            if work < lane.forward:
                due = lane.due_backward + (work - lane.first) * self.period
                choices.append(_Choice(work, self.arrival[self.works + work], due))
        return choices

    def _has_room(self, rank: _Rank, work: int) -> bool:
        kept = 0 if self.age[work % self.per_stage] == rank.oldest else rank.to_begin[rank.oldest]
        return rank.held + 1 + kept <= self.limit

    def _may_go_ahead(self, rank: _Rank, work: int) -> bool:
        number = self.p.rank_of[work]
        return self.age[work % self.per_stage] == rank.oldest or rank.held < self.policy.ahead[number]

    def _begin(self, number: int, slot: int, now: float) -> None:
        rank = self.ranks[number]
        rank.slots.append(slot)
        rank.clock = now + self.p.length(slot)
        heappush(self.events, (rank.clock, number))
        for half in self.p.halves(slot):
            self._account(rank, *divmod(half, self.works))
            if self.p.gives[half] >= 0:
                self._send(self.p.gives[half], rank.clock)

    def _account(self, rank: _Rank, op: int, work: int) -> None:
        lane, age = self.lane_of[work], self.age[work % self.per_stage]
        if op == 0:
            lane.forward += 1
            rank.held += 1
            rank.to_begin[age] -= 1
            return
        if op != 2:
            lane.backward += 1
            rank.backwards -= 1
        if op == 1:
            rank.deferred.append(work)
            return
        if op == 2:
            rank.deferred.popleft()
        rank.held -= 1
        rank.to_end[age] -= 1
        while rank.to_end and not rank.to_end[rank.oldest]:
            del rank.to_end[rank.oldest]
            rank.oldest = min(rank.to_end, default=-1)

    def _send(self, message: int, end: float) -> None:
        """Messages are known from the begin of what makes them."""
        link = self.p.link[message]
        if link < 0:
            self.arrival[message] = end
            return
        occupied, latency = self.p.transfer[link]
        self.links[link] = max(end, self.links[link]) + occupied
        self.arrival[message] = at = self.links[link] + latency
        target = link % len(self.ranks)
        heappush(self.events, (max(at, self.ranks[target].clock), target))
