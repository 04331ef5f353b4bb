"""One thread a test process: the tensors are tiny, so threads only wait for each other. No test waits for the Hub."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
