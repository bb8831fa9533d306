"""How far a step spreads when waits and loads are drawn, instead of their means (Monte Carlo).

Two distributions, each drawn anew for every layer of every operation of every rank:

    the wait of an exchange     gamma, its mean the cluster's ``*_skew_us``, its standard deviation over its mean the
                                cluster's ``skew_variation``
    rows of the busiest rank    over the mean: uniform from 1 to 2 x imbalance - 1, whose mean is the workload's

The ranks of one pipeline position that exchange tokens wait for each other in every layer, so that they are one; the
expert groups beside each other meet at the end of the step alone, and the last one decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, quantiles

import numpy as np

from dualpipe.cost import Costs, CostTable
from dualpipe.overlap import Phase
from dualpipe.program import Op, Program
from parallel.estimate.operations import LayerCost, Operations
from parallel.estimate.plan import Plan, replay
from parallel.estimate.stages import StageCost, pair_seconds

VARIANTS = 64
"""Drawn durations of each operation of a stage, of which every execution takes one."""
LEVELS = 8
"""Numbers of rows that are told apart."""
EXCHANGES = {
    (Phase.DISPATCH, Op.FORWARD): "dispatch_forward",
    (Phase.COMBINE, Op.FORWARD): "combine_forward",
    (Phase.DISPATCH, Op.BACKWARD_INPUT): "dispatch_backward",
    (Phase.COMBINE, Op.BACKWARD_INPUT): "combine_backward",
}


@dataclass(frozen=True)
class Spread:
    """Seconds of drawn steps; ``low`` and ``high`` are the 5th and the 95th percentile."""

    draws: int
    mean: float
    low: float
    median: float
    high: float


def spread(plan: Plan, draws: int, seed: int = 0) -> Spread:
    """Simulate ``draws`` steps. Raises ValueError for fewer than 2."""
    if draws < 2:
        raise ValueError(f"draws={draws} must be at least 2: an interval needs two steps")
    if plan.cluster.shares_cores:
        raise ValueError(f"cluster {plan.cluster.name}: ranks that share cores have no waits of their own to be drawn")
    generator = np.random.default_rng(seed)
    groups = max(plan.workload.layout.data // plan.workload.layout.expert, 1)
    steps = [max(_step(plan, generator) for _ in range(groups)) for _ in range(draws)]
    cuts = quantiles(steps, n=20, method="inclusive")
    return Spread(draws, mean(steps), cuts[0], cuts[9], cuts[-1])


def _step(plan: Plan, generator: np.random.Generator) -> float:
    layers = _Layers(plan, generator)

    def table(costs: Costs, program: Program) -> CostTable:
        return _Drawn(costs, program, plan.stages, layers, generator)

    return replay(plan, table).makespan


class _Layers:
    """Draws layers."""

    def __init__(self, plan: Plan, generator: np.random.Generator) -> None:
        w = plan.workload
        self._generator, self._cluster = generator, plan.cluster
        # The middles of equally likely stretches of the distribution.
        wide = min(2 * w.imbalance - 2, w.layout.expert - 1.0)
        loads = [1 + wide * (level + 0.5) / LEVELS for level in range(LEVELS)] if wide else [1.0]
        self._levels = [Operations(replace(w, imbalance=load), plan.cluster).layer(True) for load in loads]
        self._shape = plan.cluster.skew_variation**-2 if plan.cluster.skew_variation else 0.0

    def drawn(self, stage: StageCost) -> StageCost:
        """A stage whose MoE layers wait and work as drawn."""
        return replace(stage, layers=tuple(self._layer(layer) for layer in stage.layers))

    def _layer(self, layer: LayerCost) -> LayerCost:
        if not any(layer[part] for part in EXCHANGES):
            return layer  # dense, or with all experts on every rank
        drawn = dict(self._levels[self._generator.integers(len(self._levels))])
        for part, name in EXCHANGES.items():
            usual = getattr(self._cluster, f"{name}_skew_us") * 1e-6
            if usual and self._shape:
                drawn[part] += self._generator.gamma(self._shape, usual / self._shape) - usual
        return drawn


class _Drawn(CostTable):
    """Every look-up of a duration draws one: a play looks each operation up once."""

    def __init__(
        self,
        costs: Costs,
        program: Program,
        stages: Sequence[StageCost],
        layers: _Layers,
        generator: np.random.Generator,
    ) -> None:
        super().__init__(costs, program)
        self._stages, self._generator = stages, generator
        kinds = {id(stage): stage for stage in stages}
        self._variants = {kind: [layers.drawn(stage) for _ in range(VARIANTS)] for kind, stage in kinds.items()}
        self._drawn_pairs: dict[tuple[int, int], list[float]] = {}
        self._picks: list[int] = []
        self.of = {op: _Row(self, [self._alone(op, stage) for stage in stages]) for op in Op}

    def pair(self, forward_stage: int, backward_stage: int) -> float:
        one, other = (id(self._stages[stage]) for stage in (forward_stage, backward_stage))
        if (one, other) not in self._drawn_pairs:
            # Forward and backward are of different micro-batches: their draws have nothing to do with each other.
            halves = zip(self._variants[one], reversed(self._variants[other]), strict=True)
            self._drawn_pairs[one, other] = [pair_seconds(forward, backward) for forward, backward in halves]
        return self._drawn_pairs[one, other][self.pick()]

    def pick(self) -> int:
        """The number of a variant."""
        if not self._picks:
            self._picks = self._generator.integers(VARIANTS, size=4096).tolist()
        return self._picks.pop()

    def _alone(self, op: Op, stage: StageCost) -> list[float]:
        return [variant.alone[op] for variant in self._variants[id(stage)]]


class _Row(list[float]):
    """Durations of one operation by stage, each drawn when it is read."""

    def __init__(self, table: _Drawn, variants: Sequence[list[float]]) -> None:
        super().__init__()
        self._table, self._variants = table, variants

    def __getitem__(self, stage: int) -> float:  # type: ignore[override]
        return self._variants[stage][self._table.pick()]
