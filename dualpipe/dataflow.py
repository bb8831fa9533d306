"""Which tensor an operation needs and which it makes, and the ranks that a tensor travels between."""

from dualpipe.program import Compute, Kind, Message, Op, Program, Work


def needed(program: Program, compute: Compute) -> Message | None:
    """What an operation takes from the neighbouring stage; None at the ends of the model, and for W."""
    work = compute.work
    match compute.op:
        case Op.FORWARD:
            return Message(Kind.ACTIVATION, work) if work.stage > 0 else None
        case Op.BACKWARD | Op.BACKWARD_INPUT:
            return Message(Kind.GRADIENT, work) if work.stage < program.stages - 1 else None
        case Op.BACKWARD_WEIGHT:
            return None
        case _:
            raise AssertionError(compute)


def made(program: Program, compute: Compute) -> Message | None:
    """What an operation gives to the neighbouring stage; None at the ends of the model, and for W."""
    stage, microbatch = compute.work.stage, compute.work.microbatch
    match compute.op:
        case Op.FORWARD:
            return Message(Kind.ACTIVATION, Work(stage + 1, microbatch)) if stage < program.stages - 1 else None
        case Op.BACKWARD | Op.BACKWARD_INPUT:
            return Message(Kind.GRADIENT, Work(stage - 1, microbatch)) if stage > 0 else None
        case Op.BACKWARD_WEIGHT:
            return None
        case _:
            raise AssertionError(compute)


def maker(message: Message) -> Work:
    """The work whose operation makes this message."""
    stage, microbatch = message.work.stage, message.work.microbatch
    match message.kind:
        case Kind.ACTIVATION:
            return Work(stage - 1, microbatch)
        case Kind.GRADIENT:
            return Work(stage + 1, microbatch)
        case _:
            raise AssertionError(message)
