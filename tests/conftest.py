"""One thread a test process: the tensors are tiny, so threads only wait for each other. No test waits for the Hub."""

import gc
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that tests start find tests/support, too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

import pytest
import torch

import support.unsynced  # noqa: F401
from holdfast.models import pictures
from holdfast.system.quiet import deduplicate_warnings

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _pictures_of_other_modules_are_not_known():
    """Pictures are known by their content, and named as they were found first."""
    pictures._KNOWN.clear()


@pytest.fixture(autouse=True)
def _each_test_sees_every_warning():
    """A command shows each warning once a process, and here many commands share one."""
    logger = logging.getLogger("holdfast")
    filters = list(logger.filters)
    yield
    logger.filters[:] = filters
    deduplicate_warnings.cache_clear()


LONGEST = ("whole/test_engines.py", "whole/test_guards.py", "whole/test_grid.py", "deploy/test_export.py")
"""Files that take longest: they are begun first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


_imported: set[str] = set()


@pytest.fixture(autouse=True)
def _imported_code_is_no_garbage():
    """Training collects garbage before each stage: a look through all objects of all libraries, 0.3 s each time."""
    if len(sys.modules) > len(_imported):
        gc.collect()
        gc.freeze()
        _imported.update(sys.modules)
