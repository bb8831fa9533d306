"""YAML as people expect it: ``1e-4`` is a number, ``no`` and ``2024-01-01`` are text, a key appears once.

PyYAML reads YAML 1.1, where ``1e-4`` is a string, ``1:30`` is ninety, ``010`` is eight, and of two equal keys the last
wins in silence. Loader and dumper here share the narrower rules of YAML 1.2's core schema, so that what is written is
read back as it was.
"""

import math
import re
from typing import Any

import yaml

# Tag, what a plain scalar of it looks like, and the characters that it can begin with.
_SCALARS = (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,299})", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
)


class DuplicateKeyError(ValueError):
    """A mapping has the same key twice, in lines ``first`` and ``line`` (counted from 1)."""

    def __init__(self, key: str, line: int, first: int) -> None:
        super().__init__(f"line {line}: {key} is already in line {first}")
        self.key, self.line, self.first = key, line, first


def load_yaml(text: str) -> Any:
    """The value of a YAML document. Raises yaml.YAMLError or DuplicateKeyError."""
    return yaml.load(text, _Loader)


def dump_yaml(value: Any, one_line: bool = False) -> str:
    """YAML, in the mapping's own order, that ``load_yaml`` reads back as an equal value; in block style, or a list or
    mapping in flow style on one line."""
    width = math.inf if one_line else None
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=one_line, width=width
    )


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012, the base class's own way to hold them

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if (key.tag, key.value) in lines:
                    raise DuplicateKeyError(key.value, line, lines[key.tag, key.value])
                lines[key.tag, key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012


for _name, _pattern, _first in _SCALARS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)
