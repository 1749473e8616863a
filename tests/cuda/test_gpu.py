"""What only a GPU can show: CUDA graphs, streams, a device that is not the current one, more than 2^31
elements, running out of memory, and no host synchronisation.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from block_cases import CONFIGURATIONS, WHOLE, draw_inputs, every_function, function_of
from evaluate import missing_gpu
from small_net import new_net

import gc_cuda
from gc_cuda import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(missing_gpu() != "", reason=missing_gpu() or "there is one"),
]

SIZE = (2, 64, 25, 42)


def both_ways(function, leaves, grad):
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def leaves_of(random, configuration, size=SIZE, dtype=torch.float32, device="cuda", layout=None):
    inputs = draw_inputs(
        random,
        configuration,
        size,
        dtype=dtype,
        parameters=torch.float32,
        device=device,
        layout=layout or torch.contiguous_format,
    )
    return function_of(gc_cuda, configuration, inputs), [t.requires_grad_() for t in inputs.values()]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_graph_capture_and_replay(random, configuration, layout):
    """Forward and backward in one CUDA graph: each replay has the bits of an eager call on the new values."""
    function, leaves = leaves_of(random, configuration, layout=layout)
    grad = random(*SIZE, dtype=torch.float32, device="cuda", layout=layout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            both_ways(function, leaves, grad)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(function, leaves, grad)
    for _ in range(3):
        with torch.no_grad():
            for tensor in (*leaves, grad):
                tensor.copy_(random(*tensor.shape, dtype=tensor.dtype, device="cuda"))
        graph.replay()
        graph.replay()  # a counter that the first one left would show here
        replayed = [tensor.detach().clone() for tensor in captured]
        for actual, expected in zip(replayed, both_ways(function, leaves, grad)):
            assert torch.equal(actual, expected)


def test_two_graphs_and_eager_calls_take_turns(random):
    """What a graph holds for itself is not what an eager call or another graph uses."""
    graphs = []
    for size in (SIZE, (1, 64, 100, 83)):
        function, leaves = leaves_of(random, WHOLE, size)
        grad = random(*size, dtype=torch.float32, device="cuda")
        expected = [tensor.detach().clone() for tensor in both_ways(function, leaves, grad)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both_ways(function, leaves, grad)
        graphs.append((graph, captured, expected, function, leaves, grad))
    for _ in range(5):
        for graph, captured, expected, function, leaves, grad in graphs:
            graph.replay()
            eager = both_ways(function, leaves, grad)
            for actual, other, one in zip(captured, eager, expected):
                assert torch.equal(actual, one) and torch.equal(other, one)


def test_make_graphed_callables(random):
    """torch's own wrapper, for a block in training."""
    net = new_net().cuda()
    x = random(2, 16, 25, 42, dtype=torch.float32, device="cuda", grad=True)
    expected = net.first(x).detach()
    graphed = torch.cuda.make_graphed_callables(net.first, (x,))
    out = graphed(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in net.first.parameters())


