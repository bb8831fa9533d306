"""Every command of the README runs. What takes minutes runs with a short step of two ranks appended; the two ``make``
commands are what ``.ci/run`` itself calls."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = (
    "layout.pipeline=2 layout.data=1 layout.expert=1 train.steps=1 train.sequence_length=16 train.global_batch_size=8 "
    "train.micro_batch_size=1 train.device=cpu data.validation_sequences=0 checkpoint.every=0"
).split()
BIN = Path(sys.executable).parent


def commands() -> list[list[str]]:
    """The commands in the README's ``sh`` blocks, as words, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str], agents: int = 1) -> None:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(agents)
    ]
    try:
        for process in running:
            out, _ = process.communicate(timeout=200)
            assert process.returncode == 0, out
    finally:
        for process in running:
            process.terminate()


def test_the_two_commands_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    makes = [words for words in commands() if words[0] == "make"]
    assert makes == [["make", "train"], ["make", "test"]]
    for words in makes:
        assert " ".join(words) in ci


@pytest.mark.parametrize("words", [w for w in commands() if w[0] not in ("git", "make")], ids=lambda w: "-".join(w[:2]))
def test_a_command_runs(words: list[str], tmp_path: Path) -> None:
    short = [*SHORT, f"run.dir={tmp_path / 'run'}"]
    match words:
        case ["dualpipe", "train", *_]:
            run([*words, *short])
        case ["dualpipe", "simulate" | "plan", *_]:
            run(words)
        case ["torchrun", "--nnodes", nodes, *_]:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            words = [word.replace("HOST:29500", f"localhost:{port}") for word in words]
            words[words.index("--nproc-per-node") + 1] = "1"
            run([*words, *short], agents=int(nodes))
        case _:
            pytest.fail(f"no test knows how to run {shlex.join(words)}")
