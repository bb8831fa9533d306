"""How kernels are compiled, and kept for the next process."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

EXACT: set[str] = set()
"""Every operation rounds as written."""
FUSED = {"contract"}
"""A product may be fused with the sum that follows."""
SUMS = {"contract", "reassoc", "nsz"}
"""And a loop may add in the order that its vectors want."""

helper = numba.njit(fastmath=FUSED, error_model="numpy")
"""A function that kernels call. It keeps the order of its sums whatever the kernel may do with its own."""
exact_helper = numba.njit(error_model="numpy")


SOURCES = sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).digest()


class _Kept(FunctionCache):
    """Compiled code beside its source, or in the user's cache. Numba asks whether the kernel's own file has changed;
    here it must also be of the same functions in other files."""

    def _index_key(self, *of: Any) -> tuple[Any, ...]:
        return *super()._index_key(*of), SOURCES


def kernel(*signatures: str, may: set[str] = FUSED) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile for this CPU, once for each machine."""
    options: dict[str, Any] = {"nogil": True, "fastmath": may or False, "error_model": "numpy"}

    def compiled(function: Callable[..., None]) -> Callable[..., None]:
        try:
            kept = numba.njit(**options)(function)
            kept._cache = _Kept(function)
            for signature in signatures:
                kept.compile(signature)
            kept.disable_compile()
            return kept
        except Exception:
            # Nothing to keep it in, no room, or a damaged file: compile in each process. What is wrong with the
            # function itself is raised again.
            return numba.njit(list(signatures), **options)(function)

    return compiled
