"""A command's output may be cut off, closed, full or ASCII: the command goes on, or says so in a line."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os
import sys
from launch import output
output.prepare()
try:
    for number in range(20_000):
        print("a line of some length, naïve", number)
    sys.stdout.flush()
except output.OutputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
print("done", file=sys.stderr)
with open("after", "w") as after:
    os.write(1, b"from a library\\n")
    after.write("done")
"""


def run(tmp_path: Path, redirection: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    line = f'"{sys.executable}" -c "$PROGRAM" {redirection}'
    variables = {**os.environ, "PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=tmp_path, capture_output=True, env=variables)


@pytest.mark.parametrize("redirection", ["| head -1", ">&-", ">&- 2>&- <&-", "| true"])
def test_a_reader_that_leaves_does_not_end_the_work(tmp_path: Path, redirection: str) -> None:
    result = run(tmp_path, redirection)
    assert result.returncode == 0
    assert result.stderr == (b"" if "2>&-" in redirection else b"done\n")
    assert (tmp_path / "after").read_text() == "done", "nothing else may end in a file that the command writes"


def test_a_full_disk_under_the_output_is_an_error_in_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "> /dev/full")
    assert result.returncode == 2
    assert result.stderr == b"error: standard output cannot be written: No space left on device\n"


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    result = run(tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert result.stdout.splitlines()[0] == rb"a line of some length, na\xefve 0"


def test_a_pipe_that_does_not_block_loses_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETFL, os.O_NONBLOCK)
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=tmp_path, stdout=write, env=variables)
    os.close(write)
    time.sleep(0.5)  # the pipe is full by then, or else the test is no harder than without it
    with os.fdopen(read, "rb") as out:
        assert len(out.read().splitlines()) == 20_001
    assert process.wait() == 0
