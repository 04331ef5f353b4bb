"""One thread a test process: the tensors are tiny, and threads that wait for each other cost far more than they give."""

import os

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
