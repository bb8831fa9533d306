"""Whether a plan fits in memory, and what would make it fit.

Every change of one thing is tried, then every pair of changes. Of those that fit the cheapest is named: one that leaves
the arithmetic of training what it is before one that does not, then by the time of a step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from typing import NamedTuple

from dualpipe import schedules
from parallel.estimate.hardware import Cluster
from parallel.estimate.plan import Plan
from parallel.estimate.search import ClosedForm
from parallel.estimate.workload import Workload, recomputes


class DoesNotFit(ValueError):
    """A rank needs more memory than its device has; one line with the rank, the excess and a remedy."""


class _Change(NamedTuple):
    words: str
    of: Callable[[Workload], Workload]
    """Raises ValueError where it cannot be made."""
    exact: bool = True
    """Whether sums and roundings stay those of the configuration, but for their order."""


def check(plan: Plan) -> None:
    """Raises DoesNotFit."""
    if plan.fits:
        return
    rank, usable = plan.fullest_rank, plan.usable_bytes
    need = plan.memory[rank].total
    words = remedy(plan.workload, plan.cluster)
    raise DoesNotFit(
        f"pipeline rank {rank} needs {need / 1e9:.1f} GB, {(need - usable) / 1e9:.1f} GB more than the "
        f"{usable / 1e9:.1f} GB that {plan.cluster.name} has for tensors; "
        + (f"with {words} it fits" if words else "--search looks for layouts that fit")
    )


def remedy(workload: Workload, cluster: Cluster) -> str | None:
    """The cheapest change, or pair of them where none alone does, with which the workload fits; None: there is none."""
    axes = [list(axis) for axis in _axes(workload, cluster)]
    alone = [(change,) for axis in axes for change in axis]
    pairs = [pair for one, other in combinations(axes, 2) for pair in product(one, other)]
    closed, usable = ClosedForm(cluster), cluster.memory_gb * 1e9 * cluster.usable_memory
    for choices in (alone, pairs):
        fitting = []
        for changes in choices:
            other = _changed(workload, changes, int(cluster.ranks_per_node))
            if other is not None and closed.memory_bytes(other) <= usable:
                exact = all(change.exact for change in changes)
                words = " and ".join(change.words for change in changes)
                fitting.append((not exact, closed.step_seconds(other), words))
        if fitting:
            return min(fitting)[2]
    return None


def _changed(workload: Workload, changes: Sequence[_Change], ranks_per_node: int) -> Workload | None:
    """None for what the configuration would refuse."""
    try:
        for change in changes:
            workload = change.of(workload)
        layout = workload.layout
        schedules.check(workload.schedule, layout.pipeline, workload.microbatches, workload.chunks)
        if workload.hierarchical:
            replace(layout, ranks_per_node=ranks_per_node).check_nodes()
    except ValueError:
        return None
    stages = schedules.stages(workload.schedule, layout.pipeline, workload.chunks)
    return workload if stages <= workload.model.num_hidden_layers else None


def _axes(workload: Workload, cluster: Cluster) -> Iterator[Iterator[_Change]]:
    """What can be changed, and to what; a remedy takes at most one change of each."""
    w, layout = workload, workload.layout
    yield (
        _Change(f"model.recompute={_as_key(policy)}", partial(Workload.recomputing, recompute=policy))
        for policy in recomputes(w.precision)
        if policy != w.model.recompute
    )
    yield (
        _Change(f"train.micro_batch_size={size}", partial(_of_micro_batches, size=size))
        for size in range(1, w.micro_batch_size)
        if w.micro_batch_size % size == 0
    )
    yield (
        _Change(f"layout.expert={expert}", partial(_of_experts, expert=expert))
        for expert in range(2 * layout.expert, layout.data + 1, layout.expert)
        if layout.data % expert == 0 and w.model.n_routed_experts % expert == 0
    )
    yield (
        _Change(
            f"layout.pipeline={times * layout.pipeline} layout.data={layout.data // times}",
            partial(_deeper, times=times),
        )
        for times in (2, 4, 8)
        if layout.data % times == 0
    )
    yield (
        _Change(f"schedule.name={name}", partial(replace, schedule=name, chunks=None))
        for name in schedules.SCHEDULES
        if name != w.schedule
    )
    if w.moment_bytes == 4:
        yield iter([_Change("optimizer.moments=bf16", partial(replace, moment_bytes=2), exact=False)])
    if w.precision == "bf16" and cluster.fp8_tflops and cluster.knows("fp8"):
        yield iter([_Change("precision.compute=fp8", partial(replace, precision="fp8"), exact=False)])


def _of_micro_batches(workload: Workload, size: int) -> Workload:
    times = workload.micro_batch_size // size
    return replace(workload, micro_batch_size=size, microbatches=workload.microbatches * times)


def _of_experts(workload: Workload, expert: int) -> Workload:
    return replace(workload, layout=replace(workload.layout, expert=expert))


def _deeper(workload: Workload, times: int) -> Workload:
    layout = workload.layout
    deeper = replace(layout, pipeline=layout.pipeline * times, data=layout.data // times)
    return replace(workload, layout=deeper, microbatches=workload.microbatches * times)


def _as_key(recompute: str | tuple[str, ...]) -> str:
    return recompute if isinstance(recompute, str) else f"[{','.join(recompute)}]"
