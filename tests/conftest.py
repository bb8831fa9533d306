"""One thread for every test: the tensors are small, the ranks many, and threads that wait for each other on a busy core
take ten times as long."""

import torch

torch.set_num_threads(1)
