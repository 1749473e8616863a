"""The end of a process group in which models were trained by DistributedDataParallel."""

from __future__ import annotations

import gc

import torch.distributed as dist
from torch import nn


def end_process_group() -> None:
    """Destroys the group; no DistributedDataParallel may be left that would outlive it.

    One that does is the last to hold the group, and destroys it with the interpreter's lock in hand: gloo's
    destructor waits for its threads, and one of these may wait for that lock, to drop what belongs to its
    last all_reduce. Under load the process then never ends. destroy_process_group gives the lock up first.
    """
    gc.collect()  # DDP holds itself
    left = sum(type(one) is nn.parallel.DistributedDataParallel for one in gc.get_objects())
    assert left == 0, f"{left} DistributedDataParallel would outlive the process group"
    dist.destroy_process_group()
