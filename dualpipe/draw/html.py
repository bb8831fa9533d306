"""A simulation as one interactive page that needs nothing else: ``page.html`` with the simulation's data in it."""

import json
from html import escape
from importlib.resources import files
from typing import Any

from dualpipe.draw.boxes import COLOURS, NAMES, boxes, describe
from dualpipe.draw.svg import title
from dualpipe.program import dump_message
from dualpipe.simulate import Simulation


def html(result: Simulation, below: str = "") -> str:
    """The page. Its script reads the object that ``data`` returns. ``below``: elements that stand below the chart."""
    page = files("dualpipe.draw").joinpath("page.html").read_text(encoding="utf-8")
    # Inside a script element, JSON must not look like an end tag.
    text = json.dumps(data(result), separators=(",", ":")).replace("</", "<\\/")
    page = page.replace("{{title}}", escape(title(result))).replace("{{below}}", below)
    return page.replace("{{data}}", text)


def data(result: Simulation) -> dict[str, Any]:
    """What the page draws: for each rank its boxes and, as [time, micro-batches], its memory.

    A box's ``inputs`` are the messages that it works on, each with the rank and the box that made it.
    """
    rows = boxes(result)
    place = [{id(box.span): index for index, box in enumerate(row)} for row in rows]
    return {
        "makespan": result.makespan,
        "colours": COLOURS,
        "names": NAMES,
        "ranks": [
            {
                "boxes": [
                    {
                        "kind": box.kind,
                        "label": box.label,
                        "about": describe(box),
                        "start": box.start,
                        "end": box.end,
                        "beside": box.beside,
                        "inputs": [
                            {
                                "name": dump_message(crossing.message),
                                "rank": crossing.source,
                                "box": place[crossing.source][id(result.spans[crossing.source][crossing.maker])],
                                "sent": crossing.sent,
                                "arrival": crossing.arrival,
                            }
                            for crossing in box.span.inputs
                        ],
                    }
                    for box in row
                ],
                "memory": [[time, alive] for time, alive, _ in curve],
            }
            for row, curve in zip(rows, result.memory, strict=True)
        ],
    }
