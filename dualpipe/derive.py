"""Costs from a recorded run: what each operation took, so that the simulation can be asked what follows from it.

Each duration is a median over all that was recorded of an operation in a stage, all ranks and replicas together:

    F I W B     of every stage that ran such an operation alone
    FB          how well pairs overlap: their duration against F + B of their stages
    p2p         of every link: from the send to the arrival, where the receiver was waiting when it was sent
    step        from the arrival of the last rank at the step to its end on the last rank; so with gather

Reductions run beside other slots, and nothing on the rank shows when they end: what of them the step has to wait for
counts as the step's.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import replace
from statistics import median
from typing import TypeVar

from dualpipe.cost import Costs, CostTable
from dualpipe.program import Compute, Gather, Op, Overlap, Slot, Step
from dualpipe.progress import Span
from dualpipe.recorded import Recording, transfers

Key = TypeVar("Key", bound=Hashable)

_FIELDS = {
    Op.FORWARD: "forward",
    Op.BACKWARD_INPUT: "backward_input",
    Op.BACKWARD_WEIGHT: "backward_weight",
    Op.BACKWARD: "backward",
}


def derive(recording: Recording) -> Costs:
    """The costs, in the recording's unit of time. An operation that no stage ran alone has a cost of 0, unless it is a
    B, which is I + W then."""
    at_stage = _medians(
        ((_FIELDS[span.slot.op], span.slot.work.stage), span.end - span.start)
        for _, _, run in recording.runs()
        for spans in run
        for span in spans
        if isinstance(span.slot, Compute)
    )
    common = {op: _middle(v for (name, _), v in at_stage.items() if name == _FIELDS[op]) for op in Op}
    if not any(name == _FIELDS[Op.BACKWARD] for name, _ in at_stage):
        common[Op.BACKWARD] = common[Op.BACKWARD_INPUT] + common[Op.BACKWARD_WEIGHT]
    message, at_link = _links(recording)
    apart = Costs(
        forward=common[Op.FORWARD],
        backward_input=common[Op.BACKWARD_INPUT],
        backward_weight=common[Op.BACKWARD_WEIGHT],
        backward=common[Op.BACKWARD],
        message=message,
        step=_collective(recording, Step),
        gather=_collective(recording, Gather),
        at_stage=at_stage,
        at_link={("message", *link): value for link, value in at_link.items()},
    )
    return replace(apart, overlapped=_overlap(recording, apart) * (apart.forward + apart.backward))


def _links(recording: Recording) -> tuple[float, dict[tuple[int, int], float]]:
    """The latency of a message, and that of every link, (from, to). On a link where nobody saw a message arrive it is
    the common one, unless a message was used sooner than that."""
    seen = [
        ((transfer.wait.peer, transfer.target), transfer)
        for _, _, run in recording.runs()
        for transfer in transfers(run)
    ]
    awaited = _medians((link, transfer.duration) for link, transfer in seen if transfer.awaited)
    common = _middle(awaited.values())
    at_link = {link: awaited.get(link, common) for link, _ in seen}
    for link, transfer in seen:
        if link not in awaited:
            at_link[link] = min(at_link[link], transfer.duration)
    return common, at_link


def _overlap(recording: Recording, costs: Costs) -> float:
    """What a pair takes, as a share of what its halves take alone; 1 without any pair."""
    table = CostTable(costs, recording.program)
    shares = []
    for _, _, run in recording.runs():
        for span in (span for spans in run for span in spans):
            if isinstance(span.slot, Overlap):
                forward, backward = span.slot.forward.stage, span.slot.backward.stage
                alone = table.of[Op.FORWARD][forward] + table.of[Op.BACKWARD][backward]
                shares += [(span.end - span.start) / alone] if alone > 0 else []
    return median(shares) if shares else 1.0


def _collective(recording: Recording, kind: type[Step] | type[Gather]) -> float:
    """The median time from the last arrival at a collective to its last end."""
    taken = []
    for replicas in recording.steps.values():
        meetings: defaultdict[Slot, list[Span]] = defaultdict(list)
        for span in (span for run in replicas for spans in run for span in spans):
            if isinstance(span.slot, kind):
                meetings[span.slot].append(span)
        taken += [max(s.end for s in met) - max(s.start for s in met) for met in meetings.values()]
    return median(taken) if taken else 0.0


def _medians(samples: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    by_key: defaultdict[Key, list[float]] = defaultdict(list)
    for key, value in samples:
        by_key[key].append(value)
    return {key: median(values) for key, values in by_key.items()}


def _middle(values: Iterable[float]) -> float:
    found = list(values)
    return median(found) if found else 0.0


def as_text(costs: Costs) -> str:
    """Derived costs as ``Costs.parse`` takes them, to four digits. A link is given the mean of its two directions."""
    common = {"F": costs.forward, "I": costs.backward_input, "W": costs.backward_weight, "B": costs.backward}
    values = {**common, "FB": costs.overlapped, "p2p": costs.message, "step": costs.step, "gather": costs.gather}
    for op, name in _FIELDS.items():
        values |= {f"{op.value}@{s}": value for (field, s), value in sorted(costs.at_stage.items()) if field == name}
    for (_, one, other), value in sorted(costs.at_link.items()):
        back = costs.at_link.get(("message", other, one), value)
        values[f"p2p@{min(one, other)}-{max(one, other)}"] = (value + back) / 2
    return ",".join(f"{key}={value:.4g}" for key, value in values.items())
