"""A repeated block: one micro-batch's nominal times in all stages, repeated for every micro-batch.

Qi et al., "Pipeline Parallelism with Controllable Memory" (2024): micro-batch k is due one period after k-1, and each
stage a lag after the stage before it. Short lags make a micro-batch hurry through the pipeline, which holds few
activations; long ones leave room for the others and keep ranks busy. 1F1B, ZB1P and ZBV are such blocks.
"""

from dataclasses import dataclass, replace
from random import Random

from dualpipe.search.timing import EPSILON, Order, Pipeline

_SHORTEST = 0.1  # lag: nominal times must grow


@dataclass(frozen=True)
class Block:
    """Lags are in forwards of stage 0 and positive, one for each pass of the ranks."""

    forward_lags: tuple[float, ...]
    turn: float  # between the last forward and the first backward
    backward_lags: tuple[float, ...]
    weight_lag: float  # between I and its W
    stretch: float  # the period in terms of a rank's work for a micro-batch: 1 leaves no pause, more holds less at once
    split: int  # the last backwards of a rank, which are split into I and W
    pairs: bool  # whether a forward and a backward that meet become a pair, if that saves time

    @classmethod
    def tight(cls, pipeline: Pipeline, passes: int) -> "Block":
        """Every stage right after the one before it, as fast as messages are: nothing holds fewer activations."""
        unit = pipeline.duration[0] or 1.0
        hop = sum(pipeline.transfer[1]) if pipeline.empty.ranks > 1 else 0.0  # from rank 0 to rank 1
        forward = max(_SHORTEST, (pipeline.duration[0] + hop) / unit)
        backward = max(_SHORTEST, (pipeline.duration[pipeline.works] + hop) / unit)
        split = pipeline.works // pipeline.empty.ranks
        return cls((forward,) * passes, 1.0, (backward,) * passes, backward, 1.0, split, pairs=False)

    @classmethod
    def drawn(cls, rng: Random, passes: int, backwards: int) -> "Block":
        """Any at all."""
        lags = [rng.choice((0.5, 1.0, 1.0, 2.0, 3.0, 4.0, 6.0)) for _ in range(2 * passes)]
        split = backwards if rng.random() < 0.7 else rng.randint(0, backwards)
        return cls(
            tuple(lags[:passes]),
            rng.choice((0.1, 1.0, 2.0, 3.0)),
            tuple(lags[passes:]),
            rng.choice((0.1, 1.0, 2.0, 4.0)),
            rng.choice((1.0, 1.0, 1.0, 1.1, 1.3)),
            split,
            pairs=rng.random() < 0.5,
        )

    def mutated(self, rng: Random, backwards: int) -> "Block":
        """One value changed. ``backwards``: of a rank."""
        fields = ["forward_lags", "backward_lags", "turn", "weight_lag", "stretch", "split", "pairs"]
        match name := rng.choice(fields):
            case "split":
                return replace(self, split=rng.choice((0, rng.randint(0, backwards), backwards)))
            case "pairs":
                return replace(self, pairs=not self.pairs)
            case "forward_lags":
                return replace(self, forward_lags=_one_changed(self.forward_lags, rng))
            case "backward_lags":
                return replace(self, backward_lags=_one_changed(self.backward_lags, rng))
            case "stretch":
                return replace(self, stretch=max(1.0, self.stretch + rng.choice((-0.1, -0.03, 0.03, 0.1))))
            case "turn":
                return replace(self, turn=_changed(self.turn, rng))
            case "weight_lag":
                return replace(self, weight_lag=_changed(self.weight_lag, rng))
            case _:
                raise AssertionError(name)

    def nominal(self, pipeline: Pipeline) -> tuple[list[float], list[float], float]:
        """When micro-batch 0 is due in each stage, forward and backward, and the period after which the next is."""
        empty = pipeline.empty
        unit = pipeline.duration[0] or 1.0
        forward, backward = [0.0] * empty.stages, [0.0] * empty.stages
        for s in range(1, empty.stages):
            forward[s] = forward[s - 1] + unit * self.forward_lags[s // empty.ranks]
        backward[-1] = forward[-1] + unit * self.turn
        for s in reversed(range(empty.stages - 1)):
            backward[s] = backward[s + 1] + unit * self.backward_lags[s // empty.ranks]
        total = sum(pipeline.duration[: 3 * pipeline.works])  # F, I and W
        period = total / (empty.ranks * empty.microbatches) * len(empty.routes)
        return forward, backward, period * self.stretch

    def order(self, pipeline: Pipeline) -> Order:
        """Everything in the order of the nominal times, which grow along every dependency, so that no rank waits for
        ever; pairs may undo that."""
        empty, works = pipeline.empty, pipeline.works
        forward, backward, period = self.nominal(pipeline)
        period = period or 1.0
        weight = self.weight_lag * (pipeline.duration[0] or 1.0)
        routes = len(empty.routes)
        directions = [empty.direction(m) for m in range(empty.microbatches)]
        first = [directions.index(d) for d in range(routes)]
        due: list[list[tuple[float, int]]] = [[] for _ in range(empty.ranks)]
        for work, rank in enumerate(pipeline.rank_of):
            stage, microbatch = divmod(work, empty.microbatches)
            direction = directions[microbatch]
            start = (microbatch - first[direction] + direction / routes) * period
            due[rank].append((start + forward[stage], work))
            due[rank].append((start + backward[stage], works + work))
            due[rank].append((start + backward[stage] + weight, 2 * works + work))
        return [self._spell(pipeline, [slot for _, slot in sorted(rank)]) for rank in due]

    def _spell(self, pipeline: Pipeline, slots: list[int]) -> list[int]:
        """I and W as B but for the last ``split`` of them; then the pairs."""
        works, out = pipeline.works, list[int]()
        inputs = [slot - works for slot in slots if works <= slot < 2 * works]
        whole = set(inputs[: max(0, len(inputs) - self.split)])
        for slot in slots:
            op, work = divmod(slot, works)
            if op == 0 or work not in whole:
                out.append(slot)
            elif op == 1:
                out.append(3 * works + work)
        return paired(pipeline, out) if self.pairs else out


def paired(pipeline: Pipeline, slots: list[int]) -> list[int]:
    """With each forward and B that stand side by side as a pair where that saves time."""
    out: list[int] = []
    for slot in slots:
        if out and (pair := meeting(pipeline, out[-1], slot)) is not None:
            out[-1] = pair
        else:
            out.append(slot)
    return out


def meeting(pipeline: Pipeline, one: int, other: int) -> int | None:
    """The pair that two slots make, in whatever order; None if they make none or it saves no time."""
    works = pipeline.works
    forward, backward = min(one, other), max(one, other) - 3 * works
    if forward >= works or not 0 <= backward < works:
        return None
    if (forward - backward) % pipeline.empty.microbatches == 0:
        return None
    pair = pipeline.pair(forward, backward)
    return pair if pipeline.length(pair) < pipeline.length(one) + pipeline.length(other) - EPSILON else None


def _one_changed(lags: tuple[float, ...], rng: Random) -> tuple[float, ...]:
    place = rng.randrange(len(lags))
    return (*lags[:place], _changed(lags[place], rng), *lags[place + 1 :])


def _changed(lag: float, rng: Random) -> float:
    """A little longer or shorter, or anything up to eight forwards."""
    return (
        max(_SHORTEST, lag + rng.choice((-1.0, -0.5, -0.2, 0.2, 0.5, 1.0)))
        if rng.random() < 0.7
        else rng.uniform(_SHORTEST, 8.0)
    )
