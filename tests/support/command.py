"""The command line, run in this process."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from holdfast.cli import main


def holdfast(*arguments: Any) -> int:
    """The exit code of ``holdfast ARGUMENTS``; its output is what pytest's ``capsys`` captures."""
    with mock.patch("sys.argv", ["holdfast", *map(str, arguments)]), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)
