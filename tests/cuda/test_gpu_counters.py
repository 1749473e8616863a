"""Counters and limits that launches of several threads, streams and graphs could share by mistake.

What goes wrong then is a sum that lacks a part, or a kernel that waits for ever. So results are compared bit
by bit with those of a call alone, and nothing here waits without a limit: threads have a time to end in, and
what needs a process that has not used the GPU yet runs in a process of its own.
"""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from block_cases import WHOLE, draw_inputs, function_of
from evaluate import missing_gpu
from gpu_driver import (
    KERNEL_NODE,
    PER_THREAD_STREAM,
    destroy_stream,
    free_bytes,
    graph_nodes,
    new_stream,
)
from paths import ROOT, TESTS

import gc_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(missing_gpu() != "", reason=missing_gpu() or "there is one"),
]

SIZES = ((2, 64, 25, 42), (1, 64, 100, 83), (1, 512, 50, 84), (2, 256, 50, 84))
PATIENCE_S = 60


def block_and_leaves(random, size):
    inputs = draw_inputs(random, WHOLE, size, dtype=torch.float32, device="cuda")
    return function_of(gc_cuda, WHOLE, inputs), list(inputs.values())


def whole_call(random, size):
    """A whole block's forward pass, on values of its own."""
    function, leaves = block_and_leaves(random, size)

    def call():
        with torch.no_grad():
            return function(*leaves)

    return call


def step_call(random, size):
    """A whole block forward and backward."""
    function, leaves = block_and_leaves(random, size)
    grad = random(*size, dtype=torch.float32, device="cuda")

    def call():
        with torch.enable_grad():
            own = [leaf.detach().requires_grad_() for leaf in leaves]
            out = function(*own)
            return [out.detach(), *torch.autograd.grad(out, own, grad)]

    return call


def wait_for_the_gpu():
    """Synchronises, or ends the whole run: after a kernel that hangs no other test could say anything."""
    ends = []
    for stream in {torch.cuda.current_stream(), torch.cuda.default_stream()}:
        event = torch.cuda.Event()
        event.record(stream)
        ends.append(event)
    wait_for(ends)


def wait_for(events):
    deadline = time.monotonic() + PATIENCE_S
    while not all(event.query() for event in events):
        if time.monotonic() > deadline:
            pytest.exit(f"a kernel has not ended after {PATIENCE_S} s", returncode=1)
        time.sleep(0.001)


def record(stream):
    event = torch.cuda.Event()
    event.record(stream)
    return event


def in_threads(works: list[Callable[[], None]]) -> None:
    """Runs them at once, and raises what the first of them raised."""
    start = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def run(work):
        try:
            start.wait(PATIENCE_S)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        pytest.exit(f"a thread that launches kernels has not ended after {PATIENCE_S} s", returncode=1)
    if errors:
        raise errors[0]


def alone(script: str, timeout: float = 240, **environment: str) -> str:
    """Runs a script in a process of its own, with the tests' modules at hand; returns what it printed."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"not ended after {timeout} s: {(error.stderr or b'')[-2000:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def equal(actual, expected):
    return all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


# Shared memory


def channels_of_one_kernel():
    """Two numbers of channels that one instantiation serves, with two amounts of shared memory over 48 KB."""
    plan = importlib.import_module("gc_cuda._C").plan
    properties = torch.cuda.get_device_properties(0)
    device = {
        "multiprocessors": properties.multi_processor_count,
        "shared_bytes": properties.shared_memory_per_block_optin,
    }
    groups: dict[tuple[int, int], dict[int, int]] = {}
    for channels in (2560, 3072, 4096, 5120, 6144, 8192, 10240):
        p = plan("pool_backward_mask", 1, channels, 64, **device)
        if p.holds_channels and p.shared_bytes > 48 * 1024:
            groups.setdefault((p.rows, p.width), {})[p.shared_bytes] = channels
    of_one = max(groups.values(), key=len, default={})
    if len(of_one) < 2:
        pytest.skip("no kernel has two amounts of shared memory above 48 KB on this GPU")
    return of_one[min(of_one)], of_one[max(of_one)]


def test_threads_with_much_and_little_shared_memory(random):
    """The limit of a kernel is not lowered by one thread between another thread's request and its launch."""
    operators = torch.ops.gc_cuda
    jobs = []
    for channels in channels_of_one_kernel():
        x = random(1, channels, 8, 8, dtype=torch.float32, device="cuda")
        weight = random(channels, dtype=torch.float32, device="cuda") / channels**0.5
        grad = random(1, channels, dtype=torch.float32, device="cuda")
        _, logits, state = operators.attention_pool(x, weight, None)

        # The operator itself: autograd would run it on one thread for all.
        def step(given=(grad, x, weight, logits, state)):
            return operators.attention_pool_backward(*given)

        jobs += [(step, step())] * 2
    wait_for_the_gpu()

    def work(step, expected):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [step() for _ in range(200)]
        wait_for([record(stream)])
        assert all(equal(result, expected) for result in results)

    in_threads([lambda job=job: work(*job) for job in jobs])


