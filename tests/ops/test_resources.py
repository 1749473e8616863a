"""A thousand calls leave no memory behind, and calls from eight threads give the bits of one thread's."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from block_cases import WHOLE, draw_inputs, every_function, function_of

import gc_cuda

CALLS = 1000
STATM = Path("/proc/self/statm")


def resident_bytes():
    return int(STATM.read_text().split()[1]) * 4096


@pytest.mark.skipif(not STATM.exists(), reason="no /proc/self/statm")
def test_resident_memory_stays_flat(random):
    """1,000 calls of each function: a leak of one small vector in each would show as megabytes."""
    calls = every_function(random, "cpu", (2, 64, 9, 11))

    def rounds(count):
        for _ in range(count):
            for call in calls:
                call()

    rounds(100)  # allocators and caches fill
    gc.collect()
    before = resident_bytes()
    rounds(CALLS)
    gc.collect()
    grown = resident_bytes() - before
    # 1,000 x 12 calls: 4 MiB are 350 bytes a call, less than the [2, 64] of one context.
    assert grown < 4 * 2**20, f"{grown / 2**20:.1f} MiB more"


def test_no_tensor_outlives_its_call(random):
    """No cycle keeps one until the collector comes: counted with the collector switched off."""
    calls = every_function(random, "cpu")
    for call in calls:
        call()
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        for call in calls * 5:
            call()
        after = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


@pytest.mark.skipif(not STATM.exists(), reason="no /proc/self/statm")
def test_errors_leak_nothing(random):
    x = random(8, 64, 32, 32, dtype=torch.float32)  # 2 MiB
    before = resident_bytes()
    for _ in range(CALLS):
        with pytest.raises(ValueError, match="term must have shape"):
            gc_cuda.broadcast_add(x * 1, x[0])
    assert resident_bytes() - before < 16 * 2**20


@pytest.mark.parametrize("intraop", [1, 2])
def test_eight_threads_give_the_bits_of_one(random, threads, intraop, layout):
    """Each thread runs every function many times while the others do; the inputs are shared."""
    threads(intraop)
    calls = every_function(random, "cpu", (2, 33, 13, 17))
    large = draw_inputs(random, WHOLE, (2, 64, 40, 50), dtype=torch.float32, layout=layout)
    function = function_of(gc_cuda, WHOLE, large)
    calls.append(lambda: [function(*large.values())])
    expected = [call() for call in calls]
    gate = threading.Barrier(8)

    def work(seed):
        order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(seed)).tolist()
        gate.wait()
        for _ in range(5):
            for i in order:
                for actual, one in zip(calls[i](), expected[i]):
                    if not torch.equal(actual, one):
                        return f"call {i} differs"
        return ""

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [""] * 8


def test_one_block_shared_by_threads(random):
    """Inference of one module from a server's threads, with autocast on in half of them."""
    torch.manual_seed(0)
    block = gc_cuda.ContextBlock(16, 1 / 4)
    torch.nn.init.normal_(block.channel_add_conv[3].weight)
    x = random(2, 16, 9, 14, dtype=torch.float32)

    def run(autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return block(x.bfloat16() if autocast else x)

    expected = {autocast: run(autocast) for autocast in (False, True)}
    assert expected[True].dtype == torch.bfloat16
    with ThreadPoolExecutor(8) as pool:
        for autocast, out in zip([False, True] * 100, pool.map(run, [False, True] * 100)):
            assert torch.equal(out, expected[autocast])
