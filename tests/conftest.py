"""One thread for every test: the tensors are small, the ranks many, and threads that wait for each other on a busy core
take ten times as long. Triton's kernels are interpreted where there is no GPU for them: it asks when it is imported."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# How long an example takes says how busy the machine is.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
