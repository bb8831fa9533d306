"""One rank of a training job: builds its stages, groups and optimizer, and runs steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from dualpipe.load import check_training
from dualpipe.lower import lower
from dualpipe.program import Compute, Op, Overlap, Program, Slot, dump_slot
from dualpipe.progress import Span
from dualpipe.runtime import Interpreter, Report
from dualpipe.schedules import generate
from dualpipe.schedules.forward import forward_only
from model.config import ModelConfig
from model.exchange import Exchange, LocalExchange
from model.fp8.assign import set_precision
from model.fp8.gemm import choose
from model.fp8.linear import WeightBlocks
from model.linear import WeightGradients, own
from model.transformer import Transformer, expert_parameters, initialise
from parallel.activity import Activity, collective_timeout
from parallel.bucket import Bucket
from parallel.comm_stream import Times, comm_stream
from parallel.compute_time import compute_time
from parallel.deepep import Buffer, DeepEPExchange, make_buffer
from parallel.deepspeed_backend import DeepSpeedAdamW
from parallel.ema import Average
from parallel.exchange import GroupExchange
from parallel.groups import Groups
from parallel.hop import Hop, Traffic
from parallel.mesh import Layout
from parallel.optimizer import AdamW
from parallel.optimizer_config import OptimizerConfig
from parallel.partition import partition
from parallel.shared_memory import shared_memory
from parallel.stage import ModelStage, StepScale
from parallel.step_end import HeldStage, Refusal, ShardOptimizer, StepEnd
from parallel.transport import PipelineTransport, channel_groups, channels, lanes_of

CHUNK_BYTES, MOST_CHUNKS = 4 << 20, 4
"""A dispatch in two hops goes in chunks of about so many bytes of a rank's rows, and in so many at most."""


@dataclass(frozen=True)
class Job:
    """What is trained and how it is split. Sizes in sequences and tokens; ``dtype`` is that of activations and of the
    parameters that compute. ``dispatch``: flat or hierarchical. ``fp8``: the backend that computes linear layers in FP8
    (``model/fp8``), or None; ``fp8_payload``: dispatch sends them FP8. ``chunks``: the stages of a rank, where the
    schedule leaves them open; ``program``: a lowered program, validated, to run instead of the schedule's;
    ``document_start``: the token that begins a document, if attention is to stay within documents; ``timeout_seconds``:
    what a collective or a message may take."""

    model: ModelConfig
    layout: Layout
    schedule: str
    dtype: torch.dtype
    device: torch.device
    seed: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    optimizer: OptimizerConfig
    dispatch: str = "flat"
    fp8: str | None = None
    fp8_payload: bool = False
    chunks: int | None = None
    program: Program | None = None
    document_start: int | None = None
    timeout_seconds: float = 600.0

    @property
    def microbatches(self) -> int:
        """Micro-batches a replica runs in one step, both directions together."""
        return self.global_batch_size // (self.layout.data * self.micro_batch_size)


@dataclass(frozen=True)
class StepResult:
    """One training step. ``loss`` is the mean over target tokens of the cross-entropy (nats) plus the weighted balance
    loss; ``mtp_loss``, which is no part of it, the same mean of the multi-token-prediction module's cross-entropy, None
    without one; ``expert_load``: busiest over mean, by MoE layer; ``traffic`` and ``times``: of all dispatches and
    combines, bytes summed over the ranks, seconds of the mean rank; ``compute_seconds``: how long each rank computed
    before the update, by rank; ``peak_activations`` are this rank's own, and so are ``spans``, what it executed and
    when, if that was recorded. ``refusal``: why the step was not taken, None when it was."""

    loss: float
    cross_entropy: float
    balance_loss: float
    mtp_loss: float | None
    grad_norm: float
    expert_load: dict[int, float]
    traffic: Traffic
    times: Times
    compute_seconds: tuple[float, ...]
    stop: bool
    peak_activations: int
    spans: Sequence[Span]
    refusal: Refusal | None


