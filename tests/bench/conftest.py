"""What the tests of the benchmark share: its modules, and a result file."""

from __future__ import annotations

import importlib
import sys

import pytest
from invented_result import gpu_result
from paths import BENCH


@pytest.fixture
def bench(monkeypatch):
    """Import one of the benchmark's modules."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for path in BENCH.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def result():
    """A result file of bench/report.py from a GPU that does not exist."""
    return gpu_result()
