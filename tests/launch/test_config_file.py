"""Lists in a configuration, as the sections of any dataclass may have them."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from launch.config_file import ConfigError, apply, build


@dataclass(frozen=True)
class Part:
    name: str
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.share <= 0:
            raise ValueError(f"share={self.share} must be above 0")


@dataclass(frozen=True)
class Section:
    parts: tuple[Part, ...] = ()
    kinds: tuple[Literal["norm", "mlp"], ...] = ()
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Whole:
    section: Section = field(default_factory=Section)


def test_a_list_becomes_a_tuple_of_what_its_items_are() -> None:
    given = {"parts": [{"name": "a"}, {"name": "b", "share": 2}], "kinds": ["mlp", "norm"], "steps": [3]}
    section = Section((Part("a"), Part("b", 2.0)), ("mlp", "norm"), (3,))
    assert build(Whole, {"section": given}) == Whole(section)


def test_an_override_gives_a_whole_list() -> None:
    values: dict[str, Any] = {}
    apply(Whole, values, "section.parts=[{name: a, share: 0.5}]")
    apply(Whole, values, "section.steps=[1, 2]")
    assert build(Whole, values) == Whole(Section(parts=(Part("a", 0.5),), steps=(1, 2)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 3}, "section.steps=3 must be a list, each item an integer"),
        ({"steps": [1, "x"]}, "section.steps[1]='x' must be an integer"),
        ({"kinds": ["nrom"]}, "section.kinds[0]='nrom' must be norm or mlp"),
        ({"parts": ["a"]}, "section.parts[0]='a' must be a mapping of name, share"),
        ({"parts": [{"name": "a", "shar": 2}]}, "section.parts[0].shar is not a key of it; there are name, share"),
        ({"parts": [{"share": 2}]}, "section.parts[0].name is missing and must be a string"),
        ({"parts": [{"name": "a", "share": True}]}, "section.parts[0].share=true must be a finite number"),
        ({"parts": [{"name": "a", "share": 0}]}, "section.parts[0].share=0.0 must be above 0"),
    ],
)
def test_an_item_that_is_wrong_is_named_with_its_place(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(Whole, {"section": given})
    assert str(refused.value) == message
