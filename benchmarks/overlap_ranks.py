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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.dispatch_ranks import MODEL, routing
from benchmarks.overlap_stage import TimedBlock, TimedEnd, TimedStage, gather, reduce
from benchmarks.timed import MESSAGE_ELEMENTS, wake_on_time
from dualpipe.cost import PHASES, Costs
from dualpipe.lower import lower
from dualpipe.overlap import BACKWARD, FORWARD, F, I, Phase, W, duration, plan
from dualpipe.program import Kind, Message, Op, Program, Work
from dualpipe.runtime import Interpreter
from dualpipe.schedules import generate
from dualpipe.simulate import simulate
from model.exchange import Pending
from model.linear import WeightGradients
from model.router import Routing
from parallel.bucket import Bucket
from parallel.comm_stream import HostStream
from parallel.exchange import GroupExchange
from parallel.groups import Groups
from parallel.hop import Hop, Traffic
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
