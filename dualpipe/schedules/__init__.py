"""The schedules by name. A generator is a function of (ranks, micro-batches) that returns compute order only."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from dualpipe.program import Program
from dualpipe.schedules import dualpipe, dualpipev, gpipe, interleaved, one_f_one_b, zb1p, zbv


@dataclass(frozen=True)
class Family:
    """A schedule: ``order`` returns its compute-only program, ``check`` raises ValueError for sizes that it refuses,
    both from (ranks, micro-batches) and, where ``chunked``, the chunks. ``stages_per_rank`` is the default number of
    chunks then."""

    order: Callable[..., Program]
    check: Callable[..., None]
    stages_per_rank: int = 1
    chunked: bool = False


SCHEDULES: dict[str, Family] = {
    "dualpipe": Family(dualpipe.dualpipe, dualpipe.check),
    "dualpipev": Family(dualpipev.dualpipev, dualpipev.check, stages_per_rank=2),
    "gpipe": Family(gpipe.gpipe, gpipe.check),
    "1f1b": Family(one_f_one_b.one_f_one_b, one_f_one_b.check),
    "interleaved": Family(interleaved.interleaved, interleaved.check, stages_per_rank=2, chunked=True),
    "zb1p": Family(zb1p.zb1p, zb1p.check),
    "zbv": Family(zbv.zbv, zbv.check, stages_per_rank=2),
}


def generate(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Program:
    """The compute-only program of a schedule. ``chunks``: the stages of a rank, where the schedule leaves them open.

    Raises ValueError as ``check`` does.
    """
    family, sizes = _sizes(name, ranks, microbatches, chunks)
    return family.order(*sizes)


def check(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> None:
    """Raises ValueError, naming the rule, for an unknown name or sizes that the schedule refuses; makes no program."""
    family, sizes = _sizes(name, ranks, microbatches, chunks)
    family.check(*sizes)


def runs(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> bool:
    """Whether ``check`` accepts them."""
    try:
        check(name, ranks, microbatches, chunks)
    except ValueError:
        return False
    return True


def stages(name: str, ranks: int, chunks: int | None = None) -> int:
    """The stages that a schedule cuts the model into. Raises ValueError for an unknown name, or chunks it has not."""
    family = _family(name, chunks)
    return ranks * (family.stages_per_rank if chunks is None else chunks)


def _sizes(name: str, ranks: int, microbatches: int, chunks: int | None) -> tuple[Family, tuple[int, ...]]:
    family = _family(name, chunks)
    if not family.chunked:
        return family, (ranks, microbatches)
    return family, (ranks, microbatches, family.stages_per_rank if chunks is None else chunks)


def _family(name: str, chunks: int | None) -> Family:
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"schedule.name={name} is not a schedule ({', '.join(sorted(SCHEDULES))}){hint}")
    if chunks is not None and not SCHEDULES[name].chunked:
        chunked = ", ".join(other for other, family in SCHEDULES.items() if family.chunked)
        raise ValueError(f"schedule.chunks={chunks} must be left out for schedule {name}: only {chunked} has chunks")
    return SCHEDULES[name]