@pytest.mark.parametrize("mode", ["reduce-overhead"])
def test_compiled_with_cuda_graphs(random, mode):
    net = new_net().cuda().eval()
    compiled = torch.compile(net, mode=mode, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = random(2, 3, 32, 48, dtype=torch.float32, device="cuda")
            torch.testing.assert_close(compiled(x).clone(), net(x), rtol=1e-3, atol=1e-3)


def test_concurrent_streams(random):
    """The same operators in flight on several streams at once, with work of different lengths."""
    jobs = []
    for size in ((1, 512, 100, 168), (2, 256, 50, 84), (8, 64, 25, 42), (1, 2048, 25, 42)):
        function, leaves = leaves_of(random, WHOLE, size)
        grad = random(*size, dtype=torch.float32, device="cuda")
        expected = [tensor.detach().clone() for tensor in both_ways(function, leaves, grad)]
        jobs.append((torch.cuda.Stream(), function, leaves, grad, expected))
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream, function, leaves, grad, expected in jobs:
            with torch.cuda.stream(stream):
                results.append((both_ways(function, leaves, grad), expected))
    torch.cuda.synchronize()
    for actual, expected in results:
        for one, other in zip(actual, expected):
            assert torch.equal(one, other)


def test_one_input_on_two_streams(random):
    """Two streams read the same tensors at the same time."""
    calls = every_function(random, "cuda", SIZE)
    expected = [[tensor.clone() for tensor in call()] for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(10):
        for i, call in enumerate(calls):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append((i, call()))
    torch.cuda.synchronize()
    for i, actual in results:
        for one, other in zip(actual, expected[i]):
            assert torch.equal(one, other), f"call {i}"


def test_no_host_synchronisation(random):
    calls = every_function(random, "cuda")
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_device_that_is_not_the_current_one(random):
    """Launched where the tensors are, and the current device stays what it was."""
    torch.cuda.set_device(0)
    first = every_function(random, "cuda:0")
    expected = [call() for call in first]
    function, leaves = leaves_of(random, WHOLE, device="cuda:1")
    grad = random(*SIZE, dtype=torch.float32, device="cuda:1")
    actual = both_ways(function, leaves, grad)
    assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda", 1) for tensor in actual)
    with torch.cuda.device(1):
        for one, other in zip(actual, both_ways(function, leaves, grad)):
            assert torch.equal(one, other)
    for call, results in zip(first, expected):
        for one, other in zip(call(), results):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match="term must be on cuda:1 like x, got cuda:0"):
        gc_cuda.broadcast_add(torch.zeros(1, 2, 3, 3, device="cuda:1"), torch.zeros(1, 2, device="cuda:0"))


def enough_memory(gigabytes):
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gigabytes * 2**30


@pytest.mark.skipif(not enough_memory(28), reason="less than 28 GiB of free GPU memory")
@pytest.mark.parametrize("configuration", CONFIGURATIONS[:3], ids=str)
def test_more_than_2_to_the_31_elements(random, configuration, layout):
    """64-bit offsets between the images: the results of the last one are those that it has alone."""
    n, c, h, w = 3, 1024, 838, 839
    assert n * c * h * w > 2**31 and c * h * w < 2**31
    inputs = draw_inputs(
        random, configuration, (1, c, 2, 2), dtype=torch.half, parameters=torch.float32, device="cuda"
    )
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(n, c, h, w, dtype=torch.half, device="cuda", memory_format=layout)
    for image in x:
        image.normal_(generator=generator)
    parameters = list(inputs.values())[1:]
    function = function_of(gc_cuda, configuration, inputs)

    def run(images):
        leaf = images.detach().requires_grad_()
        out = function(leaf, *parameters)
        (grad_x,) = torch.autograd.grad(out, leaf, out.detach())
        return out.detach(), grad_x

    for whole, alone in zip(run(x), run(x[2:])):
        # Another number of images is cut into other splits: other roundings.
        torch.testing.assert_close(whole[2:], alone, rtol=4e-3, atol=4e-3)
    del whole, alone
    torch.cuda.empty_cache()


@pytest.mark.skipif(not enough_memory(28), reason="less than 28 GiB of free GPU memory")
@pytest.mark.parametrize("name", ["softmax_pool", "attention_pool", "average_pool", "broadcast_mul_add"])
def test_the_parts_beyond_2_to_the_31_elements(random, name, layout):
    n, c, h, w = 3, 1024, 838, 839
    x = torch.empty(n, c, h, w, dtype=torch.half, device="cuda", memory_format=layout)
    for image in x:
        image.normal_(generator=torch.Generator("cuda").manual_seed(0))
    vector = random(n, c, dtype=torch.float32, device="cuda")
    companions = {
        "softmax_pool": (random(n, h * w, dtype=torch.float32, device="cuda"),),
        "attention_pool": (vector[0] / c**0.5,),
        "average_pool": (),
        "broadcast_mul_add": (vector, vector),
    }[name]
    alone = [tensor[2:] if tensor.dim() == 2 else tensor for tensor in companions]
    function = getattr(gc_cuda, name)
    torch.testing.assert_close(function(x, *companions)[2:], function(x[2:], *alone), rtol=4e-3, atol=4e-3)
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
        lambda g: g.repeat_interleave(2, 3)[..., ::2],
        lambda g: g[:, :, :1, :1].expand_as(g),
        lambda g: g.flip(0).contiguous(memory_format=torch.channels_last).flip(0),
    ],
    ids=["transposed", "every other", "expanded", "other layout"],
)
def test_gradients_that_are_not_contiguous(random, change, layout):
    function, leaves = leaves_of(random, WHOLE, layout=layout)
    grad = change(random(*SIZE, dtype=torch.float32, device="cuda", layout=layout))
    expected = both_ways(function, leaves, grad.contiguous(memory_format=layout))
    for actual, one in zip(both_ways(function, leaves, grad), expected):
        torch.testing.assert_close(actual, one)


