"""Whether a plan fits in memory, and what would make it fit."""

from collections.abc import Iterator
from dataclasses import replace

from dualpipe import schedules
from parallel.estimate.plan import Plan, make_plan
from parallel.estimate.workload import SELECTIVE, Workload


class DoesNotFit(ValueError):
    """A rank needs more memory than its device has; one line with the rank, the excess and a remedy."""


def check(plan: Plan) -> None:
    """Raises DoesNotFit."""
    if plan.fits:
        return
    rank, usable = plan.fullest_rank, plan.usable_bytes
    need = plan.memory[rank].total
    remedy = next((words for words, other in _changes(plan.workload) if _fits(plan, other)), None)
    raise DoesNotFit(
        f"pipeline rank {rank} needs {need / 1e9:.1f} GB, {(need - usable) / 1e9:.1f} GB more than the "
        f"{usable / 1e9:.1f} GB that {plan.cluster.name} has for tensors; "
        + (f"with {remedy} it fits" if remedy else "--search looks for layouts that fit")
    )


def _fits(plan: Plan, workload: Workload) -> bool:
    layout = workload.layout
    try:
        schedules.check(workload.schedule, layout.pipeline, workload.microbatches, workload.chunks)
    except ValueError:
        return False
    return make_plan(workload, plan.cluster, plan.run).fits


def _changes(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Changes, the cheapest first, and the words for them; each alone, then on top of recomputation."""
    selective, prefix = workload, ""
    if workload.model.recompute not in (SELECTIVE, "full"):
        selective, words = workload.recomputing(SELECTIVE), f"model.recompute=[{','.join(SELECTIVE)}]"
        yield words, selective
        prefix = f"{words} and "
    if workload.model.recompute != "full":
        yield "model.recompute=full", workload.recomputing("full")
    layout, c = workload.layout, workload.model
    if workload.micro_batch_size % 2 == 0:
        half = replace(
            selective, micro_batch_size=workload.micro_batch_size // 2, microbatches=2 * workload.microbatches
        )
        yield f"{prefix}train.micro_batch_size={half.micro_batch_size}", half
    for expert in (2 * layout.expert, 4 * layout.expert):
        if layout.data % expert == 0 and c.n_routed_experts % expert == 0:
            yield f"{prefix}layout.expert={expert}", replace(selective, layout=replace(layout, expert=expert))
    stages = schedules.stages(workload.schedule, 2 * layout.pipeline, workload.chunks)
    if layout.data % (2 * layout.expert) == 0 and stages <= c.num_hidden_layers:
        deeper = replace(layout, pipeline=2 * layout.pipeline, data=layout.data // 2)
        yield (
            f"{prefix}layout.pipeline={deeper.pipeline} layout.data={deeper.data}",
            replace(selective, layout=deeper, microbatches=2 * workload.microbatches),
        )
    if workload.precision == "bf16":
        yield f"{prefix}precision=fp8", replace(selective, precision="fp8")
