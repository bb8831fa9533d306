"""What ``dualpipe plan`` prints for people: one plan, or the ranking of a search."""

from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal

from dualpipe.program import Gather
from parallel.estimate.plan import Plan
from parallel.estimate.search import Found
from parallel.estimate.spread import Spread
from parallel.estimate.step import idle_by_cause
from parallel.estimate.workload import Workload, spell

_CAUSES = {
    "warmup": "warm-up",
    "dependency": "dependency",
    "communication": "messages",
    "drain": "drain",
    "step_end": "reductions",
}


def report(plan: Plan) -> str:
    """The step, where it goes on each rank, memory, and the run."""
    w, cluster = plan.workload, plan.cluster
    layout = w.layout
    lines = [
        f"{plan.gpus} x {cluster.name}: {w.schedule}, pipeline {layout.pipeline} x data {layout.data}, expert "
        f"{layout.expert}, {w.microbatches} micro-batches of {w.micro_batch_size} x {w.sequence_length} tokens, "
        f"{w.precision}, recompute {spell(w.model.recompute)}" + (f", mtp {w.mtp}" if w.mtp else ""),
        "",
        _ranks(plan),
        "",
        *_step(plan),
        *_run(plan),
        "",
        "Not measured on this cluster: " + _assumed(plan),
    ]
    return "\n".join(lines)


def drawn(plan: Plan, spread: Spread) -> str:
    """What drawn waits and loads do to the step and to the hours."""
    hours = plan.gpu_hours_per_trillion_tokens / plan.step_seconds
    load = f"uniform from 1 to {2 * plan.workload.imbalance - 1:g} of it" if plan.workload.imbalance > 1 else "the mean"
    slower = spread.mean / plan.step_seconds - 1
    return (
        f"{spread.draws} drawn steps: mean {spread.mean:.4g} s ({slower:+.1%}), 90% between {spread.low:.4g} and "
        f"{spread.high:.4g} s, {scaled(spread.low * hours)} to {scaled(spread.high * hours)} GPU-hours per trillion\n"
        f"waits for peers: gamma, deviation {plan.cluster.skew_variation:g} of the mean; rows of the busiest rank: "
        f"{load}; for every layer of every operation"
    )


def ranking(found: Found) -> str:
    """The best layouts by simulated step."""
    rows = [
        (
            "step s,closed form,schedule,GPUs,pipeline,data,expert,micro-batch,recompute,moments,dispatch,payload,"
            "fullest GB,"
            "MFU causal,hours/T"
        ).split(",")
    ]
    closed = {candidate.workload: candidate.step_seconds for candidate in found.candidates}
    for plan in found.plans:
        w = plan.workload
        rows.append(
            [
                f"{plan.step_seconds:.3f}",
                f"{closed[w]:.3f}",
                _schedule(w),
                str(plan.gpus),
                *map(str, (w.layout.pipeline, w.layout.data, w.layout.expert, w.micro_batch_size)),
                spell(w.model.recompute),
                {2: "bf16", 4: "fp32"}[w.moment_bytes],
                "hierarchical" if w.hierarchical else "flat",
                _payload(w),
                f"{plan.memory[plan.fullest_rank].total / 1e9:.1f}",
                f"{plan.mfu[0]:.1%}",
                scaled(plan.gpu_hours_per_trillion_tokens),
            ]
        )
    summary = f"{found.tried} layouts, {len(found.candidates)} fit in memory, the best {len(found.plans)} simulated"
    return "\n".join([aligned(rows), "", summary])


def named(w: Workload) -> str:
    """A layout in words."""
    return (
        f"{_schedule(w)}, pipeline {w.layout.pipeline} x data {w.layout.data}, expert {w.layout.expert}, "
        f"micro-batch {w.micro_batch_size}, recompute {spell(w.model.recompute)}"
    )


def _schedule(w: Workload) -> str:
    return w.schedule if w.chunks is None else f"{w.schedule} x {w.chunks}"