# Streams


needs_own_memory = pytest.mark.skipif(
    not hasattr(torch.cuda, "use_mem_pool"),
    reason="torch's allocator knows streams by their handles too, and mixes them up without pools",
)


@needs_own_memory
def test_default_streams_of_many_threads(random):
    """One handle, a stream in each thread. Without gradients: autograd's thread has another such stream."""
    calls = [whole_call(random, size) for size in SIZES * 2]
    expected = [call().clone() for call in calls]
    wait_for_the_gpu()
    pools = [torch.cuda.MemPool() for _ in calls]  # they live until all is done
    kept = []

    def work(call, expected, pool):
        stream = torch.cuda.ExternalStream(PER_THREAD_STREAM)
        with torch.cuda.use_mem_pool(pool), torch.cuda.stream(stream):
            results = [call() for _ in range(40)]
            kept.append(results)
            wait_for([record(stream)])
            assert all(torch.equal(result, expected) for result in results)

    in_threads([lambda job=job: work(*job) for job in zip(calls, expected, pools)])
    kept.clear()


@needs_own_memory
def test_streams_destroyed_with_work_to_do_and_made_anew(random):
    """A new stream may get the handle of one whose work is still running."""
    calls = [whole_call(random, size) for size in SIZES]
    expected = [call().clone() for call in calls]
    wait_for_the_gpu()
    pools, results, ends, handles = [], [], [], []
    for turn in range(60):
        handle = new_stream()
        handles.append(handle)
        stream = torch.cuda.ExternalStream(handle)
        pools.append(torch.cuda.MemPool())
        with torch.cuda.use_mem_pool(pools[-1]), torch.cuda.stream(stream):
            for _ in range(4):
                results.append((turn % len(calls), calls[turn % len(calls)]()))
            ends.append(record(stream))
        destroy_stream(handle)
    wait_for(ends)
    for index, result in results:
        assert torch.equal(result, expected[index])
    results.clear()
    if len(set(handles)) == len(handles):
        pytest.skip("the results are right, but this driver gave no handle twice")


def test_many_streams_that_come_and_go_need_no_more_memory():
    """Also beyond the number of streams that have counters of their own."""
    print(
        alone("""
        import torch, gc_cuda
        from gpu_driver import destroy_stream, free_bytes, new_stream

        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(1, 64, 100, 83, device="cuda", generator=generator)
        weight = torch.randn(64, device="cuda", generator=generator)
        expected = gc_cuda.attention_pool(x, weight)
        torch.cuda.synchronize()

        def use(count):
            for turn in range(count):
                if turn % 100 == 0:  # torch keeps memory for each stream
                    torch.cuda.empty_cache()
                handle = new_stream()
                stream = torch.cuda.ExternalStream(handle)
                with torch.cuda.stream(stream):
                    assert torch.equal(gc_cuda.attention_pool(x, weight), expected)
                stream.synchronize()
                destroy_stream(handle)

        use(2200)
        torch.cuda.empty_cache()
        before = free_bytes()
        use(2200)
        torch.cuda.empty_cache()
        grown = before - free_bytes()
        assert grown < 4 * 2**20, grown  # counters for each would be more than 8 MiB
        print("grown by", grown)
        """)
    )


# Graphs