HOG = 2**26


@contextmanager
def no_room_for_a_large_map():
    """Too little memory for a map of 256 MiB, enough for small ones.

    A limit on what is reserved does not do: earlier tests may have left segments that are partly used, and
    the free parts of those are not limited. So all of it is filled in pieces of 64 MiB, until none is free
    that large; with one piece given back, none has three times that.
    """
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2 * HOG) / total)
    hogs = []
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            while True:
                hogs.append(torch.empty(HOG, dtype=torch.uint8, device="cuda"))
        hogs.pop()
        yield
    finally:
        hogs.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_running_out_of_memory_leaves_a_usable_process(random):
    """An error of PyTorch's allocator; then the next call has the bits it had before."""
    function, leaves = leaves_of(random, WHOLE)
    grad = random(*SIZE, dtype=torch.float32, device="cuda")
    expected = [tensor.detach().clone() for tensor in both_ways(function, leaves, grad)]
    c = SIZE[1]
    x = torch.zeros(1, c, 1024, 1024, device="cuda")  # 256 MiB
    with no_room_for_a_large_map():
        for training in (False, True):
            with pytest.raises(torch.cuda.OutOfMemoryError), torch.set_grad_enabled(training):
                function(x, *leaves[1:])
        for actual, one in zip(both_ways(function, leaves, grad), expected):
            assert torch.equal(actual, one)
    torch.cuda.synchronize()
    assert function(x, *leaves[1:]).shape == x.shape


def test_running_out_of_memory_in_the_backward_pass(random):
    function, leaves = leaves_of(random, WHOLE)
    grad = random(*SIZE, dtype=torch.float32, device="cuda")
    expected = [tensor.detach().clone() for tensor in both_ways(function, leaves, grad)]
    x = torch.zeros(1, SIZE[1], 1024, 1024, device="cuda", requires_grad=True)
    out = function(x, *leaves[1:])
    grad_out = torch.zeros_like(out)
    with no_room_for_a_large_map():
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.autograd.grad(out, [x, *leaves[1:]], grad_out)
        for actual, one in zip(both_ways(function, leaves, grad), expected):
            assert torch.equal(actual, one)


def test_allocated_memory_stays_flat(random):
    calls = every_function(random, "cuda")
    for call in calls * 3:
        call()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        for call in calls:
            call()
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_threads_with_streams_of_their_own(random):
    """Eight Python threads, each on its own stream, as a server has them."""
    calls = every_function(random, "cuda", SIZE)
    expected = [[tensor.clone() for tensor in call()] for call in calls]
    torch.cuda.synchronize()

    def work(_):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [call() for call in calls * 5]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(8)):
            for actual, one in zip(results, expected * 5):
                assert all(torch.equal(a, b) for a, b in zip(actual, one))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_amp_training_follows_the_reference(random, dtype):
    """Autocast, GradScaler and channels_last together, as a training loop has them."""
    losses = []
    for block in (gc_cuda.ContextBlock, reference.ContextBlock):
        net = new_net(block=block).cuda().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        generator = torch.Generator().manual_seed(0)
        losses.append([])
        for _ in range(5):
            x = torch.randn(4, 3, 32, 48, generator=generator).cuda().to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = net(x).tanh().float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.01)
