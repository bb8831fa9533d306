"""The manifest of a checkpoint: what a disk or a person does to a file later is seen, whatever it is."""

import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel import manifest
from parallel.checkpoint import Progress, damage
from parallel.manifest import MANIFEST
from parallel.saver import save
from tests.parallel.test_checkpoint import alone, files, step

# torch says so where a single process has no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    worker = alone()
    step(worker, 0)
    return save(tmp_path_factory.mktemp("complete"), worker, Progress(1, 16), keep=1)


def corruptions(file: Path, generator: random.Random) -> dict[str, Callable[[], None]]:
    """Ways in which a disk or a person spoils a file that stays as long as it was, or nearly."""
    size = file.stat().st_size

    def flip(bits: int = 1) -> None:
        data = bytearray(file.read_bytes())
        for _ in range(bits):
            data[generator.randrange(size)] ^= 1 << generator.randrange(8)
        file.write_bytes(data)

    def overwrite(start: int, data: bytes) -> None:
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(data)

    def swap() -> None:
        data = file.read_bytes()
        half = size // 2
        file.write_bytes(data[half:] + data[:half])

    page = min(4096, size)
    return {
        "one bit": flip,
        "seven bits": lambda: flip(7),
        "the first bit": lambda: overwrite(0, bytes([file.read_bytes()[0] ^ 1])),
        "the last byte": lambda: overwrite(size - 1, bytes([file.read_bytes()[-1] ^ 255])),
        "a page of zeros": lambda: overwrite(generator.randrange(size - page + 1), b"\0" * page),
        "a page of noise": lambda: overwrite(generator.randrange(size - page + 1), generator.randbytes(page)),
        "a page too much": lambda: file.write_bytes(file.read_bytes() + b"\0" * 4096),
        "cut short": lambda: os.truncate(file, size - 1),
        "empty": lambda: os.truncate(file, 0),
        "absent": file.unlink,
        "halves swapped": swap,
    }


def test_no_corruption_of_any_file_is_missed(complete: Path, tmp_path: Path) -> None:
    generator = random.Random(7)
    kinds = corruptions(complete / "state.json", generator)
    for number, (kind, name) in enumerate(itertools.product(kinds, files(complete))):
        copy = shutil.copytree(complete, tmp_path / str(number))
        before = (copy / name).read_bytes()
        corruptions(copy / name, generator)[kind]()
        if (copy / name).exists() and (copy / name).read_bytes() == before:
            continue  # zeros over zeros
        # A manifest that says the same lies about nothing.
        same = name == MANIFEST and manifest.problem(copy) is None and manifest.read(copy) == manifest.read(complete)
        assert damage(copy) is not None or same, (kind, name)
        shutil.rmtree(copy)
    assert damage(complete) is None


def test_a_stale_shard_of_an_older_checkpoint_is_seen(tmp_path: Path) -> None:
    worker = alone()
    paths = []
    for number in (1, 2):
        step(worker, number)
        paths.append(save(tmp_path, worker, Progress(number, 16 * number), keep=2))
    shard = next(paths[0].glob("*.distcp"))
    assert (paths[1] / shard.name).stat().st_size == shard.stat().st_size
    shutil.copyfile(shard, paths[1] / shard.name)
    assert damage(paths[0]) is None
    what = damage(paths[1])
    assert what is not None and what.startswith(f"is damaged: {shard.name} is not what was written")


def test_a_damaged_one_of_the_same_step_is_kept_aside(tmp_path: Path) -> None:
    worker = alone()
    spoiled: set[Path] = set()
    for spoil in ('{"step": 1, "sequences": 17}\n', '{"step": 1, "sequences": 17}\n', ""):
        path = save(tmp_path, worker, Progress(1, 16), keep=1, spoiled=spoiled)
        (path / "state.json").write_text(spoil)
        spoiled = {path} if spoil else set()  # of another size: nobody has to say so
    save(tmp_path, worker, Progress(1, 16), keep=1, spoiled=spoiled)
    assert files(tmp_path) == [f"step-00000001{end}" for end in ("", ".damaged", ".damaged.2", ".damaged.3")]
    assert damage(tmp_path / "step-00000001") is None
