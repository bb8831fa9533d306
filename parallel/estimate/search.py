"""All layouts of a workload on a number of GPUs: ranked in closed form, the best of them simulated in full.

The closed form takes the busiest rank's operations, the bubble that the schedule's own formula gives for a typical
stage, and the end of the step. It knows no messages and no uneven waiting; that is what the simulation is for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from dualpipe import schedules
from dualpipe.program import Op, Program
from dualpipe.schedules.dualpipe import dualpipe_bubble, dualpipe_peak
from dualpipe.schedules.dualpipev import dualpipev_bubble, dualpipev_peak
from dualpipe.schedules.gpipe import gpipe_bubble, gpipe_peak
from dualpipe.schedules.interleaved import interleaved_bubble, interleaved_peak
from dualpipe.schedules.one_f_one_b import one_f_one_b_bubble, one_f_one_b_peak
from dualpipe.schedules.zb1p import zb1p_bubble, zb1p_peak
from dualpipe.schedules.zbv import zbv_bubble, zbv_peak
from parallel.estimate.hardware import Cluster
from parallel.estimate.memory import (
    StageParameters,
    activation_bytes,
    deferred_bytes,
    rank_memory,
    stage_parameters,
)
from parallel.estimate.operations import Operations
from parallel.estimate.phases import runs
from parallel.estimate.plan import Plan, Run, end_seconds, make_plan
from parallel.estimate.stages import StageCost, pair_seconds, stage_costs, stage_layers
from parallel.estimate.workload import Workload, recomputes

SIMULATED = 20
MICRO_BATCHES = (1, 2, 4, 8)
MOMENTS = (2, 4)
"""Bytes of an optimizer's moment."""


@dataclass(frozen=True)
class Candidate:
    """A layout, its step in closed form, and what its fullest rank holds. Seconds, bytes."""

    workload: Workload
    step_seconds: float
    memory_bytes: float


@dataclass(frozen=True)
class Found:
    """``candidates`` fit in memory and are ordered by closed form, ``plans`` are the best of them by simulation.
    ``tried`` counts those that do not fit, too; ``smallest`` is the one of all that needs the least memory."""

    tried: int
    smallest: Candidate
    candidates: list[Candidate]
    plans: list[Plan]


def search(workload: Workload, cluster: Cluster, run: Run, simulated: int = SIMULATED) -> Found:
    """Pipeline, expert and data parallelism, micro-batch, recomputation, schedule, way of dispatch (where an expert
    group is more than a node), width of moments and of what is dispatched, for the workload's GPUs and global batch.
    ``run`` counts the workload's steps, which every layout has in common. Raises ValueError if no schedule runs."""
    closed = ClosedForm(cluster)
    found = [closed.candidate(each) for each in layouts(workload, int(cluster.ranks_per_node))]
    if not found:
        raise ValueError(f"no schedule runs this global batch on any layout of {workload.layout.world_size} GPUs")
    usable = cluster.memory_gb * 1e9 * cluster.usable_memory
    fitting = sorted((c for c in found if c.memory_bytes <= usable), key=lambda c: c.step_seconds)
    plans = [make_plan(candidate.workload, cluster, run) for candidate in fitting[:simulated]]
    plans = sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.step_seconds)
    return Found(len(found), min(found, key=lambda c: c.memory_bytes), fitting, plans)


def layouts(workload: Workload, ranks_per_node: int) -> Iterator[Workload]:
    """Every workload with the same model, GPUs and global batch that its schedule and its model allow."""
    world, c = workload.layout.world_size, workload.model
    payloads = (True, False) if workload.precision == "fp8" else (True,)
    policies = recomputes(workload.precision)
    batch = workload.microbatches * workload.micro_batch_size * workload.layout.data
    for pipeline in _divisors(world):
        data = world // pipeline
        for size in MICRO_BATCHES:
            if batch % (data * size):
                continue
            microbatches = batch // (data * size)
            for name in schedules.SCHEDULES:
                if schedules.stages(name, pipeline) > c.num_hidden_layers or not runs(name, pipeline, microbatches):
                    continue
                for expert in _divisors(data):
                    if c.n_routed_experts % expert or workload.imbalance > expert:
                        continue
                    layout = replace(workload.layout, pipeline=pipeline, data=data, expert=expert)
                    ways = (True, False) if expert > ranks_per_node else (True,)
                    for recompute, moments, fp8_payload, hierarchical in product(policies, MOMENTS, payloads, ways):
                        yield replace(
                            workload,
                            layout=layout,
                            schedule=name,
                            micro_batch_size=size,
                            microbatches=microbatches,
                            moment_bytes=moments,
                            chunks=None,
                            hierarchical=hierarchical,
                            fp8_payload=fp8_payload,
                        ).recomputing(recompute)


