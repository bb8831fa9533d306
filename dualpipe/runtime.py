"""Runs one rank's lowered program over a Stage and a Transport; it knows no schedule.

The interpreter owns the tensors on their way between stages and nothing else. What a stage keeps between forward and
backward is the stage's, until the program says that it is dead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol, TypeVar

from torch import Tensor

from dualpipe.program import (
    Compute,
    Free,
    Gather,
    Kind,
    Message,
    Op,
    Overlap,
    Program,
    Receive,
    Reduce,
    Send,
    Slot,
    Step,
    Wait,
    Work,
)
from dualpipe.progress import Span

AStage = TypeVar("AStage", bound="Stage")


class Stage(Protocol):
    """One slice of the model. Inputs and outputs are activations of one micro-batch; the first stage gets None as its
    input and has no input gradient, the last one gives None as its output and gets None as the gradient of it."""

    def forward(self, work: Work, x: Tensor | None) -> Tensor | None: ...

    def backward(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        """B: input gradients, and the weight gradients too."""
        ...

    def backward_input(self, work: Work, gradient: Tensor | None) -> Tensor | None:
        """I: input gradients; what W needs is kept."""
        ...

    def backward_weight(self, work: Work) -> None:
        """W: the weight gradients that the I of this work deferred."""
        ...

    def overlapped(
        self: AStage, work: Work, x: Tensor | None, other: AStage, other_work: Work, gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """F of ``work`` here and B of ``other_work`` in ``other``, as a pair of which each half may hide the other's
        communication -> (output, input gradient)."""
        ...

    def free(self, work: Work) -> None:
        """Everything kept for this work is dead."""
        ...


class Transport(Protocol):
    """Moves messages between pipeline ranks. Channels (peer, kind) are FIFOs of their own."""

    def send(self, message: Message, peer: int, tensor: Tensor) -> None:
        """Start sending and return; the transport holds the tensor until it has left."""
        ...

    def receive(self, message: Message, peer: int) -> None:
        """Post the receive of a message."""
        ...

    def wait(self, message: Message, peer: int) -> Tensor:
        """The posted message, once it is here."""
        ...

    def flush(self) -> None:
        """Wait until every message that was sent has left."""
        ...


class StepEnd(Protocol):
    """The end of a training step: the optimizer's side of the program."""

    def reduce(self, stage: int) -> None: ...

    def step(self) -> None: ...

    def gather(self, stage: int) -> None: ...


@dataclass
class Report:
    """What running a program showed: the most micro-batches whose activations were alive at once, each in one stage,
    and, if it was recorded, every slot in the order of execution, in seconds of ``time.perf_counter``: when this
    process began with it and when it went on. A device may have finished the slot's work later."""

    peak_activations: int = 0
    spans: list[Span] = field(default_factory=list)


class Interpreter:
    """One rank's run through its slots. ``stages`` maps a stage's number to the object that computes it; ``record``
    asks for the spans of the report; ``entered`` is told of every slot before it is executed."""

    def __init__(
        self,
        program: Program,
        rank: int,
        stages: Mapping[int, Stage],
        transport: Transport,
        end: StepEnd | None = None,
        record: bool = False,
        entered: Callable[[Slot], None] | None = None,
    ) -> None:
        self.program, self.rank, self.stages, self.transport = program, rank, stages, transport
        self.end, self.record, self.entered = end, record, entered

    def run(self) -> Report:
        """Run every slot in order; returns once all messages have left."""
        self._tensors: dict[Message, Tensor] = {}
        self._alive: set[Work] = set()
        self._report = Report()
        for slot in self.program.slots[self.rank]:
            if self.entered is not None:
                self.entered(slot)
            start = perf_counter()
            self._execute(slot)
            if self.record:
                self._report.spans.append(Span(slot, start, perf_counter()))
        self.transport.flush()
        assert not self._tensors and not self._alive, (self.rank, self._tensors.keys(), self._alive)
        return self._report

    def _execute(self, slot: Slot) -> None:
        match slot:
            case Compute(Op.FORWARD, work):
                self._forward(work)
            case Compute(Op.BACKWARD | Op.BACKWARD_INPUT as op, work):
                self._backward(op, work)
            case Compute(Op.BACKWARD_WEIGHT, work):
                self.stages[work.stage].backward_weight(work)
            case Overlap(forward, backward):
                self._pair(forward, backward)
            case Send(message, peer):
                self.transport.send(message, peer, self._tensors.pop(message))
            case Receive(message, peer):
                self.transport.receive(message, peer)
            case Wait(message, peer):
                self._tensors[message] = self.transport.wait(message, peer)
            case Free(work):
                self.stages[work.stage].free(work)
                self._alive.remove(work)
            case Reduce(stage):
                self._step_end().reduce(stage)
            case Step():
                self._step_end().step()
            case Gather(stage):
                self._step_end().gather(stage)
            case _:
                raise AssertionError(slot)

    def _forward(self, work: Work) -> None:
        self._leave_output(work, self.stages[work.stage].forward(work, self._input(work)))

    def _backward(self, op: Op, work: Work) -> None:
        stage = self.stages[work.stage]
        run = stage.backward if op is Op.BACKWARD else stage.backward_input
        self._leave_gradient(work, run(work, self._gradient(work)))

    def _pair(self, forward: Work, backward: Work) -> None:
        x, gradient = self._input(forward), self._gradient(backward)
        stage, other = self.stages[forward.stage], self.stages[backward.stage]
        y, gx = stage.overlapped(forward, x, other, backward, gradient)
        self._leave_output(forward, y)
        self._leave_gradient(backward, gx)

    def _input(self, work: Work) -> Tensor | None:
        self._alive.add(work)
        self._report.peak_activations = max(self._report.peak_activations, len(self._alive))
        return self._tensors.pop(Message(Kind.ACTIVATION, work)) if work.stage > 0 else None

    def _gradient(self, work: Work) -> Tensor | None:
        last = work.stage == self.program.stages - 1
        return None if last else self._tensors.pop(Message(Kind.GRADIENT, work))

    def _leave_output(self, work: Work, y: Tensor | None) -> None:
        if y is not None:
            self._tensors[Message(Kind.ACTIVATION, Work(work.stage + 1, work.microbatch))] = y

    def _leave_gradient(self, work: Work, gx: Tensor | None) -> None:
        if gx is not None:
            self._tensors[Message(Kind.GRADIENT, Work(work.stage - 1, work.microbatch))] = gx

    def _step_end(self) -> StepEnd:
        assert self.end is not None, "a program with a step's end needs someone to reduce, step and gather"
        return self.end
