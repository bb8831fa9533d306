"""Time without the cyclic garbage collector, for code that makes a great many objects and no cycle."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """A program has a slot for everything that every rank does. The collector would walk all of them again and again
    while they grow, and find nothing: without it, time grows with the number of slots and no faster."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
