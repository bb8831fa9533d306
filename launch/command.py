"""What the commands that work on one folder share: their arguments, their errors, their bar."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch import output


class UsageError(ValueError):
    """Arguments that a command does not understand."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _is_users(error: Exception) -> bool:
    """Whether it is about what the user gave. Some of these errors stand beside torch, which not every command needs
    and which takes seconds to import."""
    from launch.aside import TargetError
    from launch.config import ConfigError
    from launch.data_source import DataError
    from launch.tokenizer import TokenizerError

    if isinstance(error, (UsageError, ConfigError, DataError, TargetError, TokenizerError, output.OutputError)):
        return True
    from model.huggingface import HuggingFaceError
    from parallel.checkpoint import CheckpointError

    return isinstance(error, (HuggingFaceError, CheckpointError))


def reported(command: Callable[[], None]) -> int:
    """Run a command. Exit status 0, or 2 after one line on stderr about what the user gave."""
    output.prepare()
    try:
        command()
        sys.stdout.flush()
    except Exception as error:
        if not _is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def progress_bar(title: str, total: int, unit: str = "tensors") -> Iterator[Callable[[], None]]:
    """A bar on stderr, if that is a terminal, over so many of ``unit``; call what it gives after each."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
