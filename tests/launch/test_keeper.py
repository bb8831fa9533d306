"""What ranks leave in the launcher's memory is there for those that come after them, and gone with the launcher."""

import os
import signal
from pathlib import Path

import pytest

from launch.keeper import Keeper
from launch.memory_file import MemoryFile
from parallel.replica import Mark, region


@pytest.mark.skipif(not MemoryFile.available(), reason="needs Linux")
def test_memory_outlives_who_wrote_it_and_not_who_holds_it() -> None:
    mark = Mark(owner=0, ranks=2, layout="", step=7, sequences=112, digest="d", bytes=1000, crc32=0)
    with Keeper(2) as keeper:
        paths = [path for pair in keeper.regions for path in pair]
        assert len(set(paths)) == 4 and {path.stat().st_size for path in paths} == {0}
        child = os.fork()
        if child == 0:
            region(paths[2], 1000)[0].seal(mark)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert [slot.mark() for slot in region(paths[2], 1000)] == [mark, None]
        assert [slot.mark() for slot in region(paths[1], 1000)] == [None, None]
        before = {str(path.resolve()) for path in paths}
    assert not any(Path(name).exists() for name in before)
    assert not any(path.exists() for path in paths)
