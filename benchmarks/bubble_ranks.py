"""The processes of ``benchmarks.bubble``: one a pipeline rank, on gloo, that run what they are told when they are told.

Every process knows all contestants, ours and torch's, and keeps its connections from step to step. All of them read the
same clock (``time.perf_counter`` is the machine's), so that a step can start everywhere at one appointed time.
"""

import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpipe.cost import Costs
from dualpipe.program import Kind, Message, Program, Work

if TYPE_CHECKING:
    from parallel.transport import PipelineTransport

TIMEOUT_S = 120
LEAD_S = 0.05  # from the order to the start: every rank must have heard of it
PING_PONGS = 20
PAUSE_S = 0.005  # before a ping, about as often as stages send

TORCH = {
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
"""Our name of a schedule -> torch's class for it in torch.distributed.pipelining."""


@dataclass(frozen=True)
class Ours:
    """A lowered program and the durations of its stages, in seconds, run by our runtime."""

    program: Program
    costs: Costs


@dataclass(frozen=True)
class Torchs:
    """The same work in torch's implementation of a schedule; ``stages``: those of each rank, ascending."""

    schedule: str
    microbatches: int
    stages: tuple[tuple[int, ...], ...]
    costs: Costs


Contestant = Ours | Torchs


class Ranks:
    """The processes, and what can be asked of them."""

    def __init__(self, world: int, contestants: Mapping[str, Contestant], folder: Path) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["parallel.worker", "torch.distributed.pipelining"])
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world, dict(contestants), folder / "store"))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ping(self) -> list[float]:
        """Seconds that each of some messages takes between neighbours, while all ranks exchange them."""
        return [sample for samples in self._ask(("ping",)) for sample in samples]

    def step(self, name: str) -> float:
        """Seconds from the start of a contestant's step to its end on the last rank."""
        start = time.perf_counter() + LEAD_S
        ends: list[float] = self._ask(("step", name, start))
        return max(ends) - start

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _ask(self, command: tuple[Any, ...]) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(command)
        return [self._answer(rank) for rank in range(len(self._pipes))]

    def _answer(self, rank: int) -> Any:
        if not self._pipes[rank].poll(TIMEOUT_S):
            raise TimeoutError(f"rank {rank} gave no answer within {TIMEOUT_S} s")
        try:
            failure, value = self._pipes[rank].recv()
        except EOFError:
            raise RuntimeError(f"rank {rank} died") from None
        if failure is not None:
            raise RuntimeError(f"rank {rank} failed:\n{failure}")
        return value


@contextmanager
def started(world: int, contestants: Mapping[str, Contestant]) -> Iterator[Ranks]:
    """Ranks that are ready; none of their processes is left afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(world, contestants, Path(folder))
        try:
            yield ranks
        finally:
            ranks.close()


def _serve(pipe: Connection, rank: int, world: int, contestants: Mapping[str, Contestant], store: Path) -> None:
    """A rank's life: connect, then do as told until killed."""
    import torch
    import torch.distributed as dist

    from benchmarks.timed import MESSAGE_ELEMENTS, sleep_until, wake_on_time
    from launch.rank import die_with_parent
    from parallel.mesh import Layout
    from parallel.transport import PipelineTransport

    die_with_parent()
    try:
        torch.set_num_threads(1)
        wake_on_time()
        dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=TIMEOUT_S), world_size=world, rank=rank)
        like = torch.zeros(MESSAGE_ELEMENTS)
        transport = PipelineTransport(Layout(pipeline=world, data=1, expert=1), rank, like)
        steps = {name: _step(contestant, rank, like, transport) for name, contestant in contestants.items()}
        while True:
            match pipe.recv():
                case ("ping",):
                    pipe.send((None, ping(transport, rank, world, like)))
                case ("step", name, start):
                    sleep_until(start)
                    steps[name]()
                    pipe.send((None, time.perf_counter()))
                case command:
                    raise AssertionError(command)
    except BaseException:
        pipe.send((traceback.format_exc(), None))


def ping(transport: "PipelineTransport", rank: int, world: int, like: Any) -> list[float]:
    """Half the time to the neighbour and back, in seconds, for each of many ping-pongs; none from an odd rank, which
    answers, or one without a neighbour."""
    from benchmarks.timed import sleep_until

    peer = rank + 1 if rank % 2 == 0 else rank - 1
    if peer >= world:
        return []
    samples = []
    for number in range(PING_PONGS):
        message = Message(Kind.ACTIVATION, Work(0, number))
        transport.receive(message, peer)
        if rank % 2 == 0:
            sleep_until(time.perf_counter() + PAUSE_S)
            start = time.perf_counter()
            transport.send(message, peer, like)
            transport.wait(message, peer)
            samples.append((time.perf_counter() - start) / 2)
        else:
            transport.wait(message, peer)
            transport.send(message, peer, like)
    transport.flush()
    return samples


def _step(contestant: Contestant, rank: int, like: Any, transport: "PipelineTransport") -> Callable[[], object]:
    """A function that runs one step of the contestant on this rank."""
    match contestant:
        case Ours(program, costs):
            from benchmarks.timed import TimedStage
            from dualpipe.runtime import Interpreter

            last = program.stages - 1
            stages = {stage: TimedStage(costs, stage == 0, stage == last, like) for stage in program.stages_of(rank)}
            return Interpreter(program, rank, stages, transport).run
        case Torchs():
            return torch_step(contestant, rank, like)
        case _:
            raise AssertionError(contestant)


def torch_step(contestant: Torchs, rank: int, like: Any) -> Callable[[], object]:
    """A step of torch's schedule. Collective: torch finds out the shapes of its stages in a first step, which is done
    here and waits for nothing."""
    import torch
    from torch.distributed import pipelining

    from benchmarks.timed import TimedModule

    device, microbatches = torch.device("cpu"), contestant.microbatches
    count = max(stage for stages in contestant.stages for stage in stages) + 1
    modules = {stage: TimedModule(Costs(0, 0, 0), first=stage == 0) for stage in contestant.stages[rank]}
    stages = [pipelining.PipelineStage(module, stage, count, device) for stage, module in modules.items()]
    make = getattr(pipelining.schedules, contestant.schedule)
    schedule = make(
        stages[0] if contestant.schedule == TORCH["1f1b"] else stages,
        microbatches,
        loss_fn=lambda output, target: output.mean(),
        scale_grads=False,
    )
    inputs = (like.expand(microbatches, -1),) if 0 in contestant.stages[rank] else ()
    target = torch.zeros(microbatches, 1) if count - 1 in contestant.stages[rank] else None

    def step() -> None:
        schedule.step(*inputs, target=target, return_outputs=False)

    step()
    for module in modules.values():
        module.costs = contestant.costs
    return step
