"""What others read of a rank while it waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from parallel.activity import Activity


@contextmanager
def operations_at(activity: Activity, of: Any, *names: str) -> Iterator[set[str]]:
    """The operations that this rank publishes at the calls of these functions of ``of``."""
    found: set[str] = set()

    def observed(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if not options.get("async_op"):
                found.add(activity.record(0)["operation"])
            return function(*arguments, **options)

        return call

    with patch.multiple(of, **{name: observed(getattr(of, name)) for name in names}):
        yield found
