"""Fill in the middle: a share of the documents is shown as prefix, suffix, middle, so that the model learns to write
what stands between two texts (Bavarian et al. 2022; DeepSeek-V3 report, 4.1: at rate 0.1, before packing):

    begin  prefix  hole  suffix  end  middle

Which documents, and where they are cut, depends on their bytes alone.
"""

import hashlib


def cut(text: bytes, rate: float) -> tuple[bytes, bytes, bytes] | None:
    """(prefix, middle, suffix) of a document, or None for one that stays as it is, as ``1 - rate`` of all do. Both cuts
    are uniform over the text, and between characters of UTF-8."""
    draws = hashlib.sha256(b"fill in middle\0" + text).digest()
    if int.from_bytes(draws[:8], "big") >= rate * 2**64:
        return None
    places = (int.from_bytes(draws[at : at + 8], "big") * (len(text) + 1) >> 64 for at in (8, 16))
    first, last = sorted(_between_characters(text, place) for place in places)
    return text[:first], text[first:last], text[last:]


def _between_characters(text: bytes, place: int) -> int:
    """``place``, or where the character begins that it is inside of."""
    start = place
    while 0 < start < len(text) and place - start < 3 and text[start] & 0xC0 == 0x80:
        start -= 1
    return start
