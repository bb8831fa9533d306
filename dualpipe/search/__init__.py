"""A program for given costs and a given memory: found by search, and never worse than the named schedules that fit.

A search goes over the placements of the stages (``placement.py``). In each it climbs over rules that make orders
(``climb.py``) and improves single orders slot by slot (``refine.py``), those of the named schedules among them. What it
tries, and in what order, depends on the sizes, costs, limit and seed only, never on a clock: a larger budget
goes on where a smaller one stopped.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor, inf, isfinite
from random import Random

from dualpipe.cost import Costs
from dualpipe.load import lower_proven
from dualpipe.lower import lower
from dualpipe.program import Program
from dualpipe.schedules import SCHEDULES, generate
from dualpipe.schedules.rules import check_microbatches, check_ranks
from dualpipe.search.bound import lower_bound
from dualpipe.search.climb import BlockClimb, Climb, GreedyClimb
from dualpipe.search.placement import Placement, placements, share_of
from dualpipe.search.refine import Refiner, joined
from dualpipe.search.timing import EPSILON, Order, Pipeline
from dualpipe.simulate import Simulation, simulate

NAME = "search"
_WARM_UP = 30  # rounds of climbing before any order is refined
_BLOCKS = 10  # blocks tried for each policy of list scheduling, which takes longer
_STRIDE = 100  # changes tried on an order before the next one's turn
_NEAR = 1.05  # orders that take up to so much longer than the best one are refined as well
_PROMISING = 1.15  # placements whose best order takes up to so much longer are climbed on


@dataclass(frozen=True)
class Budget:
    """How long to search: until so many orders are tried, or so many seconds have passed, or no order can be better."""

    orders: float = inf
    seconds: float = inf

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """``5000``: so many orders, and the same program on every machine. ``10s``: so many seconds."""
        number = text.removesuffix("s")
        try:
            value = float(number) if number != text else int(number)
        except ValueError:
            value = -1
        if not (isfinite(value) and value > 0):
            raise ValueError(f"budget {text} must be a number of orders to try (5000) or of seconds (10s), above 0")
        return cls(seconds=value) if number != text else cls(orders=value)


@dataclass(frozen=True)
class Named:
    """A named schedule at the same model size, or why it cannot run. ``peak`` is in activations of 1/P of the model."""

    name: str
    makespan: float
    peak: float
    fits: bool
    why: str = ""


@dataclass(frozen=True)
class Found:
    """``order`` is the compute order, ``program`` the same lowered and proven, ``result`` its simulation.

    ``bound``: no order of the placements searched computes in less. ``left_out``: the placements that the costs do not
    suit, and why.
    """

    order: Program
    program: Program
    result: Simulation
    placement: Placement
    tried: int
    seconds: float
    bound: float
    named: tuple[Named, ...]
    left_out: dict[str, str]

    @property
    def best_named(self) -> Named | None:
        """The fastest named schedule that fits."""
        return min((named for named in self.named if named.fits), key=lambda named: named.makespan, default=None)

    @property
    def gain(self) -> float | None:
        """By what part of its time the best named schedule that fits is shortened; None when none fits."""
        best = self.best_named
        if best is None:
            return None
        return 1 - self.result.makespan / best.makespan if best.makespan else 0.0

    @property
    def parameters(self) -> float:
        """The most that a rank holds, in P-ths of the model."""
        return max(len(self.program.stages_of(r)) for r in range(self.program.ranks)) * self.placement.share

    @property
    def peak(self) -> float:
        """In activations of one micro-batch in a P-th of the model."""
        return max(self.result.peak_activations) * self.placement.share


@dataclass
class _Site:
    """A placement under search. ``limit`` is in works of its stages."""

    placement: Placement
    costs: Costs
    pipeline: Pipeline
    limit: int
    climbs: tuple[Climb, ...]
    refiners: dict[str, Refiner]  # by what their order comes from

    @property
    def makespan(self) -> float:
        """Of the best order so far."""
        refined = [refiner.makespan for refiner in self.refiners.values()]
        return min([climb.makespan for climb in self.climbs] + refined)

    def starts(self) -> Iterator[tuple[str, Order, float]]:
        for climb in self.climbs:
            if climb.best is not None:
                yield type(climb).__name__, climb.best, climb.makespan


def search(
    ranks: int,
    microbatches: int,
    costs: Costs,
    memory_limit: float = inf,
    budget: Budget | None = None,
    seed: int = 0,
    allowed: Sequence[str] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Found:
    """The fastest program found for a step of so many micro-batches on so many ranks.

    ``costs`` are those of 1/P of the model, which a stage holds when each rank has one. ``memory_limit`` is the most
    that a rank may hold, in activations of one micro-batch in 1/P of the model; ``budget`` is 5000 orders by default;
    ``allowed`` names placements, all by default; ``progress`` is called with the orders tried and the best time so far.
    Raises ValueError for sizes and limits that leave no program, and for costs that no placement suits.
    """
    check_ranks(NAME, ranks)
    check_microbatches(NAME, microbatches, 1)
    if not memory_limit >= 1:
        rule = (
            "must be at least 1: a rank holds one micro-batch's activations in its part of the model at the very least"
        )
        raise ValueError(f"memory limit {memory_limit:g} {rule}")
    budget, begun = budget or Budget(orders=5000), time.monotonic()
    sites, left_out = _sites(ranks, microbatches, costs, memory_limit, seed, allowed)
    named, leader = _named(ranks, microbatches, costs, memory_limit, sites, seed)
    bound = min(lower_bound(site.pipeline) for site in sites)
    tried = 0
    for tried, best in enumerate(_stream(sites, seed), start=1):
        if progress:
            progress(tried, best)
        if tried >= budget.orders or time.monotonic() - begun >= budget.seconds or best <= bound + EPSILON:
            break
    order, site = _judge(sites, leader)
    order = replace(order, schedule=NAME)
    program = lower_proven(order)
    result = simulate(program, site.costs)
    seconds = time.monotonic() - begun
    return Found(order, program, result, site.placement, tried, seconds, bound, named, left_out)


def _sites(
    ranks: int, microbatches: int, costs: Costs, memory_limit: float, seed: int, allowed: Sequence[str] | None
) -> tuple[list[_Site], dict[str, str]]:
    possible = placements(ranks, microbatches)
    names = [placement.name for placement in possible]
    if unknown := [name for name in allowed or () if name not in names]:
        sizes = f"{ranks} ranks and {microbatches} micro-batches"
        raise ValueError(f"placement {unknown[0]} must be one of {', '.join(names)} for {sizes}")
    sites, left_out = [], {}
    for placement in possible:
        if allowed is not None and placement.name not in allowed:
            continue
        try:
            own = share_of(costs, placement.share)
            pipeline = Pipeline(placement.program(NAME, microbatches), own)
        except ValueError as error:
            left_out[placement.name] = str(error)
            continue
        visits = placement.passes * microbatches  # of a rank, by all routes together
        limit = int(min(floor(memory_limit / placement.share + EPSILON) if memory_limit < inf else inf, visits))
        climbs = tuple(
            kind(pipeline, limit, Random(f"{seed} {placement.name} {kind.__name__}"), placement.passes)
            for kind in (BlockClimb, GreedyClimb)
        )
        sites.append(_Site(placement, own, pipeline, limit, climbs, {}))
    if not sites:
        raise ValueError(next(iter(left_out.values())))
    return sites, left_out


def _named(
    ranks: int, microbatches: int, costs: Costs, memory_limit: float, sites: list[_Site], seed: int
) -> tuple[tuple[Named, ...], tuple[float, Program, _Site] | None]:
    """Every named schedule of these placements, and the fastest that fits. Those that fit are refined from there."""
    rows, leader = [], None
    for name in SCHEDULES:
        try:
            order = generate(name, ranks, microbatches)
        except ValueError as error:
            rows.append(Named(name, inf, inf, False, str(error)))
            continue
        site = next((site for site in sites if site.placement.routes == order.routes), None)
        if site is None:
            rows.append(Named(name, inf, inf, False, "its placement is not among those searched"))
            continue
        result = simulate(lower(order), site.costs)
        peak = max(result.peak_activations)
        rows.append(Named(name, result.makespan, peak * site.placement.share, peak <= site.limit))
        if peak > site.limit:
            continue
        rng = Random(f"{seed} {name}")
        site.refiners[name] = Refiner(site.pipeline, site.pipeline.read(order), site.limit, rng)
        if leader is None or result.makespan < leader[0]:
            leader = result.makespan, order, site
    return tuple(rows), leader


def _stream(sites: list[_Site], seed: int) -> Iterator[float]:
    """Try one order after the other, for ever; after each, the shortest time so far."""
    best = min((refiner.makespan for site in sites for refiner in site.refiners.values()), default=inf)
    number = 0
    while True:
        for site in sites:
            if number >= _WARM_UP and site.makespan > best * _PROMISING:
                continue
            block, greedy = site.climbs
            for climb in (greedy, *(block,) * _BLOCKS):
                climb.step()
                best = min(best, climb.makespan)
                yield best
        number += 1
        if number < _WARM_UP:
            continue
        for refiner in _refiners(sites, best, seed):
            for _ in range(_STRIDE):
                refiner.step()
                best = min(best, refiner.makespan)
                yield best


def _refiners(sites: list[_Site], best: float, seed: int) -> list[Refiner]:
    """The best of each placement that is worth it. A climb that got beyond what was refined of it gives a new start."""
    for site in sites:
        for name, order, makespan in site.starts():
            if name not in site.refiners or makespan < site.refiners[name].makespan - EPSILON:
                rng = Random(f"{seed} {site.placement.name} {name} {makespan}")
                site.refiners[name] = Refiner(site.pipeline, order, site.limit, rng)
    leaders = [min(site.refiners.values(), key=lambda refiner: refiner.makespan) for site in sites if site.refiners]
    return [refiner for refiner in leaders if refiner.makespan <= best * _NEAR + EPSILON]


def _judge(sites: list[_Site], leader: tuple[float, Program, _Site] | None) -> tuple[Program, _Site]:
    """The best order of each placement and the best named schedule, as the simulator sees them: with the end of the
    step. The named one stays where nothing beats it."""
    winner = leader
    for site in sites:
        found = [(climb.makespan, climb.best) for climb in site.climbs if climb.best is not None]
        found += [(refiner.makespan, refiner.best) for refiner in site.refiners.values()]
        if not found:
            continue
        order = joined(site.pipeline, min(found, key=lambda one: one[0])[1])
        program = site.pipeline.write(order, NAME)
        makespan = simulate(lower(program), site.costs).makespan
        if winner is None or makespan < winner[0] - EPSILON:
            winner = makespan, program, site
    assert winner is not None, "list scheduling always fits"
    return winner[1], winner[2]
