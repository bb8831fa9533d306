"""One training step of one pipeline: the program that the runtime would execute, played with its stages' costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product

from dualpipe.cost import Costs, CostTable
from dualpipe.lower import lower
from dualpipe.program import Compute, Gather, Op, Overlap, Program, Reduce, Step
from dualpipe.progress import Progress, Span, Transport
from dualpipe.schedules import generate
from dualpipe.simulate import OPERATIONS, Simulation, outcome
from parallel.estimate.stages import StageCost, pair_seconds

DurationTable = Callable[[Costs, Program], CostTable]


@dataclass(frozen=True)
class EndSeconds:
    """The end of the step. The slowest stage's reduction and gathering stand for all: the step waits for it."""

    reduce: float
    step: float
    gather: float


@dataclass(frozen=True)
class RankSeconds:
    """Where one rank's step goes; ``seconds`` of the six fields add up to the step. ``backward_s`` holds full backwards
    and those for inputs only, ``weight_s`` the deferred weight gradients, ``optimizer_s`` the update and the
    gathering of parameters."""

    forward_s: float
    backward_s: float
    weight_s: float
    overlapped_s: float
    bubble_s: float
    optimizer_s: float


def step_program(schedule: str, ranks: int, microbatches: int, chunks: int | None = None) -> Program:
    """The program that training runs. Raises ValueError for sizes that the schedule refuses."""
    return lower(generate(schedule, ranks, microbatches, chunks))


def play(
    program: Program,
    stages: Sequence[StageCost],
    end: EndSeconds,
    message: tuple[float, float],
    activation_bytes: Sequence[float],
    afterwards: Callable[[Progress], None] | None = None,
    table: DurationTable | None = None,
) -> Simulation:
    """The step's simulation, in seconds. ``message``: how long one occupies its link, and its latency;
    ``activation_bytes``: of one micro-batch, by stage; ``afterwards`` changes what was played, as shared cores do;
    ``table`` makes the durations, by default those of the stages."""
    pairs = {pair for rank in range(program.ranks) for pair in product(program.stages_of(rank), repeat=2)}
    at_stage: dict[tuple[str, int], float] = {}
    for stage, cost in enumerate(stages):
        for op, name in _FIELDS.items():
            at_stage[name, stage] = cost.alone[op]
        at_stage["activation_bytes", stage] = activation_bytes[stage]
    costs = Costs(
        link=message[0],
        message=message[1],
        reduce=end.reduce,
        step=end.step,
        gather=end.gather,
        activation_bytes=0.0,
        at_stage=at_stage,
        at_pair={(one, other): pair_seconds(stages[one], stages[other]) for one, other in pairs},
    )
    progress = Progress(program, Transport.EAGER, (table or CostTable)(costs, program))
    progress.play()
    if afterwards is not None:
        afterwards(progress)
    return outcome(progress)


def ranks_seconds(result: Simulation) -> list[RankSeconds]:
    """For each rank, where its step goes. What is not computing and not the end of the step is bubble."""
    found = []
    for spans in result.spans:
        total = {name: 0.0 for name in (*OPERATIONS, "end")}
        for span in spans:
            if (name := _kind(span)) is not None:
                total[name] += span.end - span.start
        working = sum(total.values())
        found.append(
            RankSeconds(
                forward_s=total["F"],
                backward_s=total["B"] + total["I"],
                weight_s=total["W"],
                overlapped_s=total["FB"],
                bubble_s=result.makespan - working,
                optimizer_s=total["end"],
            )
        )
    return found


def idle_by_cause(result: Simulation) -> dict[str, float]:
    """Seconds that the ranks idle on average, by cause. ``step_end`` is without the update and the gathering."""
    causes: Mapping[str, list[float]] = {name: [] for name in asdict(result.bubble_by_cause[0])}
    for rank in result.bubble_by_cause:
        for name, seconds in asdict(rank).items():
            causes[name].append(seconds)
    optimizer = [rank.optimizer_s for rank in ranks_seconds(result)]
    mean = {name: sum(seconds) / result.ranks for name, seconds in causes.items()}
    return {**mean, "step_end": mean["step_end"] - sum(optimizer) / result.ranks}


_FIELDS = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward_input",
    Op.BACKWARD_WEIGHT: "backward_weight",
}


def _kind(span: Span) -> str | None:
    match span.slot:
        case Compute(op, _):
            return op.value
        case Overlap():
            return "FB"
        case Step() | Gather():
            return "end"
        case Reduce():
            return None  # beside what the rank computes
        case _:
            raise AssertionError(span.slot)