def _payload(w: Workload) -> str:
    return w.precision if w.precision != "fp8" or w.fp8_payload else "bf16"


def _ranks(plan: Plan) -> str:
    rows = ["rank,layers,forward,backward,weights,overlapped,bubble,optimizer,memory GB,of it activations".split(",")]
    for rank, (seconds, memory) in enumerate(zip(plan.seconds, plan.memory, strict=True)):
        stages = sorted({span.slot.stage for span in plan.result.spans[rank] if isinstance(span.slot, Gather)})
        layers = "+".join(str(len(plan.layers[stage])) for stage in stages)
        times = [f"{value:.3g}" for value in asdict(seconds).values()]
        rows.append([str(rank), layers, *times, f"{memory.total / 1e9:.4g}", f"{memory.activations / 1e9:.4g}"])
    return aligned(rows)


def _step(plan: Plan) -> list[str]:
    causes = ", ".join(f"{_CAUSES[name]} {seconds:.3g}" for name, seconds in idle_by_cause(plan.result).items())
    (causal, full), (mfu, full_mfu) = plan.tflops, plan.mfu
    pair = (
        f"{plan.pair_seconds * 1e3:.4g} ms in a typical stage, {plan.pair_hidden_fraction:.1%} of its communication "
        f"hidden, {plan.exposed_seconds:.3g} s a step exposed; bound by {plan.bound}"
    )
    if not any(rank.overlapped_s for rank in plan.seconds):
        pair = f"{plan.workload.schedule} overlaps none: all communication of a layer is exposed"
    return [
        f"step             {plan.step_seconds:.4g} s, {scaled(plan.workload.step_tokens)} tokens; bubble of a rank "
        f"on average, s: {causes}",
        f"pair             {pair}",
        f"utilisation      {causal:.4g} TFLOPS causal, {full:.4g} non-causal; MFU {mfu:.1%} and {full_mfu:.1%}",
        f"memory           rank {plan.fullest_rank} is fullest: {plan.memory[plan.fullest_rank].total / 1e9:.4g} of "
        f"{plan.usable_bytes / 1e9:.4g} GB for tensors",
    ]


def _run(plan: Plan) -> list[str]:
    faults = plan.faults
    ramp = sum(steps for steps, _ in plan.run.ramp)
    of_the_ramp = f", {ramp} of them of smaller batches" if ramp else ""
    dollars = plan.gpu_hours_total * plan.cluster.dollars_per_gpu_hour
    return [
        f"speed            {scaled(plan.tokens_per_day)} tokens a day, "
        f"{scaled(plan.gpu_hours_per_trillion_tokens)} GPU-hours per trillion",
        f"failures         one every {scaled(faults.between_failures / 3600, 3)} h, checkpoints every "
        f"{faults.interval:.4g} s (best {faults.best_interval:.4g}): "
        f"{faults.effective_fraction:.2%} of the time trains",
        f"run              {plan.run.steps} steps{of_the_ramp}: {scaled(plan.gpu_hours)} GPU-hours of steps, "
        f"{scaled(plan.gpu_hours_total)} with failures, {_span(plan.gpu_hours_total / plan.gpus)}, ${scaled(dollars)}",
    ]


def _assumed(plan: Plan) -> str:
    sources = plan.cluster.sources
    named = [key for key, source in sources.items() if source.startswith("assumed")]
    return ", ".join(named) or "nothing"


def _span(hours: float) -> str:
    size, unit = (24, "days") if hours >= 24 else (1, "h") if hours >= 1 else (1 / 3600, "s")
    return f"{scaled(hours / size, 3)} {unit}"


def scaled(value: float, digits: int = 4) -> str:
    """A number of so many digits, in thousands (K), millions (M), billions (B) or trillions (T) from 1 of them on."""
    rounded = float(f"{value:.{digits - 1}e}")
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
    size, unit = next((each for each in units if rounded >= each[0]), (1.0, ""))
    return f"{Decimal(f'{rounded / size:.{digits}g}'):f}{unit}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
