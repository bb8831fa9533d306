"""From rules to orders: hill climbing over what a rule leaves open, for one placement.

Two rules make orders. A ``Block`` fixes everything beforehand and may want more memory than there is; list scheduling
(``Greedy``) always fits. Both are climbed by changing a few values at a time.
"""

from itertools import cycle
from math import inf
from random import Random

from dualpipe.search.block import Block
from dualpipe.search.greedy import Greedy, Policy
from dualpipe.search.timing import Order, Pipeline

_PRICES = (30.0, 3.0)  # of memory, for the climbs over blocks
_STALE_BLOCKS = 150  # blocks without progress, after which a climb begins anew
_DRAWN = 12  # policies at the start of a climb that are anywhere at all
_STALE = 40  # policies without progress, after which a climb begins anew


class Climb:
    """``best`` is the best order so far that fits in ``limit`` works a rank, if any; ``makespan`` is its time."""

    def __init__(self, pipeline: Pipeline, limit: int, rng: Random, passes: int) -> None:
        self.p, self.limit, self.rng, self.passes = pipeline, limit, rng, passes
        self.best: Order | None = None
        self.makespan = inf
        self.backwards = pipeline.works // pipeline.empty.ranks
        self.height = inf  # of where the climb stands
        self._unit = sum(pipeline.duration[: 3 * pipeline.works]) / pipeline.works  # of a micro-batch in a stage

    def judge(self, order: Order, price: float) -> float:
        """Height of an order: its time, and ``price`` times what a micro-batch takes in a stage for each work that a
        rank holds too many; infinite when its ranks wait for ever."""
        times = self.p.play(order)
        if times is None:
            return inf
        over = max(0, max(map(self.p.peak, order)) - self.limit)
        if not over and times.makespan < self.makespan:
            self.best, self.makespan = order, times.makespan
        return times.makespan + over * price * self._unit

    def step(self) -> None:
        """Try one order."""
        raise NotImplementedError


class BlockClimb(Climb):
    """Over repeated blocks, from the tightest, which may lead through blocks that do not fit; again and again, at
    another price of memory each time."""

    def __init__(self, pipeline: Pipeline, limit: int, rng: Random, passes: int) -> None:
        super().__init__(pipeline, limit, rng, passes)
        self._block = Block.tight(pipeline, passes)
        self._prices = cycle(_PRICES)
        self._price = next(self._prices)
        self._stale = 0

    def step(self) -> None:
        block = self._block
        for _ in range(self.rng.choice((1, 2))):
            block = block.mutated(self.rng, self.backwards)
        if self._stale >= _STALE_BLOCKS:
            block, self.height, self._price = Block.tight(self.p, self.passes), inf, next(self._prices)
        height = self.judge(block.order(self.p), self._price)
        self._stale = 0 if height < self.height else self._stale + 1
        if height <= self.height:
            self._block, self.height = block, height


class GreedyClimb(Climb):
    """Over the policies of list scheduling, from the best of a few that are drawn; again and again."""

    def __init__(self, pipeline: Pipeline, limit: int, rng: Random, passes: int) -> None:
        super().__init__(pipeline, limit, rng, passes)
        self._policy = self._drawn()
        self._steps = self._stale = 0

    def step(self) -> None:
        if self._stale >= _STALE:
            self._steps, self._stale, self.height = 0, 0, inf
        policy = self._drawn()
        if self._steps >= _DRAWN:
            policy = self._policy
            for _ in range(self.rng.choice((1, 2))):
                policy = policy.mutated(self.rng, self.backwards, self.limit)
        self._steps += 1
        height = self.judge(Greedy(self.p, policy, self.limit).order(), price=0.0)  # it fits
        self._stale = 0 if height < self.height else self._stale + 1
        if height <= self.height:
            self._policy, self.height = policy, height

    def _drawn(self) -> Policy:
        return Policy.drawn(self.rng, self.passes, self.p.empty.ranks, self.backwards, self.limit)