class ClosedForm:
    """Candidates on one cluster. What layouts have in common is computed once, so that a thousand a second are told."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._operations: dict[Workload, Operations] = {}
        self._priced: dict[tuple[Workload, int], _Priced] = {}
        self._placed: dict[tuple[str, int], tuple[Program, tuple[tuple[int, ...], ...]]] = {}

    def candidate(self, workload: Workload) -> Candidate:
        """Raises ClusterError for a rate that is not known."""
        layout = workload.layout
        program, held = self._place(workload.schedule, layout.pipeline)
        priced = self._price(workload, program.stages)
        end = end_seconds(program, workload, self.cluster, priced.parameters)
        busiest = max(_busy(workload, priced, stages, len(program.routes)) for stages in held)
        step = busiest + _bubble(workload, priced) + end.step + len(held[0]) * end.gather
        sizes = priced.activation_bytes
        if workload.schedule in ("zb1p", "zbv"):  # whose last ranks may wait with the weights of all that they hold
            sizes = [max(pair) for pair in zip(sizes, priced.deferred_bytes, strict=True)]
        activations = [
            _peak(workload, rank) * sum(sizes[stage] for stage in stages) / len(stages)
            for rank, stages in enumerate(held)
        ]
        memory = rank_memory(program, workload, priced.parameters, activations)
        return Candidate(workload, step, max(rank.total for rank in memory))

    def _price(self, workload: Workload, stages: int) -> "_Priced":
        """Costs of stages depend on neither the schedule nor the number of replicas."""
        layout = replace(workload.layout, pipeline=1, data=workload.layout.expert)
        alike = replace(workload, layout=layout, schedule="", microbatches=1, moment_bytes=0)
        if alike not in self._operations:
            self._operations[alike] = Operations(alike, self.cluster)
        operations, key = self._operations[alike], (alike, stages)
        if key not in self._priced:
            layers = stage_layers(workload, stages)
            costs = stage_costs(operations, layers)
            sizes = activation_bytes(workload, layers), deferred_bytes(workload, layers)
            self._priced[key] = _Priced(costs, *sizes, stage_parameters(operations, layers))
        return self._priced[key]

    def _place(self, schedule: str, ranks: int) -> tuple[Program, tuple[tuple[int, ...], ...]]:
        """The schedule's smallest program, for its routes, and the stages of each rank."""
        key = schedule, ranks
        if key not in self._placed:
            fewest = next(m for m in range(1, 2 * ranks + 1) if runs(schedule, ranks, m))
            program = schedules.generate(schedule, ranks, fewest)
            self._placed[key] = program, tuple(tuple(sorted(program.stages_of(rank))) for rank in range(ranks))
        return self._placed[key]


class _Priced:
    """Stages and what they take."""

    def __init__(
        self,
        stages: list[StageCost],
        activation_bytes: list[float],
        deferred_bytes: list[float],
        parameters: list[StageParameters],
    ) -> None:
        self.stages, self.parameters = stages, parameters
        self.activation_bytes, self.deferred_bytes = activation_bytes, deferred_bytes
        self.alone = [stage.alone[Op.FORWARD] + stage.alone[Op.BACKWARD] for stage in stages]
        self.typical = sorted(stages, key=lambda stage: sum(stage.alone.values()))[len(stages) // 2]
        self.typical_pair = pair_seconds(self.typical, self.typical)
        self._pairs: dict[tuple[int, int], float] = {}  # by the identity of the two stages: most are one object

    def pair(self, forward: int, backward: int) -> float:
        one, other = self.stages[forward], self.stages[backward]
        key = id(one), id(other)
        if key not in self._pairs:
            self._pairs[key] = pair_seconds(one, other)
        return self._pairs[key]


def _busy(workload: Workload, priced: _Priced, stages: tuple[int, ...], routes: int) -> float:
    """What a rank that holds these stages computes in a step. Pairs overlap; DualPipe's outermost rank has the fewest,
    M - 3P/2 + 1, and DualPipeV's first one 2M - 3P + 1 of half the size."""
    each = workload.microbatches / routes  # micro-batches that pass one of the stages on this rank
    alone = sum(priced.alone[stage] for stage in stages)
    if len(stages) != 2 or workload.schedule not in ("dualpipe", "dualpipev"):
        return each * alone
    one, other = stages
    pairs = max(2 * each - 3 * workload.layout.pipeline / routes + 1, 0.0)
    together = (priced.pair(one, other) + priced.pair(other, one)) / 2
    return pairs * together + (each - pairs / 2) * alone


def _bubble(workload: Workload, priced: _Priced) -> float:
    """The schedule's own formula for a typical stage; some are negative where W is dear, and then it is none."""
    ranks, alone = workload.layout.pipeline, priced.typical.alone
    f, i, w = alone[Op.FORWARD], alone[Op.BACKWARD_INPUT], alone[Op.BACKWARD_WEIGHT]
    b, pair = alone[Op.BACKWARD], priced.typical_pair
    match workload.schedule:
        case "dualpipe":
            bubble = dualpipe_bubble(ranks, f, i, w, pair)
        case "dualpipev":
            bubble = dualpipev_bubble(ranks, i, w, pair)
        case "gpipe":
            bubble = gpipe_bubble(ranks, f, b)
        case "1f1b":
            bubble = one_f_one_b_bubble(ranks, f, b)
        case "interleaved":
            bubble = interleaved_bubble(ranks, f, b)
        case "zb1p":
            bubble = zb1p_bubble(ranks, f, i, w)
        case "zbv":
            bubble = zbv_bubble(ranks, f)
        case _:
            raise AssertionError(workload.schedule)
    return max(bubble, 0.0)


def _peak(workload: Workload, rank: int) -> int:
    """Micro-batches, each in one stage, whose activations a rank holds at most."""
    ranks, n = workload.layout.pipeline, workload.microbatches
    match workload.schedule:
        case "dualpipe":
            return 1 if ranks == 1 else dualpipe_peak(ranks)
        case "dualpipev":
            return dualpipev_peak(ranks)
        case "gpipe":
            return gpipe_peak(n)
        case "1f1b":
            return one_f_one_b_peak(ranks - rank, n)  # a rank sees as many ahead as there are behind it
        case "interleaved":
            return interleaved_peak(ranks, n, 2)
        case "zb1p":
            return zb1p_peak(ranks)
        case "zbv":
            return zbv_peak(ranks)
        case _:
            raise AssertionError(workload.schedule)


@cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)
