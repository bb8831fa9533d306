"""The words that start a command again, for a person to paste."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

CLUSTER = "DUALPIPE_HOSTS"
"""In the environment on a node of ``dualpipe hosts``: the words that made the cluster."""
ELSEWHERE = "  # likewise on the other nodes"


@dataclass(frozen=True)
class Invocation:
    """What stands before the configuration and its overrides, and what behind them."""

    before: str
    after: str = ""

    def of(self, words: Sequence[str]) -> str:
        return f"{self.before} {shlex.join(words)}{self.after}"


def program_words(program: str, environment: Mapping[str, str], folder: Path, command: str) -> str:
    """What starts ``dualpipe COMMAND`` from ``folder``; ``program`` is ``sys.argv[0]``."""
    if Path(program).suffix == ".py":
        return f"{_from(folder, Path(sys.executable))} -m launch.cli {command}"
    return f"{_named(program, environment, folder)} {command}"


def of_training(
    program: str, environment: Mapping[str, str], folder: Path, nodes: Sequence[str] = (), agent: Sequence[str] = ()
) -> Invocation | None:
    """What starts this training again from ``folder``. ``nodes``: its options for several nodes; ``agent``: the words
    that started torchrun, where this is a rank of it. None where they do not say."""
    if "RANK" not in environment:
        before = " ".join([program_words(program, environment, folder, "train"), *map(shlex.quote, nodes)])
        many = bool(nodes)
    elif "launch.train" in agent[2:]:
        python, script, *rest = agent[: agent.index("launch.train") + 1]
        if Path(script).name == "torchrun":
            before = f"{_named(script, environment, folder)} {shlex.join(rest)}"
        else:
            before = shlex.join([python, script, *rest])
        many = environment.get("GROUP_WORLD_SIZE", "1") != "1"
    else:
        return None
    if CLUSTER in environment:
        return Invocation(f"{environment[CLUSTER]} -- {before}")
    return Invocation(before, ELSEWHERE if many else "")


def parent_words() -> list[str]:
    """Those that started the process that started this one; none when it has gone."""
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []


def _named(program: str, environment: Mapping[str, str], folder: Path) -> str:
    """A program as a shell takes it: by its name alone where that finds it."""
    path = Path(program).absolute()
    on_path = shutil.which(path.name, path=environment.get("PATH"))
    if on_path is not None and os.path.realpath(on_path) == os.path.realpath(path):
        return path.name
    return _from(folder, path)


def _from(folder: Path, path: Path) -> str:
    """A program's path as a shell takes it, relative where it lies below ``folder``."""
    below = path.is_relative_to(folder) and len(path.relative_to(folder).parts) > 1
    return shlex.quote(str(path.relative_to(folder) if below else path))
