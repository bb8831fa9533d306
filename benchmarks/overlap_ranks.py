"""One rank of ``benchmarks.overlap``, as torchrun starts it on an emulated node:

    torchrun -m benchmarks.overlap_ranks SETTING RESULT

SETTING is a ``Setting`` as JSON; rank 0 writes the result, as JSON, to the file RESULT. The layers, the exchange, the
runtime and the buckets are those that train; a layer's computing phases wait instead of computing. T tokens of a rank,
D model, K experts a token.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.dispatch_ranks import MODEL, routing
from benchmarks.timed import MESSAGE_ELEMENTS, sleep_until, wake_on_time
from dualpipe.cost import PHASES, Costs
from dualpipe.lower import lower
from dualpipe.overlap import BACKWARD, FORWARD, F, I, Part, Phase, Piece, W, duration, pair_plan, plan
from dualpipe.program import Compute, Kind, Message, Op, Overlap, Program, Slot, Work
from dualpipe.runtime import Interpreter
from dualpipe.schedules import generate
from dualpipe.simulate import simulate
from model.block import Attended, Block
from model.exchange import Dispatched, Pending
from model.linear import WeightGradients
from model.router import Routing
from parallel.bucket import Bucket
from parallel.comm_stream import HostStream, Times
from parallel.exchange import GroupExchange
from parallel.groups import Groups
from parallel.hop import Hop, Traffic
from parallel.layer import LayerBackward, LayerForward, LayerRun, apply
from parallel.mesh import Layout
from parallel.transport import PipelineTransport

PIPELINE, EXPERT, RANKS_PER_NODE = 2, 4, 2
NODES = PIPELINE * EXPERT // RANKS_PER_NODE
LAYOUT = Layout(PIPELINE, EXPERT, EXPERT, RANKS_PER_NODE)
CALIBRATIONS = 5


@dataclass(frozen=True)
class Setting:
    """``tokens`` of each rank in a micro-batch; ``layers`` of a stage; ``parameters`` of a stage."""

    microbatches: int
    layers: int
    tokens: int
    chunks: int
    rounds: int
    parameters: int


@dataclass(frozen=True)
class Contestant:
    """``overlapped``: a pair goes piece by piece, not one half after the other. ``hidden``: reductions and gathers run
    beside computation; otherwise each is waited for where it starts."""

    schedule: str
    overlapped: bool
    hidden: bool


CONTESTANTS = {
    "overlapped": Contestant("dualpipe", True, True),
    "in turn": Contestant("dualpipe", False, False),
    "1f1b": Contestant("1f1b", False, False),
}


class Waits(torch.autograd.Function):
    """The identity on rows, whose forward and input gradient take their time and whose weight gradient is deferred."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: Mapping[Op, float], gradients: WeightGradients, weight: Any) -> Tensor:
        ctx.seconds, ctx.gradients, ctx.weight = seconds, gradients, weight
        take(seconds[F])
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        take(ctx.seconds[I])
        ctx.gradients.defer(ctx.weight, lambda _: take(ctx.seconds[W]))
        return gradient, None, None, None


def take(seconds: float) -> None:
    sleep_until(time.perf_counter() + seconds)


class TimedBlock:
    """What a layer calls of a ``model.block.Block``, with the durations of a layer's phases in seconds. Tokens go where
    ``routing`` says."""

    mlp = None
    recompute = MODEL.recompute

    def __init__(self, phases: Mapping[Part, float], routing: Routing, gradients: WeightGradients, weight: Any) -> None:
        self._seconds = {p: {op: phases[p, op] for op in (F, I, W)} for p in (Phase.ATTENTION, Phase.MLP)}
        self._routing, self._gradients, self._weight = routing, gradients, weight

    def attention_phase(self, x_BSD: Tensor, positions: object, again: object) -> Attended:
        h_BSD = Waits.apply(x_BSD, self._seconds[Phase.ATTENTION], self._gradients, self._weight)
        return Attended(h_BSD, h_BSD, self._routing)

    def expert_phase(self, rows_RD: Tensor, weights_R: Tensor, sent: Dispatched, again: object) -> Tensor:
        y_RD: Tensor = Waits.apply(rows_RD, self._seconds[Phase.MLP], self._gradients, self._weight)
        return y_RD.contiguous()


