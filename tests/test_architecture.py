"""Who may import whom: launch -> parallel -> {dualpipe, model}. Every .py file of the rooms is parsed and checked."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS: dict[str, set[str]] = {
    "dualpipe": {"dualpipe"},
    "model": {"model"},
    "parallel": {"parallel", "dualpipe", "model"},
    "launch": {"launch", "parallel", "dualpipe", "model"},
}
# The plan of a step is read by tools that have no torch; only what executes it needs tensors.
ONLY_STANDARD_LIBRARY = "dualpipe"
WITH_TORCH = {"dualpipe/runtime.py"}


def imported(source: str, path: str) -> Iterator[tuple[int, str]]:
    """(line, top-level module) of every import, those inside functions too; relative ones resolve to the room."""
    for node in ast.walk(ast.parse(source, path)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name.split(".")[0]) for alias in names)
            case ast.ImportFrom(level=0, module=str(module)):
                yield node.lineno, module.split(".")[0]
            case ast.ImportFrom():
                yield node.lineno, path.split("/")[0]


def violations(source: str, path: str) -> list[str]:
    """What in a file, named by its path from the root, breaks the table."""
    room = path.split("/")[0]
    found = []
    for line, module in imported(source, path):
        if module in ROOMS and module not in ROOMS[room]:
            found.append(f"{path}:{line}: {room} may not import {module}")
        if module == "tests":
            found.append(f"{path}:{line}: nothing imports the tests")
        third_party = module not in ROOMS and module not in sys.stdlib_module_names
        if room == ONLY_STANDARD_LIBRARY and third_party and not (module == "torch" and path in WITH_TORCH):
            found.append(f"{path}:{line}: {room} needs only the standard library, not {module}")
    return found


def test_no_file_breaks_the_table() -> None:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert {path.relative_to(ROOT).parts[0] for path in files} == set(ROOMS)
    broken = [
        line
        for path in files
        for line in violations(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert broken == []


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("model/block.py", "import torch", True),
        ("model/block.py", "from dualpipe.program import Work", False),
        ("model/block.py", "from parallel import exchange", False),
        ("dualpipe/draw.py", "from model.config import ModelConfig", False),
        ("dualpipe/draw.py", "import yaml", False),
        ("dualpipe/draw.py", "def late():\n    import torch.cuda", False),
        ("dualpipe/schedules/runtime.py", "import torch", False),
        ("dualpipe/runtime.py", "import torch", True),
        ("dualpipe/runtime.py", "import numpy", False),
        ("dualpipe/draw.py", "import json\nfrom . import program\nfrom collections import deque", True),
        ("parallel/stage.py", "import dualpipe.program\nfrom model import block", True),
        ("parallel/stage.py", "from launch.config import Config", False),
        ("launch/train.py", "from parallel import mesh\nimport dualpipe, model", True),
        ("launch/train.py", "from tests import distributed", False),
    ],
)
def test_the_check_tells_a_break_from_what_is_allowed(path: str, source: str, allowed: bool) -> None:
    assert (violations(source, path) == []) is allowed
