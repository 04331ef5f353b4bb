"""One thread a test process: the tensors are tiny, so threads only wait for each other. No test waits for the Hub."""

import gc
import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that tests start find tests/support, too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

import torch

torch.set_num_threads(1)


def pytest_collection_finish():
    """Keep all that was imported out of garbage collection, which Trainer asks for at each start of a training: with
    torch, transformers and the rest in memory it takes as long as a tiny run's training."""
    gc.collect()
    gc.freeze()
