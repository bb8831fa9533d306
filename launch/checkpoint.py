"""``dualpipe checkpoint verify RUN``: read every checkpoint of a run and say which are whole, to the last bit."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.command import Parser, UsageError, reported

_EXAMPLE = """\
example:
  dualpipe checkpoint verify runs/tiny-cpu

Every file is compared with the checksum in the checkpoint's manifest. Exit status: 0 when all checkpoints are whole,
1 when one is not (training goes on from the newest one that is), 2 when there is none to check."""


def main(argv: Sequence[str] | None = None) -> int:
    checked: list[dict[str, Any]] = []
    status = reported(lambda: checked.extend(_verify(_parser().parse_args(argv))))
    return status or int(any(entry["problem"] for entry in checked))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dualpipe checkpoint",
        description="Check the checkpoints of a run.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["verify"], help="verify: compare every file with its checksum")
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument("--json", action="store_true", help="print a list of objects: checkpoint, bytes, problem")
    return parser


def _verify(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from parallel.checkpoint import damage, published

    folder = arguments.run / "checkpoints"
    paths = published(folder)
    if not paths:
        raise UsageError(f"RUN={arguments.run} has no checkpoint in {folder}")
    checked = []
    for path in paths:
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        checked.append({"checkpoint": str(path), "bytes": size, "problem": damage(path)})
        if not arguments.json:
            print(f"{path}  {size / 1e6:,.1f} MB  {checked[-1]['problem'] or 'is whole'}", flush=True)
    if arguments.json:
        print(json.dumps(checked))
    return checked


if __name__ == "__main__":
    sys.exit(main())
