"""``dualpipe COMMAND``: finds the command and hands over. Commands are imported when they are asked for, so that those
that need no torch start without it."""

import sys
from collections.abc import Sequence
from importlib import import_module

from launch import output

COMMANDS = {
    "train": "train a model, or go on with a run",
    "hosts": "run a command on a cluster made of this machine",
    "simulate": "how long a pipeline schedule takes, and what waits for what",
    "plan": "what a run costs on a described cluster, before it is paid for",
    "checkpoint": "check the checkpoints of a run",
    "import": "make a run out of a Hugging Face model",
    "export": "write a run's weights as a Hugging Face model",
    "evaluate": "score a text with a model",
    "generate": "let a model go on from a text",
    "drill": "break a run on purpose, and prove that it recovers",
    "precision": "where FP8 loses what, layer by layer",
}
MODULES = {"import": "import_hf", "export": "export_hf"}
"""Where a command's module has another name: "import" is a keyword."""

USAGE = """usage: dualpipe COMMAND ...

{commands}

'dualpipe COMMAND --help' says more; example: dualpipe train configs/tiny-cpu.yaml train.steps=20
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: the command's; 2 for a command that there is not."""
    output.prepare()
    words = list(sys.argv[1:] if argv is None else argv)
    usage = USAGE.format(commands="\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items()))
    if words[:1] in (["--help"], ["-h"]):
        print(usage, end="")
        return 0
    if not words or words[0] not in COMMANDS:
        given = f"error: {words[0]!r} is not a command\n" if words else ""
        print(given + usage, end="", file=sys.stderr)
        return 2
    try:
        status: int = import_module(f"launch.{MODULES.get(words[0], words[0])}").main(words[1:])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
