"""One thread for every test: the tensors are small, the ranks many, and threads that wait for each other on a busy core
take ten times as long. Triton's kernels are interpreted where there is no GPU for them: it asks when it is imported."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# How long an example takes says how busy the machine is.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

LONGEST = [
    "launch/test_drill.py",
    "launch/test_train.py",
    "parallel/test_parity.py",
    "launch/test_failures.py",
    "parallel/test_deepspeed.py",
    "test_readme.py",
    "parallel/test_twins.py",
    "parallel/test_checkpoint.py",
    "parallel/test_exchange.py",
    "launch/test_restart.py",
    "parallel/test_replica.py",
    "parallel/test_flips.py",
]
"""Files that take longest, first of them the longest: where several files run at once, one of these must not be the
last to begin."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    assert all((Path(__file__).parent / name).is_file() for name in LONGEST)
    place = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0].removeprefix("tests/"), len(place)))
