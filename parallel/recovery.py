"""Which step is safe: decided from the copies that survived, of which some may turn out to be damaged."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Copy:
    """The state of rank ``owner`` after ``step``, whole, in the memory of rank ``holder``."""

    owner: int
    holder: int
    step: int


@dataclass(frozen=True)
class Choice:
    """``holders``: for every rank, who has its state after ``step``."""

    step: int
    holders: Mapping[int, int]

    def copies(self) -> list[Copy]:
        return [Copy(owner, holder, self.step) for owner, holder in sorted(self.holders.items())]


def newest_complete(copies: Collection[Copy], ranks: int) -> Choice | None:
    """The newest step of which the state of every rank is there, or None. A rank's own copy goes before others."""
    held: dict[int, dict[int, int]] = {}
    for copy in sorted(copies, key=lambda copy: (copy.holder != copy.owner, copy.holder)):
        held.setdefault(copy.step, {}).setdefault(copy.owner, copy.holder)
    complete = [step for step, holders in held.items() if len(holders) == ranks]
    return Choice(max(complete), held[max(complete)]) if complete else None


def newest_whole(
    copies: Collection[Copy], ranks: int, damaged_of: Callable[[list[Copy]], Collection[Copy]]
) -> Choice | None:
    """The newest step of which the state of every rank is there and whole, or None. Only what would be used is read:
    ``damaged_of`` says which of the copies of a choice are not whole, and then others are looked for."""
    left = set(copies)
    while (choice := newest_complete(left, ranks)) is not None:
        damaged = damaged_of(choice.copies())
        if not damaged:
            return choice
        left.difference_update(damaged)
    return None
