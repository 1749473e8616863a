"""What the tests of tails share."""

from __future__ import annotations

import sys

import pytest
from bottlenecks import stand_ins

from gc_cuda.models import tails


@pytest.fixture
def frameworks(monkeypatch):
    """As if torchvision and mmdetection were installed."""
    for name, module in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)


class Counter:
    """Of the tails that were one operation."""

    def __init__(self):
        self.count = 0


@pytest.fixture
def operations(monkeypatch):
    counter, run = Counter(), tails.bn_context_add_relu

    def counting(*arguments, **options):
        counter.count += 1
        return run(*arguments, **options)

    monkeypatch.setattr(tails, "bn_context_add_relu", counting)
    return counter