def captured(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def test_graphs_on_two_streams_at_once(random):
    """Captured one after the other, replayed together, and together with calls that are not captured."""
    jobs = []
    for size in (*SIZES, SIZES[0]):
        call = step_call(random, size)
        expected = [tensor.clone() for tensor in call()]
        wait_for_the_gpu()
        jobs.append((torch.cuda.Stream(), *captured(call), call, expected))
    wait_for_the_gpu()
    for _ in range(20):
        ends, eager = [], []
        for stream, graph, _, call, expected in jobs:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    graph.replay()
                eager.append((call(), expected))
            ends.append(record(stream))
        wait_for(ends)
        for _, _, results, _, expected in jobs:
            assert equal(results, expected)
        for results, expected in eager:
            assert equal(results, expected)


def test_a_graph_that_forks(random):
    """One capture, four streams: its branches run at the same time."""
    calls = [whole_call(random, size) for size in SIZES]
    expected = [call().clone() for call in calls]
    wait_for_the_gpu()
    branches = [torch.cuda.Stream() for _ in calls]
    results = [[] for _ in calls]

    def fork():
        origin = torch.cuda.current_stream()
        for branch, call, result in zip(branches, calls, results):
            branch.wait_stream(origin)
            with torch.cuda.stream(branch):
                for _ in range(5):
                    result.append(call())
        for branch in branches:
            origin.wait_stream(branch)

    graph, _ = captured(fork)
    for _ in range(20):
        graph.replay()
        wait_for_the_gpu()
        for result, one in zip(results, expected):
            assert all(torch.equal(each, one) for each in result)


@pytest.mark.skipif(
    not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"), reason="this torch does not show a graph's nodes"
)
def test_a_graph_is_kernels_only(random):
    """Three forward and three backward. No counters are filled, nor the mask bias's gradient."""
    call = whole_call(random, SIZES[0])
    step = step_call(random, SIZES[0])
    for body, count in ((call, 3), (step, 6)):
        body()
        wait_for_the_gpu()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            kept = body()
        kinds = graph_nodes(graph.raw_cuda_graph())
        assert len(kinds) == count, kinds
        fills = 1 if body is step else 0  # torch may fill the bias's gradient without a kernel
        assert kinds.count(KERNEL_NODE) >= count - fills, kinds
        del kept


def test_graphs_that_come_and_go(random):
    """Destroyed while they run; the next ones get what they held, are right and need no more memory."""
    call = whole_call(random, SIZES[0])
    expected = call().clone()
    wait_for_the_gpu()
    stream = torch.cuda.Stream()
    keep = torch.empty_like(expected)

    def use(count):
        right = []
        for turn in range(count):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):  # torch.cuda.graph would synchronise
                graph.capture_begin()
                result = call()
                graph.capture_end()
                for _ in range(3):
                    graph.replay()
                keep.copy_(result)
                right.append((keep == expected).all())
            del result, graph
            if turn % 50 == 0:  # torch keeps the memory of each graph
                torch.cuda.empty_cache()
        wait_for([record(stream)])
        assert all(bool(one) for one in right)

    use(100)
    gc.collect()
    torch.cuda.empty_cache()
    before = free_bytes()
    use(1500)
    gc.collect()
    torch.cuda.empty_cache()
    assert before - free_bytes() < 4 * 2**20  # a region for each graph would be 6 MiB


# A process that has launched nothing yet. Kernels are loaded at its start: loading is not what is tested.

FIRST_CALL = """
import threading, torch, gc_cuda
from gpu_driver import fill_memory

torch.manual_seed(0)
x = torch.randn(1, 64, 100, 83)
weight = torch.randn(64) / 8
expected = gc_cuda.attention_pool(x, weight)
x, weight = x.cuda(), weight.cuda()

def check(result):
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-5)
"""


def first_call(script: str) -> str:
    return alone(FIRST_CALL + textwrap.dedent(script), CUDA_MODULE_LOADING="EAGER")


def test_first_call_while_another_thread_captures():
    """The counters' memory is made then; it must not end the capture, which is in the strictest mode."""
    first_call("""
        stream, capturing = torch.cuda.Stream(), torch.cuda.Stream()
        y = torch.zeros(1000, device="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # torch would ask CUDA for the call's own memory otherwise
            room = [torch.empty(n, device="cuda") for n in (1000, 100_000, 2**20, 2**23) for _ in range(2)]
            del room
        torch.cuda.synchronize()
        outcome = []

        def call():
            try:
                with torch.cuda.stream(stream):
                    outcome.append(gc_cuda.attention_pool(x, weight))
            except BaseException as error:
                outcome.append(error)

        with torch.cuda.stream(capturing):
            graph.capture_begin(capture_error_mode="global")
            y.add_(1)
            thread = threading.Thread(target=call, daemon=True)
            thread.start()
            thread.join(60)
            y.add_(1)
            graph.capture_end()
        assert not thread.is_alive(), "the call has not ended"
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert bool((y == 6).all()), y
        check(outcome[0])
    """)


def test_first_call_is_captured():
    first_call("""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = gc_cuda.attention_pool(x, weight)
        for _ in range(3):
            result.zero_()
            graph.replay()
            torch.cuda.synchronize()
            check(result)
        check(gc_cuda.attention_pool(x, weight))
    """)


def test_lack_of_memory_for_counters_is_pytorchs_error():
    first_call("""
        # Room in torch's allocator for the call itself, in pieces that it cannot give back.
        pieces = [torch.empty(2**17, device="cuda") for _ in range(32)]
        held = pieces[::4]
        del pieces
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        give_back = fill_memory()
        try:
            gc_cuda.attention_pool(x, weight)
        except torch.cuda.OutOfMemoryError as error:
            assert "counters" in str(error), error
        else:
            raise AssertionError("there was memory for counters")
        finally:
            give_back()
        check(gc_cuda.attention_pool(x, weight))
    """)
