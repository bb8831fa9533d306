"""Everything that ``dualpipe plan`` says about one workload on one cluster."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from dualpipe.program import Program
from dualpipe.simulate import Simulation
from parallel.estimate.cores import share_cores
from parallel.estimate.hardware import Cluster
from parallel.estimate.memory import (
    RankMemory,
    StageParameters,
    activation_bytes,
    deferred_bytes,
    message_bytes,
    rank_memory,
    stage_parameters,
)
from parallel.estimate.operations import Operations
from parallel.estimate.peak import Placement
from parallel.estimate.run import DAY, Faults, faults, model_flops
from parallel.estimate.stages import (
    StageCost,
    hidden_fraction,
    pair_seconds,
    pair_timeline,
    stage_costs,
    stage_layers,
)
from parallel.estimate.step import (
    DurationTable,
    EndSeconds,
    RankSeconds,
    idle_by_cause,
    play,
    ranks_seconds,
    step_program,
)
from parallel.estimate.workload import Workload, spell


@dataclass(frozen=True)
class Run:
    """``steps`` of training, with a checkpoint every so many of them; None: at the best interval. ``active``: the
    weights that a token is multiplied with. ``ramp``: (steps, sequences of each) for those of the steps that take less
    than the full batch."""

    steps: int
    checkpoint_every: int | None
    active: int
    ramp: tuple[tuple[int, int], ...] = ()

    def in_full_batches(self, sequences: int) -> "Run":
        """As many steps of so many ``sequences`` as take the run's tokens."""
        taken = sum(steps * smaller for steps, smaller in self.ramp)
        full = self.steps - sum(steps for steps, _ in self.ramp)
        return replace(self, steps=full + -(-taken // sequences), ramp=())


@dataclass(frozen=True)
class Plan:
    """``layers``, ``stages`` by stage; ``seconds``, ``memory`` by pipeline rank."""

    workload: Workload
    cluster: Cluster
    run: Run
    program: Program
    layers: list[range]
    stages: list[StageCost]
    end: EndSeconds
    result: Simulation
    seconds: list[RankSeconds]
    memory: list[RankMemory]

    @property
    def step_seconds(self) -> float:
        return self.result.makespan

    @property
    def gpus(self) -> int:
        return self.workload.layout.world_size

    @property
    def usable_bytes(self) -> float:
        """Of one device, for tensors."""
        return self.cluster.memory_gb * 1e9 * self.cluster.usable_memory

    @property
    def fullest_rank(self) -> int:
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def fits(self) -> bool:
        return self.memory[self.fullest_rank].total <= self.usable_bytes

    @property
    def typical(self) -> StageCost:
        """The stage whose full backward is the median: one of the middle of the model."""
        ordered = sorted(self.stages, key=lambda stage: sum(stage.alone.values()))
        return ordered[len(ordered) // 2]

    @property
    def pair_seconds(self) -> float:
        return pair_seconds(self.typical, self.typical)

    @property
    def pair_hidden_fraction(self) -> float:
        """The share of a typical pair's communication during which a kernel computes."""
        return hidden_fraction(pair_timeline(self.typical, self.typical)) * self.cluster.computing_busy

    @property
    def bound(self) -> str:
        """Which stream of a typical pair is the longer: arithmetic (with its small kernels), or links."""
        totals = {"compute": 0.0, "communication": 0.0}
        for layer in self.typical.layers:
            for (phase, _), seconds in layer.items():
                totals["communication" if phase.value in ("dispatch", "combine") else "compute"] += seconds
        return "links" if totals["communication"] > totals["compute"] else "arithmetic"

    @property
    def exposed_seconds(self) -> float:
        """What the rank with the most computing spends in its operations while only communication runs: the seconds
        that free links and no skew would save inside its operations."""
        typical = self.typical
        computing = sum(
            seconds
            for layer in typical.layers
            for (phase, _), seconds in layer.items()
            if phase.value not in ("dispatch", "combine")
        )
        pair = pair_timeline(typical, typical)
        pairs = max(counts["FB"] for counts in self.result.operations)
        return pairs * (max(piece.end for piece in pair) - computing)

    @cached_property
    def faults(self) -> Faults:
        every = self.run.checkpoint_every
        return faults(self.cluster, self.gpus, None if every is None else every * self.step_seconds)

    @property
    def tokens_per_day(self) -> float:
        return self.workload.step_tokens / self.step_seconds * DAY

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        """Of steps alone, without failures and checkpoints."""
        return 1e12 / self.workload.step_tokens * self.step_seconds * self.gpus / 3600

    @cached_property
    def run_seconds(self) -> float:
        """Of the run's steps alone. A step takes a + b M seconds for M micro-batches once they fill the pipeline, so
        that the smallest step of a ramp and the full one give all between them. Raises ValueError for a ramp whose
        smallest batch the schedule refuses."""
        seconds = self.run.steps * self.step_seconds
        if not self.run.ramp:
            return seconds
        w = self.workload
        of_each = w.layout.data * w.micro_batch_size
        least = min(sequences for _, sequences in self.run.ramp) // of_each
        smallest = make_plan(replace(w, microbatches=least), self.cluster, self.run)
        slope = (self.step_seconds - smallest.step_seconds) / (w.microbatches - least)
        missing = sum(steps * (w.microbatches - sequences / of_each) for steps, sequences in self.run.ramp)
        return seconds - slope * missing

    @property
    def gpu_hours(self) -> float:
        """Of the run's steps alone."""
        return self.run_seconds * self.gpus / 3600

    @property
    def gpu_hours_total(self) -> float:
        """Of the whole run, failures and checkpoints counted in."""
        return self.gpu_hours / self.faults.effective_fraction

    @property
    def tflops(self) -> tuple[float, float]:
        """(causal, non-causal) of one GPU, of the model's operations."""
        rate = self.workload.step_tokens / (self.step_seconds * self.gpus) / 1e12
        causal, full = model_flops(self.workload.model, self.workload.attended, self.run.active)
        return causal * rate, full * rate

    @property
    def mfu(self) -> tuple[float, float]:
        """(causal, non-causal), of the BF16 peak whatever the precision, as published figures have it; of the FP32
        peak where everything is FP32."""
        fp32 = self.workload.precision == "fp32"
        peak = self.cluster.fp32_tflops if fp32 else self.cluster.bf16_tflops
        causal, full = self.tflops
        return causal / peak, full / peak

    def to_json(self) -> dict[str, Any]:
        """The object that ``plan --json`` prints. Seconds, bytes, dollars."""
        layout = self.workload.layout
        return {
            "cluster": self.cluster.name,
            "gpus": self.gpus,
            "schedule": self.workload.schedule,
            "chunks": self.workload.chunks,
            "layout": {"pipeline": layout.pipeline, "data": layout.data, "expert": layout.expert},
            "micro_batch_size": self.workload.micro_batch_size,
            "microbatches": self.workload.microbatches,
            "precision": self.workload.precision,
            "recompute": spell(self.workload.model.recompute),
            "moments": {2: "bf16", 4: "fp32"}[self.workload.moment_bytes],
            "dispatch": "hierarchical" if self.workload.hierarchical else "flat",
            "fp8_payload": self.workload.precision == "fp8" and self.workload.fp8_payload,
            "mtp": self.workload.mtp,
            "layers": [len(each) for each in self.layers],
            "steps": self.run.steps,
            "step_seconds": self.step_seconds,
            "tokens_per_step": self.workload.step_tokens,
            "tokens_per_day": self.tokens_per_day,
            "gpu_hours_per_trillion_tokens": self.gpu_hours_per_trillion_tokens,
            "gpu_hours_without_faults": self.gpu_hours,
            "gpu_hours_total": self.gpu_hours_total,
            "dollars_total": self.gpu_hours_total * self.cluster.dollars_per_gpu_hour,
            "effective_training_fraction": self.faults.effective_fraction,
            "faults": asdict(self.faults),
            "tflops_causal": self.tflops[0],
            "tflops_noncausal": self.tflops[1],
            "mfu_causal": self.mfu[0],
            "mfu_noncausal": self.mfu[1],
            "pair_seconds": self.pair_seconds,
            "pair_hidden_fraction": self.pair_hidden_fraction,
            "exposed_communication_seconds": self.exposed_seconds,
            "bound": self.bound,
            "bubble_by_cause": idle_by_cause(self.result),
            "reduce_seconds": self.end.reduce,
            "fits": self.fits,
            "usable_memory_bytes": self.usable_bytes,
            "ranks": [
                {**asdict(seconds), "memory_bytes": memory.total, "memory": asdict(memory)}
                for seconds, memory in zip(self.seconds, self.memory, strict=True)
            ],
        }


def make_plan(workload: Workload, cluster: Cluster, run: Run, program: Program | None = None) -> Plan:
    """``program``: that of the workload's sizes, where it is not to be made from its schedule.

    Raises ValueError for sizes that the schedule or the model refuse, and ClusterError for a rate that is not known.
    """
    operations = Operations(workload, cluster)
    if program is None:
        program = step_program(workload.schedule, workload.layout.pipeline, workload.microbatches, workload.chunks)
    layers = stage_layers(workload, program.stages)
    stages = stage_costs(operations, layers)
    parameters = stage_parameters(operations, layers)
    placement = Placement(program)
    end = end_seconds(placement, workload, cluster, parameters)
    result = _played(program, workload, cluster, layers, stages, end)
    peaks = placement.peak_R(activation_bytes(workload, layers), deferred_bytes(workload, layers))
    memory = rank_memory(placement, workload, parameters, peaks)
    return Plan(workload, cluster, run, program, layers, stages, end, result, ranks_seconds(result), memory)


def replay(plan: Plan, table: DurationTable) -> Simulation:
    """The plan's step once more, with other durations of its operations."""
    return _played(plan.program, plan.workload, plan.cluster, plan.layers, plan.stages, plan.end, table)


def _played(
    program: Program,
    workload: Workload,
    cluster: Cluster,
    layers: list[range],
    stages: list[StageCost],
    end: EndSeconds,
    table: DurationTable | None = None,
) -> Simulation:
    message = message_bytes(workload) / cluster.ib_one_way, cluster.latency_us * 1e-6
    afterwards = None
    if cluster.shares_cores:
        message = (0.0, 0.0)  # it is in the operations that it takes cores from
        cores = int(cluster.ranks_per_node), int(cluster.cores_per_node), cluster.cores_busy
        afterwards = lambda progress: share_cores(progress, workload.layout, *cores)  # noqa: E731
    return play(program, stages, end, message, activation_bytes(workload, layers), afterwards, table)


def end_seconds(
    placement: Placement, workload: Workload, cluster: Cluster, parameters: Sequence[StageParameters]
) -> EndSeconds:
    """Reduction and gathering of the largest stage, and the update of the rank that owns most."""
    layout, width = workload.layout, workload.activation_width
    twins: list[int] = placement.copies_S.astype(int).tolist()
    one_node = layout.world_size <= cluster.ranks_per_node
    local = int(min(cluster.ranks_per_node, layout.data))
    local_experts = max(local // layout.expert, 1)

    def collective(stage: int, size: int) -> float:
        """A reduce-scatter or an all-gather of the stage's two buckets, ``size`` bytes an element."""
        dense, routed = parameters[stage].dense * size, parameters[stage].routed * size
        replicas = twins[stage] * layout.data
        of_experts = replicas // layout.expert
        return ring_seconds(cluster, dense, replicas, replicas if one_node else local) + ring_seconds(
            cluster, routed, of_experts, of_experts if one_node else local_experts
        )

    owned = [
        sum((parameters[s].dense + parameters[s].routed * layout.expert) / (twins[s] * layout.data) for s in stages)
        for stages in placement.held
    ]
    # Gradient: read for the norm, scaled in place, read; master and moments: read and written; the parameter: written.
    update = max(owned) * (4 * 4 + 2 * 4 + 4 * workload.moment_bytes + width)
    every = range(placement.stages)
    reduce = max(collective(stage, 4) for stage in every)
    step = update / (cluster.memory_gb_per_s * 1e9 * cluster.memory_efficiency)
    gather = max(collective(stage, width) for stage in every)
    if cluster.shares_cores:  # a core that sums gradients computes nothing meanwhile
        return EndSeconds(0.0, step + reduce * len(placement.held[0]), gather)
    return EndSeconds(reduce, step, gather)


def ring_seconds(cluster: Cluster, size: float, replicas: int, local: int) -> float:
    """A reduce-scatter or all-gather of ``size`` bytes over ``replicas``, ``local`` of them in each node.

    In a ring every rank passes on (n-1)/n of the bytes. Of ``local`` hops one leaves the node, on the card of another
    rank for each part of the bytes, so that the node's cards share them.
    """
    if replicas < 2:
        return 0.0
    passed = size * (replicas - 1) / replicas
    between = passed / (local * cluster.ib_one_way * cluster.reduce_link) if replicas > local else 0.0
    hops_inside = (local - 1) / local if replicas > local else 1.0
    inside = passed * hops_inside / (cluster.nvlink_one_way * cluster.reduce_link)
    return max(between, inside) + replicas * cluster.latency_us * 1e-6
