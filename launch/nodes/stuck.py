"""What the ranks of a node do while none of them comes further, as text for the roster: a few hundred bytes a node."""

import base64
import json
import zlib
from collections.abc import Iterable

from launch.hang import Readings


def pack(attempt: int, readings: Readings) -> str:
    text = json.dumps([attempt, list(readings.items())])
    return base64.b85encode(zlib.compress(text.encode())).decode()


def merge(attempt: int, packed: Iterable[str]) -> Readings | None:
    """What ``pack`` was given on all these nodes in ``attempt``; None when one has told nothing of it."""
    found: dict[int, dict[str, object]] = {}
    for text in packed:
        told, readings = json.loads(zlib.decompress(base64.b85decode(text))) if text else (None, [])
        if told != attempt:
            return None
        found.update((rank, record) for rank, record in readings)
    return found
