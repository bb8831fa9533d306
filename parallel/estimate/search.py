"""All layouts of a workload on a number of GPUs: ranked in closed form, the best of them simulated in full.

The closed form takes the busiest rank's operations, the bubble that the schedule's own formula gives for a typical
stage, and the end of the step. It knows no messages and no uneven waiting; that is what the simulation is for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import inf
from typing import NamedTuple

from dualpipe import schedules
from dualpipe.program import Op
from dualpipe.schedules.dualpipe import dualpipe_bubble
from dualpipe.schedules.dualpipev import dualpipev_bubble
from dualpipe.schedules.gpipe import gpipe_bubble
from dualpipe.schedules.interleaved import interleaved_bubble
from dualpipe.schedules.one_f_one_b import one_f_one_b_bubble
from dualpipe.schedules.zb1p import zb1p_bubble
from dualpipe.schedules.zbv import zbv_bubble
from parallel.estimate.hardware import Cluster
from parallel.estimate.memory import (
    StageParameters,
    activation_bytes,
    deferred_bytes,
    ranks_memory,
    stage_parameters,
)
from parallel.estimate.operations import Operations
from parallel.estimate.peak import Placement
from parallel.estimate.plan import Plan, Run, end_seconds, make_plan
from parallel.estimate.stages import StageCost, pair_seconds, stage_costs, stage_layers
from parallel.estimate.workload import Workload, recomputes

SIMULATED = 20
MICRO_BATCHES = (1, 2, 4, 8)
"""Sequences of one."""
SPARES = 1 / 16
"""The largest share of the GPUs that a layout may leave idle."""
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
    """Pipeline, expert and data parallelism, micro-batch, recomputation, schedule and its chunks, way of dispatch
    (where an expert group is more than a node), width of moments and of what is dispatched, for the workload's GPUs and
    global batch. ``run`` counts the workload's steps, which every layout has in common. Raises ValueError if no
    schedule runs.
    """
    closed, usable = ClosedForm(cluster), cluster.memory_gb * 1e9 * cluster.usable_memory
    tried, least, fitting = 0, (inf, workload), list[Candidate]()
    for family in _families(workload, int(cluster.ranks_per_node)):
        tried += len(family.variants)
        memory = closed.memory_bytes(family.leanest)
        if memory < least[0]:
            least = memory, family.leanest
        for each in family.layouts() if memory <= usable else ():
            if (memory := closed.memory_bytes(each)) <= usable:
                fitting.append(Candidate(each, closed.step_seconds(each), memory))
    if not tried:
        raise ValueError(f"no schedule runs this global batch on any layout of {workload.layout.world_size} GPUs")
    fitting.sort(key=lambda candidate: candidate.step_seconds)
    plans = [make_plan(candidate.workload, cluster, run) for candidate in fitting[:simulated]]
    plans.sort(key=lambda plan: plan.step_seconds)
    return Found(tried, Candidate(least[1], closed.step_seconds(least[1]), least[0]), fitting, plans)


def layouts(workload: Workload, ranks_per_node: int) -> Iterator[Workload]:
    """Every workload with the same model, GPUs and global batch that its schedule and its model allow. A pipeline whose
    length does not divide the GPUs leaves some of them as spares, up to ``SPARES``."""
    for family in _families(workload, ranks_per_node):
        yield from family.layouts()


@dataclass(frozen=True)
class _Family:
    """Layouts that differ in ``variants`` alone: width of moments, payload and way of dispatch. The first of them needs
    no more memory than any other."""

    first: Workload
    variants: Sequence[tuple[int, bool, bool]]

    @property
    def leanest(self) -> Workload:
        return next(self.layouts())

    def layouts(self) -> Iterator[Workload]:
        for moments, fp8_payload, hierarchical in self.variants:
            yield replace(self.first, moment_bytes=moments, fp8_payload=fp8_payload, hierarchical=hierarchical)


def _families(workload: Workload, ranks_per_node: int) -> Iterator[_Family]:
    world, c = workload.layout.world_size, workload.model
    payloads = (True, False) if workload.precision == "fp8" else (True,)
    batch = workload.microbatches * workload.micro_batch_size * workload.layout.data
    for pipeline, size in product(range(1, min(world, c.num_hidden_layers) + 1), MICRO_BATCHES):
        data = _replicas(pipeline, world, ranks_per_node, batch / size)
        if data is None:
            continue
        microbatches = batch // (data * size)
        for name, chunks in _schedules(pipeline, c.num_hidden_layers):
            if not schedules.runs(name, pipeline, microbatches, chunks):
                continue
            for expert in _divisors(data):
                if c.n_routed_experts % expert or workload.imbalance > expert:
                    continue
                variants = list(product(MOMENTS, payloads, _ways(expert, ranks_per_node)))
                first = replace(
                    workload,
                    layout=replace(workload.layout, pipeline=pipeline, data=data, expert=expert),
                    schedule=name,
                    micro_batch_size=size,
                    microbatches=microbatches,
                    chunks=chunks,
                )
                for recompute in recomputes(workload.precision):
                    yield _Family(first.recomputing(recompute), variants)


def _ways(expert: int, ranks_per_node: int) -> tuple[bool, ...]:
    """Whether dispatch goes by nodes: only expert groups of several whole ones leave a choice."""
    if max(expert, ranks_per_node) % min(expert, ranks_per_node):
        return (False,)
    return (True, False) if expert > ranks_per_node else (True,)


def _replicas(pipeline: int, world: int, ranks_per_node: int, micro_batches: float) -> int | None:
    """The most replicas that share the batch evenly, on all GPUs or on whole nodes of all but the spares."""
    for data in range(world // pipeline, 0, -1):
        used = pipeline * data
        if used < (1 - SPARES) * world:
            return None
        if micro_batches % data == 0 and (used == world or data % ranks_per_node == 0):
            return data
    return None


def _schedules(pipeline: int, layers: int) -> Iterator[tuple[str, int | None]]:
    """Every schedule that the model has the layers for, and its chunks where it leaves them open: of numbers whose
    thickest stages are equally thick the smallest, since one more stage is one more to wait for."""
    if pipeline == 1:  # all of them are the same there, or hold more
        yield "1f1b", None
        return
    for name, family in schedules.SCHEDULES.items():
        if not family.chunked:
            if schedules.stages(name, pipeline) <= layers:
                yield name, None
            continue
        thickness = {}
        for chunks in range(layers // pipeline, 1, -1):
            thickness[-(-layers // (pipeline * chunks))] = chunks
        yield from ((name, chunks) for chunks in sorted(thickness.values()))


class ClosedForm:
    """Candidates on one cluster. What layouts have in common is computed once, and what time they take only where it is
    asked for, so that thousands a second are told."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._sizes: dict[tuple[Workload, int], _Sizes] = {}
        self._priced: dict[tuple[Workload, int], _Priced] = {}
        self._placed: dict[tuple[str, int, int, int | None], Placement] = {}

    def memory_bytes(self, workload: Workload) -> float:
        """Of the fullest rank, as a plan has it."""
        placement = self._place(workload)
        sizes = self._sizes_of(workload, placement.stages)
        peak_R = placement.peak_R(sizes.activation_bytes, sizes.deferred_bytes)
        if workload.schedule == "gpipe":  # placed with one micro-batch, it holds all of them
            peak_R = workload.microbatches * peak_R
        return float(sum(ranks_memory(placement, workload, sizes.parameters, peak_R).values()).max())  # type: ignore[union-attr]

    def step_seconds(self, workload: Workload) -> float:
        """Raises ClusterError for a rate that is not known."""
        placement = self._place(workload)
        alike, key = _alike(workload), placement.stages
        if (alike, key) not in self._priced:
            layers = stage_layers(workload, placement.stages)
            self._priced[alike, key] = _Priced(stage_costs(Operations(alike, self.cluster), layers))
        priced = self._priced[alike, key]
        parameters = self._sizes_of(workload, placement.stages).parameters
        end = end_seconds(placement, workload, self.cluster, parameters)
        busiest = max(_busy(workload, priced, stages, len(placement.routes)) for stages in placement.held)
        return busiest + _bubble(workload, priced) + end.step + len(placement.held[0]) * end.gather

    def _sizes_of(self, workload: Workload, stages: int) -> "_Sizes":
        key = replace(_alike(workload), hierarchical=True), stages
        if key not in self._sizes:
            layers = stage_layers(workload, stages)
            parameters = stage_parameters(Operations(workload, self.cluster), layers)
            self._sizes[key] = _Sizes(parameters, activation_bytes(workload, layers), deferred_bytes(workload, layers))
        return self._sizes[key]

    def _place(self, workload: Workload) -> Placement:
        """Once a pipeline is full, more micro-batches change neither the stages of its ranks nor what they hold."""
        ranks = workload.layout.pipeline
        microbatches = 1 if workload.schedule == "gpipe" else min(workload.microbatches, 2 * ranks)
        key = workload.schedule, ranks, microbatches, workload.chunks
        if key not in self._placed:
            self._placed[key] = Placement(schedules.generate(*key))
        return self._placed[key]


def _alike(workload: Workload) -> Workload:
    """What its stages take depends on neither the schedule nor the number of replicas."""
    layout = replace(workload.layout, pipeline=1, data=workload.layout.expert)
    return replace(workload, layout=layout, schedule="", chunks=None, microbatches=1, moment_bytes=0)


class _Sizes(NamedTuple):
    """By stage, of one micro-batch."""

    parameters: list[StageParameters]
    activation_bytes: list[float]
    deferred_bytes: list[float]


class _Priced:
    """Stages and the seconds that they take."""

    def __init__(self, stages: list[StageCost]) -> None:
        self.stages = stages
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


@cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)