class Worker:
    """``rank`` of the world; torch.distributed is initialised, unless the world is this one process. ``store``: where
    ranks tell each other what they are doing (``activity.py``), in a connection of its own.

    Raises ValueError for sizes that the schedule refuses, for a program that is for other sizes, and, as
    PrecisionError, for an FP8 backend that the device has not.
    """

    def __init__(self, job: Job, rank: int, store: Store | None = None) -> None:
        self.job, self.rank = job, rank
        layout = job.layout
        self.position, self.replica = layout.pipeline_index(rank), layout.data_index(rank)
        self.program = _program(job, job.microbatches)
        self._ramp: Program | None = None
        self.products = None if job.fp8 is None else choose(job.fp8, job.device)
        self.activity = Activity(
            rank, range(layout.world_size), store, job.timeout_seconds, _describe, compute_time(job.device)
        )
        self.traffic, self.stream = Traffic(), comm_stream(job.device)
        self._deepep_buffer: Buffer | None = None
        timeout = collective_timeout(job.timeout_seconds)
        modules = job.model.num_nextn_predict_layers
        memory = shared_memory(layout, job.device, timeout)
        self.groups = Groups(layout, self.program.routes, job.dispatch == "hierarchical", modules > 0, timeout, memory)
        models = self._models()
        self.ends = self._share_ends(models) if modules else None
        self.held = {stage: self._hold(stage, model) for stage, model in models.items()}
        buckets = [bucket for held in self.held.values() for bucket in held.buckets]
        if self.ends is not None:
            buckets.append(self.ends)
        self.optimizer: ShardOptimizer = (
            DeepSpeedAdamW(job.optimizer, buckets)
            if job.optimizer.backend == "deepspeed"
            else AdamW(job.optimizer, buckets)
        )
        decay = job.optimizer.ema_decay
        self.average = Average(decay, buckets) if decay else None
        layers, clip_norm = job.model.num_hidden_layers + modules, job.optimizer.clip_norm
        self.end = StepEnd(
            self.held, self.optimizer, layers, clip_norm, self.traffic, self.stream, self.ends, self.activity
        )
        if self.average is not None:
            self.end.average = self.average
            self.end.readers.append(self.average.finish)
        self._evaluation: dict[int, Program] = {}
        like = torch.empty(
            job.micro_batch_size, job.sequence_length, job.model.hidden_size, dtype=job.dtype, device=job.device
        )
        over_nccl = layout.pipeline > 1 and job.device.type == "cuda"
        used = channels([self.program])
        groups = channel_groups(layout, used, timeout) if over_nccl else None
        lanes = None if memory is None else lanes_of(memory, layout, rank, used)
        self.transport = PipelineTransport(layout, rank, like, groups, self.activity, lanes)

    @property
    def needs_data(self) -> bool:
        """Whether this rank reads tokens: it holds an end of the pipeline, or has to find the documents."""
        models = [held.stage.model for held in self.held.values()]
        return self.job.document_start is not None or any(model.first or model.last for model in models)

    def rows(self, sequences: int) -> tuple[int, int]:
        """(first, count) of this replica's sequences in a batch of ``sequences``."""
        count = sequences // self.job.layout.data
        return self.replica * count, count

    def train_step(
        self,
        tokens: Tensor | None,
        learning_rate: float,
        stop: Callable[[], bool] = lambda: False,
        record: bool = False,
        *,
        sequences: int | None = None,
        bias_update_speed: float | None = None,
        mtp_loss_weight: float | None = None,
        loss_limit: float = math.inf,
        compare: bool = False,
    ) -> StepResult:
        """``tokens``: this replica's rows of the global batch, [rows, S+1] int64, or None where ``needs_data`` is
        false. ``stop``: whether this rank asks all to stop after this step; asked as late in the step as all can still
        agree. ``record``: keep what this rank executes, and when.
        ``sequences`` of the global batch: the job's, unless given; ``bias_update_speed`` and ``mtp_loss_weight``: the
        model's. ``loss_limit``: the cross-entropy above which the step is not taken; ``compare`` copies of parameters
        first."""
        job = self.job
        sequences = job.global_batch_size if sequences is None else sequences
        speed = job.model.bias_update_speed if bias_update_speed is None else bias_update_speed
        scale = StepScale(sequences * job.sequence_length, sequences, mtp_loss_weight)
        self._begin(tokens, scale, training=True)
        self.end.begin(learning_rate, speed, stop, loss_limit * scale.tokens, compare)
        report = self._run(self.program_of(sequences), self.end, record)
        sums = self.end.sums
        cross_entropy = sums.cross_entropy / scale.tokens
        balance = job.model.balance_loss_alpha * sums.balance / scale.sequences
        return StepResult(
            cross_entropy + balance,
            cross_entropy,
            balance,
            sums.mtp / scale.tokens if job.model.num_nextn_predict_layers else None,
            sums.grad_norm,
            sums.expert_load,
            sums.traffic,
            sums.times,
            sums.compute_seconds,
            sums.stop,
            report.peak_activations,
            report.spans,
            self.end.refusal,
        )

    def program_of(self, sequences: int) -> Program:
        """The program of a step of so many sequences. Raises ValueError for sizes that the schedule refuses."""
        microbatches = sequences // (self.job.layout.data * self.job.micro_batch_size)
        if microbatches == self.program.microbatches:
            return self.program
        if self._ramp is None or self._ramp.microbatches != microbatches:  # one is kept: sizes come in their order
            self._ramp = _program(self.job, microbatches)
        return self._ramp

    def evaluation_batch(self, sequences: int) -> int:
        """Sequences that an evaluation of ``sequences`` runs, padding included."""
        unit = self.job.layout.data * self.job.micro_batch_size * len(self.program.routes)
        return -(-sequences // unit) * unit

    def evaluate(self, tokens: Tensor | None, sequences: int) -> float:
        """Summed cross-entropy (nats) over ``evaluation_batch(sequences)`` sequences, of which ``tokens`` are this
        replica's rows; rows of ``stage.PADDING`` count for nothing."""
        job = self.job
        microbatches = self.evaluation_batch(sequences) // (job.layout.data * job.micro_batch_size)
        if microbatches not in self._evaluation:
            self._evaluation[microbatches] = lower(forward_only(self.program, microbatches))
        self._begin(tokens, StepScale(1, 1), training=False)
        with torch.no_grad():
            self._run(self._evaluation[microbatches], None)
        total = torch.zeros((), dtype=torch.float64, device=job.device)
        for held in self.held.values():
            total += held.stage.cross_entropy
        if dist.is_initialized():
            with self.activity.waiting("sum of the evaluation", self.activity.ranks):
                dist.all_reduce(total)
        return total.item()

    def _begin(self, tokens: Tensor | None, scale: StepScale, training: bool) -> None:
        parts: Mapping[int, Tensor] = {}
        if tokens is not None:
            parts = dict(enumerate(tokens.to(self.job.device).split(self.job.micro_batch_size)))
        for held in self.held.values():
            held.stage.begin(parts, scale, training)

    def _run(self, program: Program, end: StepEnd | None, record: bool = False) -> Report:
        stages = {stage: held.stage for stage, held in self.held.items()}
        return Interpreter(program, self.position, stages, self.transport, end, record, self._enter).run()

    def _enter(self, slot: Slot) -> None:
        self.activity.computes(slot)
        match slot:
            case Compute(Op.FORWARD, work) | Overlap(work, _):
                self.end.gathered(work.stage)

    def settle(self) -> None:
        """Wait until the parameters are whole, which a step leaves under way. Collective."""
        for stage in self.held:
            self.end.gathered(stage)

    @property
    def _experts(self) -> int:
        """Routed experts of each layer that this rank holds."""
        return self.job.model.n_routed_experts // self.job.layout.expert

    def _models(self) -> dict[int, Transformer]:
        """The slices of the model that this rank holds, by stage, with their initial values. If both the first and the
        last one need the embedding, they share it."""
        job, each = self.job, self._experts
        first = job.layout.expert_index(self.rank) * each
        cut = partition(job.model, self.program.stages)
        models: dict[int, Transformer] = {}
        for stage in sorted(self.program.stages_of(self.position)):
            shared = models[0].embed if stage == len(cut) - 1 and 0 in models else None
            with torch.device(job.device):
                model = Transformer(job.model, cut[stage], range(first, first + each), shared)
            initialise(model, job.seed)
            models[stage] = model
        return models

    def _share_ends(self, models: Mapping[int, Transformer]) -> Bucket | None:
        """The embedding, which the first stage and multi-token prediction in the last one use: a bucket of its own,
        whose replicas are the ranks of both. None on a rank that has neither."""
        embeds = [model.embed for model in models.values() if model.embed is not None]
        if not embeds:
            return None
        positions = [route[end] for route in self.program.routes for end in (0, -1)]
        weight = embeds[0].weight
        ranks = self.job.layout.dense_replicas(positions)
        return self._bucket([("embed.weight", weight, 0, weight.numel())], ranks)

    def _bucket(self, named: Sequence[tuple[str, torch.nn.Parameter, int, int]], ranks: Sequence[int]) -> Bucket:
        """A bucket that ``ranks`` hold."""
        return Bucket(named, self.groups.of(ranks), self.job.dtype)

    def _hold(self, stage: int, model: Transformer) -> HeldStage:
        job, layout = self.job, self.job.layout
        positions = [route[stage] for route in self.program.routes]
        replicas = layout.dense_replicas(positions)
        dense, routed = [], []
        split = expert_parameters(model)
        for name, parameter in model.named_parameters():
            count = parameter.numel()
            if self.ends is not None and parameter in self.ends.buffers:
                continue
            if parameter in split:
                routed.append((name, parameter, layout.expert_index(self.rank) * count, count * layout.expert))
            else:
                dense.append((name, parameter, 0, count))
        buckets = [self._bucket(dense, replicas)]
        if routed:
            buckets.append(self._bucket(routed, layout.expert_replicas(positions, layout.expert_index(self.rank))))
        shared = [] if self.ends is None else [self.ends]
        gradients = WeightGradients({p: g for bucket in buckets + shared for p, g in bucket.buffers.items()})
        own(model, gradients)
        blocks = None
        if self.products is not None:
            blocks = WeightBlocks()
            set_precision(model, self.products.gemm, blocks)
            for bucket in buckets:
                bucket.written.append(blocks.forget)
        held = ModelStage(model, gradients, self._exchange(self._experts), job.device, job.document_start)
        return HeldStage(held, buckets, self.groups.of(replicas), self.rank == replicas[0], blocks)

    def _exchange(self, experts: int) -> Exchange:
        """How tokens reach their experts, of which each rank holds so many."""
        layout = self.job.layout
        group = self.groups.of(layout.expert_group(self.rank))
        if group is None:
            return LocalExchange(experts)
        match self.job.dispatch:
            case "deepep":
                assert isinstance(group, dist.ProcessGroup), "it needs a GPU, and memory is for processors"
                return self._deepep(group, experts)
            case "flat":
                peers = [layout.expert_group(self.rank)]
            case "hierarchical":
                peers = [layout.local_peers(self.rank), layout.node_ranks(self.rank)]
            case _:
                raise ValueError(f"dispatch.kind={self.job.dispatch} must be flat, hierarchical or deepep")
        hops = []
        for ranks in peers:
            of_hop = self.groups.of(ranks)
            if of_hop is not None:  # a hop to oneself is none
                hops.append(Hop(of_hop, [layout.far(self.rank, rank) for rank in ranks]))
        chunks = 1 if len(hops) == 1 else chunks_of(self.job)
        fp8 = self.job.fp8_payload
        return GroupExchange(group, experts, hops, self.traffic, self.stream, fp8, chunks, self.activity)

    def _deepep(self, group: dist.ProcessGroup, experts: int) -> DeepEPExchange:
        """All stages and micro-batches take turns with one buffer."""
        job = self.job
        if self._deepep_buffer is None:
            tokens = job.micro_batch_size * job.sequence_length
            self._deepep_buffer = make_buffer(group, job.model, tokens, job.fp8_payload, job.timeout_seconds)
        mine = self.traffic, self.stream, job.fp8_payload, self.activity, job.device
        return DeepEPExchange(self._deepep_buffer, job.layout, self.rank, experts, *mine)


def alike(layout: Layout, program: Program) -> list[list[int]]:
    """For each rank the others that hold the same stages, and so compute as much."""
    held = [sorted(program.stages_of(position)) for position in range(layout.pipeline)]
    found = []
    for rank in range(layout.world_size):
        own = held[layout.pipeline_index(rank)]
        same = [position for position, stages in enumerate(held) if stages == own]
        found.append([other for other in layout.dense_replicas(same) if other != rank])
    return found


def _describe(what: object) -> str:
    return what if isinstance(what, str) else dump_slot(cast(Slot, what))


def chunks_of(job: Job) -> int:
    """Chunks of a dispatch in two hops: more of them hide more of one hop behind the other, and each costs messages.
    From sizes that all ranks share, so that all cut alike."""
    row_bytes = job.model.hidden_size * (1 if job.fp8_payload else job.dtype.itemsize)
    return min(MOST_CHUNKS, max(1, job.micro_batch_size * job.sequence_length * row_bytes // CHUNK_BYTES))


def _program(job: Job, microbatches: int) -> Program:
    if job.program is None:
        return lower(generate(job.schedule, job.layout.pipeline, microbatches, job.chunks))
    check_training(job.program, job.layout.pipeline, microbatches)
    return job.program
