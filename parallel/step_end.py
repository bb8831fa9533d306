"""The end of a step, as the program calls it: REDUCE, STEP and GATHER over the stages that a rank holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.fp8.linear import WeightBlocks
from parallel import flips
from parallel.activity import Activity
from parallel.bucket import ALIGNMENT, Bucket
from parallel.collectives import Group, Transfer, all_reduce
from parallel.comm_stream import CommStream, Times
from parallel.ema import Average
from parallel.flips import Flip
from parallel.hop import Traffic
from parallel.optimizer import clip_scale
from parallel.stage import ModelStage


@dataclass
class HeldStage:
    """A stage as one rank holds it. ``replicas``: the group of all ranks with a copy of it (None: this is the only
    one); ``counts``: this rank reports for the whole group, so that a copy's figures are counted once; ``blocks``: its
    weights as FP8 products take them, from their first use after a GATHER to the next."""

    stage: ModelStage
    buckets: list[Bucket]
    replicas: Group | None
    counts: bool
    blocks: WeightBlocks | None = None
    loads_LE: Tensor | None = None
    reducing: Transfer[None] | None = None

    def loads(self) -> dict[int, Tensor]:
        """Tokens of the whole step that chose each expert, by MoE layer; valid after STEP."""
        return {} if self.loads_LE is None else dict(zip(self.stage.loads, self.loads_LE, strict=True))


@dataclass(frozen=True)
class Refusal:
    """Why a step was not taken, on all ranks alike. ``flips``: the bits that changed by themselves, if that is why."""

    why: str
    flips: tuple[Flip, ...] = ()


@dataclass(frozen=True)
class StepSums:
    """What all ranks know after STEP. ``cross_entropy``, ``balance`` and ``mtp`` are sums over the step, as in
    ``model.transformer.Loss``; ``expert_load``: the busiest expert's load over the mean, by MoE layer; ``traffic``:
    bytes of all ranks; ``times``: the mean rank's; ``stop``: some rank asked to stop; ``flips``: how many were
    found, each by all that compared it; ``compute_seconds``: how long each rank computed up to STEP, by rank.
    """

    cross_entropy: float
    balance: float
    mtp: float
    grad_norm: float
    expert_load: dict[int, float]
    traffic: Traffic
    times: Times
    stop: bool
    flips: int
    compute_seconds: tuple[float, ...]


class ShardOptimizer(Protocol):
    """What updates the owned shards of all buckets with the gradients that they hold. ``first`` and ``second``: the
    moments of each bucket's shard, laid out as its master is; ``steps``: the updates made. Checkpoints read and write
    these, the moments in place."""

    buckets: Sequence[Bucket]
    first: list[Tensor]
    second: list[Tensor]
    steps: int

    def update(self, learning_rate: float, gradient_scale: float) -> None: ...


class StepEnd:
    """Runs the end of a step. ``begin`` before each program; ``sums`` after it, and ``refusal``, None when the step was
    taken: otherwise masters, moments, biases and average are what they were. ``layers``: of the model, with those of
    multi-token prediction; ``readers``: called before the masters change, each returns when it has read what it still
    needs of them; ``witnesses``: called after these in a step in which flips are looked for, each returns those of this
    rank that it knows of; ``ends``: the bucket that first and last stage share, if there is one; ``average``: of the
    masters, if one is kept: it takes in every step.

    That bucket's gradients are whole once all of the rank's stages are, so it is reduced after the last of them, and
    gathered so: it is behind everything else on every rank that has it, and no two wait for each other crosswise.
    """

    sums: StepSums
    refusal: Refusal | None
    stop: Callable[[], bool]
    """Whether this rank wants to stop after the step that is being taken."""

    def __init__(
        self,
        held: Mapping[int, HeldStage],
        optimizer: ShardOptimizer,
        layers: int,
        clip_norm: float,
        traffic: Traffic,
        stream: CommStream,
        ends: Bucket | None = None,
        activity: Activity | None = None,
    ) -> None:
        self.held, self.optimizer, self.layers, self.clip_norm = held, optimizer, layers, clip_norm
        self.traffic, self.stream, self.ends = traffic, stream, ends
        self.readers: list[Callable[[], None]] = []
        self.witnesses: list[Callable[[], list[Flip]]] = []
        self.average: Average | None = None
        self.activity = Activity() if activity is None else activity

    def begin(
        self,
        learning_rate: float,
        bias_update_speed: float,
        stop: Callable[[], bool],
        cross_entropy_limit: float = math.inf,
        compare: bool = False,
    ) -> None:
        """``stop``: asked when the sums are taken, whether this rank wants to stop; ``cross_entropy_limit``: of the
        step's sum, above which it is not taken; ``compare``: look for flips."""
        self._cross_entropy_limit, self._compare = cross_entropy_limit, compare
        self._learning_rate, self._bias_update_speed, self.stop = learning_rate, bias_update_speed, stop
        self.traffic.clear()
        self.stream.clear()
        self.activity.compute_time.begin()
        self._unreduced, self._ungathered = set(self.held), set(self.held)
        for bucket in self.optimizer.buckets:
            bucket.gradients.zero_()

    def reduce(self, stage: int) -> None:
        held = self.held[stage]
        for bucket in held.buckets:
            with self.activity.waiting(f"gradient reduction of stage {stage}", bucket.peers):
                bucket.reduce()
        if held.stage.loads:
            held.loads_LE = torch.stack(list(held.stage.loads.values()))
            if held.replicas is not None:
                held.reducing = all_reduce(held.loads_LE, held.replicas)
        self._unreduced.remove(stage)
        if self.ends is not None and not self._unreduced:
            with self.activity.waiting("gradient reduction of the embedding", self.ends.peers):
                self.ends.reduce()

    def step(self) -> None:
        computed_s = self.activity.compute_time.seconds()
        for bucket in self.optimizer.buckets:
            with self.activity.waiting("gradient reduction", bucket.peers):
                bucket.reduced()
        for stage, held in self.held.items():
            if held.reducing is not None:
                with self.activity.waiting(f"sum of expert loads of stage {stage}", held.buckets[0].peers):
                    held.reducing.wait()
        for finish_reading in self.readers:
            finish_reading()
        found = []
        if self._compare:
            found = flips.find(self.optimizer.buckets, self.activity)
            found += [flip for witness in self.witnesses for flip in witness() if flip not in found]
        with self.activity.waiting("sums of the step", self.activity.ranks):
            self.sums = self._sums(len(found), computed_s)
        self.refusal = self._refusal(found)
        if self.refusal is None:
            self.optimizer.update(self._learning_rate, clip_scale(self.sums.grad_norm, self.clip_norm))
            self._update_biases()
            if self.average is not None:
                self.average.start()

    def _refusal(self, found: Sequence[Flip]) -> Refusal | None:
        """``found``: this rank's flips. All decide alike, from the sums."""
        sums = self.sums
        if sums.flips:
            everywhere = flips.everybodys(found, self.activity)
            return Refusal(f"bits changed by themselves: {', '.join(map(str, everywhere))}", tuple(everywhere))
        if not all(map(math.isfinite, (sums.grad_norm, sums.cross_entropy, sums.balance, sums.mtp))):
            return Refusal("loss or gradient is not finite")
        if sums.cross_entropy > self._cross_entropy_limit:
            return Refusal("the loss is a spike")
        return None

    def gather(self, stage: int) -> None:
        """Start making the stage's parameters whole: that hides behind the first forwards of the other stages."""
        for bucket in self.held[stage].buckets:
            with self.activity.waiting(f"parameter gather of stage {stage}", bucket.peers):
                bucket.gather()
        self._ungathered.remove(stage)
        if self.ends is not None and not self._ungathered:
            with self.activity.waiting("parameter gather of the embedding", self.ends.peers):
                self.ends.gather()

    def gathered(self, stage: int) -> None:
        """Wait for ``gather`` before the stage's parameters are used."""
        shared = [] if self.ends is None else [self.ends]
        for bucket in (*self.held[stage].buckets, *shared):
            with self.activity.waiting(f"parameter gather of stage {stage}", bucket.peers):
                bucket.gathered()

    def _update_biases(self) -> None:
        for held in self.held.values():
            loads = held.loads()
            for layer, block in held.stage.model.blocks():
                if block.router is not None:
                    block.router.update_bias(loads[layer], self._bias_update_speed)

    def _sums(self, flips: int, computed_s: float) -> StepSums:
        """One all-reduce for everything that the ranks must know or agree on. In FP64: with some thousand ranks the
        order of an FP32 sum would show in the reported loss."""
        stages = [held.stage for held in self.held.values()]
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        loads, computed = 10, 10 + self.layers  # where these begin
        vector = torch.zeros(computed + ranks, dtype=torch.float64, device=stages[0].device)
        vector[computed + rank] = computed_s
        for bucket in self.optimizer.buckets:
            vector[0] += squared_norm(bucket.gradient)
        for held in self.held.values():
            vector[1] += held.stage.cross_entropy
            vector[2] += held.stage.balance
            vector[3] += held.stage.mtp
            if held.counts:
                for layer, load_E in held.loads().items():
                    vector[loads + layer] = load_E.max() / load_E.double().mean()
        own, times = self.traffic, self.stream.times()
        vector[4:7] = vector.new_tensor([self.stop(), own.inside_bytes, own.between_bytes])
        vector[7:10] = vector.new_tensor([times.communication_s, times.exposed_s, flips])
        if dist.is_initialized():
            dist.all_reduce(vector)
        numbers = vector.tolist()
        squares, cross_entropy, balance, mtp, stop, inside, between, flying_s, exposed_s, flipped = numbers[:loads]
        by_layer = {layer: load for layer, load in enumerate(numbers[loads:computed]) if load > 0}
        traffic, times = Traffic(int(inside), int(between)), Times(flying_s / ranks, exposed_s / ranks)
        return StepSums(
            cross_entropy,
            balance,
            mtp,
            squares**0.5,
            by_layer,
            traffic,
            times,
            stop > 0,
            int(flipped),
            tuple(numbers[computed:]),
        )


def squared_norm(gradient: Tensor) -> Tensor:
    """FP64, from FP32 norms of runs of 64 elements (a shard is a whole number of them): widening every element first
    would copy the gradient at twice its size."""
    return torch.linalg.vector_norm(gradient.view(-1, ALIGNMENT), dim=1).double().square().sum()
