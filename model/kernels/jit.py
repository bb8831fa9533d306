"""How kernels are compiled, and kept for the next process."""

import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target

EXACT: set[str] = set()
"""Every operation rounds as written."""
FUSED = {"contract"}
"""A product may be fused with the sum that follows."""
SUMS = {"contract", "reassoc", "nsz"}
"""And a loop may add in the order that its vectors want."""


def instructions() -> str:
    """Those that are compiled for, as LLVM writes them."""
    features: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return features


helper = numba.njit(fastmath=FUSED, error_model="numpy")
"""A function that kernels call. It keeps the order of its sums whatever the kernel may do with its own."""
summing = numba.njit(fastmath=SUMS, error_model="numpy")
"""One that may add in the order that vectors want."""
exact_helper = numba.njit(error_model="numpy")

_SOURCES = sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).digest()
_NOTE = "compiling"


class _Kept(FunctionCache):
    """Compiled code beside its source, or in the user's cache. Numba asks whether the kernel's own file has changed;
    here it must also be of the same functions in other files."""

    def _index_key(self, *of: Any) -> tuple[Any, ...]:
        return *super()._index_key(*of), _SOURCES

    def load_overload(self, *of: Any) -> Any:
        found = super().load_overload(*of)
        if found is None:
            _say_once(Path(self.cache_path))
        return found


def _say_once(folder: Path) -> None:
    """To whoever waits for the first start of a version on a machine, by the first of its processes that compiles."""
    made_for = f"{_SOURCES.hex()} {sys.version} {cpu_target.target_context.codegen().magic_tuple()}"
    note = folder / _NOTE
    if note.read_text() != made_for:
        note.write_text(made_for)
        said = f"compiling kernels for this CPU, once: half a minute of one core, kept in {folder}"
        print(said, file=sys.stderr, flush=True)


@cache
def _say_not_kept() -> None:
    print(
        "compiled kernels can be neither found nor kept: every process compiles its own; NUMBA_CACHE_DIR names another"
        " folder for them",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Of the processes that would fill this folder: the others find there what the first has compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _NOTE, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kernel(
    *signatures: str, may: set[str] = FUSED, able: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile for this CPU, once for each machine; not where it is not ``able``, which its callers ask before."""
    options: dict[str, Any] = {"nogil": True, "fastmath": may or False, "error_model": "numpy"}

    def compiled(function: Callable[..., None]) -> Callable[..., None]:
        if not able:
            return function
        try:
            kept = numba.njit(**options)(function)
            kept._cache = _Kept(function)
            with _one_at_a_time(Path(kept._cache.cache_path)):
                for signature in signatures:
                    kept.compile(signature)
            kept.disable_compile()
            return kept
        except Exception:
            # Nothing to keep it in, no room, or a damaged file: compile in each process. What is wrong with the
            # function itself is raised again.
            alone = numba.njit(list(signatures), **options)(function)
            _say_not_kept()
            return alone

    return compiled