@dataclass
class Pair:
    """What an overlapped pair took, in seconds, and how long its communication was in flight and waited for."""

    seconds: float
    times: Times


class TimedStage:
    """A Stage of ``dualpipe.runtime`` whose layers are ``parallel.layer``'s over ``TimedBlock``. Messages between
    stages are all the same small tensor, ``like``: they are not what is measured."""

    def __init__(self, block: TimedBlock, layers: int, exchange: GroupExchange, ends: tuple[bool, bool], like: Tensor):
        self.block, self.layers, self.exchange = block, layers, exchange
        self._x_BSD = torch.randn(1, len(block._routing.indices_TK), MODEL.hidden_size).bfloat16()
        first, last = ends
        self._output, self._input_gradient = None if last else like, None if first else like
        self.overlaps = True
        self.pairs: list[Pair] = []
        self._alive: dict[Work, list[LayerRun]] = {}

    def forward(self, work: Work, x: Tensor | None) -> Tensor | None:
        self._run(plan(F, self.layers), work, None)
        return self._output

    def backward(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        self._run(plan(Op.BACKWARD, self.layers), None, work)
        return self._input_gradient

    def backward_input(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        self._run(plan(I, self.layers), None, work)
        return self._input_gradient

    def backward_weight(self, work: Work) -> None:
        for piece in plan(W, self.layers):
            apply(self._alive[work][-1 - piece.layer], self.block._gradients, piece.phase)

    def overlapped(
        self, work: Work, x: Tensor | None, other: "TimedStage", other_work: Work, gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        start, before = time.perf_counter(), self.exchange.stream.times()
        if self.overlaps:
            self._run(pair_plan(self.layers, other.layers), work, other_work, other)
        else:
            self.forward(work, x)
            other.backward(other_work, gradient)
        after = self.exchange.stream.times()
        times = Times(after.communication_s - before.communication_s, after.exposed_s - before.exposed_s)
        self.pairs.append(Pair(time.perf_counter() - start, times))
        return self._output, other._input_gradient

    def free(self, work: Work) -> None:
        del self._alive[work]

    def _run(
        self, pieces: Iterable[Piece], ahead: Work | None, back: Work | None, other: "TimedStage | None" = None
    ) -> None:
        """The pieces of a forward of ``ahead`` here and of a backward of ``back`` in ``other``, or here."""
        x_BSD, g_BSD = self._x_BSD, self._x_BSD
        forward: LayerForward | None = None
        backward: LayerBackward | None = None
        for piece in pieces:
            if piece.op is F:
                assert ahead is not None
                if piece.phase is Phase.ATTENTION:
                    x_BSD = x_BSD if forward is None else forward.finish()
                    block = cast(Block, self.block)
                    forward = LayerForward(block, self.exchange, cast(Any, None), lambda *_: None, x_BSD)
                    self._alive.setdefault(ahead, []).append(forward.kept)
                assert forward is not None
                forward.run(piece.phase)
            else:
                assert back is not None
                stage = other or self
                if (piece.phase, piece.op) == (Phase.COMBINE, I):
                    g_BSD = g_BSD if backward is None else backward.finish()
                    kept = stage._alive[back][-1 - piece.layer]
                    backward = LayerBackward(kept, stage.exchange, stage.block._gradients, torch.zeros(()), g_BSD)
                assert backward is not None
                backward.run(piece.phase, piece.op)
        for half in (forward, backward):
            if half is not None:
                half.finish()


class TimedEnd:
    """REDUCE, STEP and GATHER of real buckets. With ``hidden``, ``begin`` starts the gathers, as the end of the step
    before would, and a stage's first forward waits for its own."""

    def __init__(self, buckets: Mapping[int, Bucket], hidden: bool) -> None:
        self.buckets, self.hidden = buckets, hidden
        self.exposed_s = {"reduce": 0.0, "gather": 0.0}

    def begin(self) -> None:
        self.exposed_s = dict.fromkeys(self.exposed_s, 0.0)
        for bucket in self.buckets.values() if self.hidden else ():
            bucket.gather()

    def entered(self, slot: Slot) -> None:
        match slot:
            case Compute(Op.FORWARD, work) | Overlap(work, _):
                with self._exposed("gather"):
                    self.buckets[work.stage].gathered()

    def reduce(self, stage: int) -> None:
        with self._exposed("reduce"):
            self.buckets[stage].reduce()
            if not self.hidden:
                self.buckets[stage].reduced()

    def step(self) -> None:
        with self._exposed("reduce"):
            for bucket in self.buckets.values():
                bucket.reduced()
        dist.all_reduce(torch.zeros(8))

    def gather(self, stage: int) -> None:
        if not self.hidden:
            with self._exposed("gather"):
                gather(self.buckets[stage])

    @contextmanager
    def _exposed(self, kind: str) -> Any:
        start = time.perf_counter()
        yield
        self.exposed_s[kind] += time.perf_counter() - start


class Rank:
    """Everything that this process takes part in. Collective."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.rank = setting, dist.get_rank()
        self.programs = {
            name: lower(generate(c.schedule, PIPELINE, setting.microbatches)) for name, c in CONTESTANTS.items()
        }
        routes = {c.schedule: self.programs[name].routes for name, c in CONTESTANTS.items()}
        groups = {name: Groups(LAYOUT, of, hierarchical=True) for name, of in routes.items()}
        some = groups["dualpipe"]
        self.stream = HostStream()
        hops = []
        for ranks in (LAYOUT.local_peers(self.rank), LAYOUT.node_ranks(self.rank)):
            group = some.of(ranks)
            assert group is not None
            hops.append(Hop(group, [LAYOUT.far(self.rank, peer) for peer in ranks]))
        experts, group = MODEL.n_routed_experts // EXPERT, some.of(LAYOUT.expert_group(self.rank))
        assert group is not None
        self.exchange = GroupExchange(group, experts, hops, Traffic(), self.stream, fp8=True, chunks=setting.chunks)
        generator = torch.Generator().manual_seed(self.rank)
        indices_TK = routing(setting.tokens, EXPERT // RANKS_PER_NODE, generator)
        self.routing = Routing(indices_TK, torch.rand(indices_TK.shape, generator=generator), torch.zeros(()))
        self.transport = PipelineTransport(LAYOUT, self.rank, torch.zeros(MESSAGE_ELEMENTS))
        self.buckets: dict[str, dict[int, Bucket]] = {}
        for schedule, of in routes.items():
            self.buckets[schedule] = {}
            for stage in range(PIPELINE):
                replicas = LAYOUT.dense_replicas([route[stage] for route in of])
                if self.rank in replicas:
                    weight = nn.Parameter(torch.zeros(setting.parameters))
                    named = [("weight", weight, 0, setting.parameters)]
                    self.buckets[schedule][stage] = Bucket(named, groups[schedule].of(replicas), torch.bfloat16)

    def costs(self) -> Costs:
        """Of a stage and of a message, in seconds: communication as measured here, alone, and as much computation as
        hides it: each phase of one half takes as long as what overlaps with it of the other (report, figure 4)."""
        x_TD = torch.randn(self.setting.tokens, MODEL.hidden_size).bfloat16()
        seconds: dict[str, list[float]] = {}

        def measured(name: str, start: Callable[..., Any], *arguments: Any) -> Any:
            dist.barrier()
            begin = time.perf_counter()
            result = start(*arguments)
            result = result.wait() if isinstance(result, Pending) else result
            slowest = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds.setdefault(name, []).append(float(slowest))
            return result

        bucket, exchange, routing = self.buckets["dualpipe"][0], self.exchange, self.routing
        for _ in range(CALIBRATIONS):
            sent = measured("dispatch_F", exchange.dispatch, x_TD, routing.weights_TK, routing.indices_TK)
            rows_RD = torch.randn(len(sent.rows_RD), MODEL.hidden_size).bfloat16()
            measured("combine_F", exchange.combine, rows_RD, sent.layout)
            measured("combine_I", exchange.dispatch_gradient, x_TD, sent.layout)
            measured("dispatch_I", exchange.combine_gradient, rows_RD, sent.weights_R, sent.layout)
            measured("reduce", reduce, bucket)
            measured("gather", gather, bucket)
            measured("step", dist.all_reduce, torch.zeros(8))
            measured("message", self._ping)
        of = {name: statistics.median(samples) for name, samples in seconds.items()}
        phases = {PHASES[key]: of[key] for key in ("dispatch_F", "combine_F", "combine_I", "dispatch_I")}
        phases[Phase.ATTENTION, F] = of["combine_I"]
        phases[Phase.MLP, I] = of["dispatch_F"]
        phases[Phase.MLP, W] = phases[Phase.MLP, F] = of["dispatch_I"] / 2
        phases[Phase.ATTENTION, I] = phases[Phase.ATTENTION, W] = of["combine_F"] / 2
        return Costs(
            layers=self.setting.layers,
            phases=phases,
            message=of["message"] / 2,
            reduce=of["reduce"],
            step=of["step"],
            gather=of["gather"],
        )

    def _ping(self) -> None:
        """A message to the other stage and one back."""
        me, message = LAYOUT.pipeline_index(self.rank), Message(Kind.ACTIVATION, Work(1, 0))
        self.transport.receive(message, 1 - me)
        for turn in (0, 1):
            if turn == me:
                self.transport.send(message, 1 - me, torch.zeros(MESSAGE_ELEMENTS))
            else:
                self.transport.wait(message, 1 - me)
        self.transport.flush()

    def step(self, name: str, costs: Costs) -> dict[str, Any]:
        """One step of a contestant: what this rank saw of it."""
        contestant, program = CONTESTANTS[name], self.programs[name]
        buckets, like = self.buckets[contestant.schedule], torch.zeros(MESSAGE_ELEMENTS)
        position, weight = LAYOUT.pipeline_index(self.rank), nn.Parameter(torch.zeros(1))
        gradients = WeightGradients({weight: torch.zeros(1)})
        assert costs.phases is not None
        block = TimedBlock(costs.phases, self.routing, gradients, weight)
        stages = {}
        for stage in sorted(program.stages_of(position)):
            ends = stage == 0, stage == PIPELINE - 1
            stages[stage] = TimedStage(block, self.setting.layers, self.exchange, ends, like)
            stages[stage].overlaps = contestant.overlapped
        end = TimedEnd(buckets, contestant.hidden)
        interpreter = Interpreter(program, position, stages, self.transport, end, entered=end.entered)
        dist.barrier()
        self.stream.clear()
        start = time.perf_counter()
        end.begin()
        interpreter.run()
        seconds, times = time.perf_counter() - start, self.stream.times()
        pairs = [asdict(pair) for stage in stages.values() for pair in stage.pairs]
        return {"seconds": seconds, "pairs": pairs, "end_exposed_s": end.exposed_s, **asdict(times)}


def reduce(bucket: Bucket) -> None:
    bucket.reduce()
    bucket.reduced()


def gather(bucket: Bucket) -> None:
    bucket.gather()
    bucket.gathered()


def in_turn(costs: Costs) -> Costs:
    """Where a pair is its forward and then its backward."""
    assert costs.phases is not None
    times = {op: duration(plan(op, costs.layers), costs.phases) for op in (F, I, W, Op.BACKWARD)}
    pair = times[F] + times[Op.BACKWARD]
    return replace(costs, phases=None, forward=times[F], backward_input=times[I], backward_weight=times[W],
                   backward=times[Op.BACKWARD], overlapped=pair, layers=1)  # fmt: skip


def simulated_s(program: Program, contestant: Contestant, costs: Costs) -> float:
    """The step as the simulator has it. A gather that hides is none; a reduction that does not hide is computation."""
    if contestant.hidden:
        return simulate(program, replace(costs, gather=0.0)).makespan
    return simulate(program, costs if contestant.overlapped else in_turn(costs)).makespan


def measure(setting: Setting) -> dict[str, Any] | None:
    """The result, on rank 0."""
    rank = Rank(setting)
    costs = rank.costs()
    assert costs.phases is not None
    steps: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in CONTESTANTS}
    for turn in range(1 + setting.rounds):
        for name in CONTESTANTS if turn % 2 == 0 else reversed(CONTESTANTS):
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, rank.step(name, costs))
            if turn:  # a process's first backward takes a second longer, once
                steps[name].append(every)
    if rank.rank:
        return None
    computing = [costs.phases[part] for part in (*FORWARD, *BACKWARD) if part[0] in (Phase.ATTENTION, Phase.MLP)]
    flying = [costs.phases[part] for part in (*FORWARD, *BACKWARD) if part[0] in (Phase.DISPATCH, Phase.COMBINE)]
    result: dict[str, Any] = {
        "phases_s": {key: costs.phases[part] for key, part in PHASES.items()},
        **{key: getattr(costs, key) for key in ("message", "reduce", "step", "gather")},
        "pair_computation_s": setting.layers * sum(computing),
        "pair_communication_s": setting.layers * sum(flying),
        "contestants": {},
    }
    for name, contestant in CONTESTANTS.items():
        simulated = simulated_s(rank.programs[name], contestant, costs)
        result["contestants"][name] = summary(steps[name], simulated, result["pair_computation_s"])
    return result


def summary(steps: list[list[dict[str, Any]]], simulated: float, computation_s: float) -> dict[str, Any]:
    """Medians over steps of the slowest rank's time and of the mean rank's waiting; pairs: medians over all of them."""

    def mean(key: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(statistics.mean(key(rank) for rank in step) for step in steps)

    seconds = [max(rank["seconds"] for rank in step) for step in steps]
    pairs = [pair for step in steps for rank in step for pair in rank["pairs"]]
    found: dict[str, Any] = {
        "seconds": statistics.median(seconds),
        "steps_s": seconds,
        "simulated_s": simulated,
        "difference": statistics.median(seconds) / simulated - 1,
        "communication_s": mean(lambda rank: rank["communication_s"]),
        "exposed_s": mean(lambda rank: rank["exposed_s"]),
        "reduce_exposed_s": mean(lambda rank: rank["end_exposed_s"]["reduce"]),
        "gather_exposed_s": mean(lambda rank: rank["end_exposed_s"]["gather"]),
    }
    found["hidden"] = 1 - found["exposed_s"] / found["communication_s"]
    if pairs:
        flying, exposed = (sum(pair["times"][key] for pair in pairs) for key in ("communication_s", "exposed_s"))
        found["pair_hidden"] = 1 - exposed / flying
        found["pair_s"] = statistics.median(pair["seconds"] for pair in pairs)
        found["pair_to_computation"] = found["pair_s"] / computation_s
    return found


def main() -> int:
    torch.set_num_threads(1)
    wake_on_time()
    dist.init_process_group("gloo")
    assert dist.get_world_size() == LAYOUT.world_size
    result = measure(Setting(**json.loads(sys.argv[1])))
    if result is not None:
        Path(sys.argv[2]).write_text(json.dumps(result))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
