"""Processes with unequal parts of a batch, one of them empty, equal one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed
from processes import run_processes

WORKER = Path(__file__).with_name("tail_group_worker.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_equal_one(count):
    assert run_processes(WORKER, count=count).count("compared") == count
