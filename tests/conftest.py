"""One thread a test process: the tensors are tiny, so threads only wait for each other."""

import os

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
