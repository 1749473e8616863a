"""torch.compile makes one graph of a model with the block: static and dynamic sizes, forward and training, and
no second compilation when the image size changes.

The operators stay in the compiled graph; test_opcheck.py shows that they keep torch's rules.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from block_cases import CONFIGURATIONS, WHOLE, draw_inputs, function_of
from models import new_net
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import gc_cuda

# PyTorch compiles sizes of 0 and 1 apart, always; these are the others.
SIZES = [(2, 16, 8, 9), (3, 16, 13, 5), (4, 16, 6, 6), (2, 16, 21, 34)]

FUNCTIONS = {
    "softmax_pool": lambda x: gc_cuda.softmax_pool(x, x.mean(1, keepdim=True)),
    "attention_pool": lambda x: gc_cuda.attention_pool(x, x.mean((0, 2, 3)), x.mean().reshape(1)),
    "average_pool": gc_cuda.average_pool,
    "broadcast_add": lambda x: gc_cuda.broadcast_add(x, x.amax((2, 3))),
    "broadcast_mul": lambda x: gc_cuda.broadcast_mul(x, x.amax((2, 3))),
    "broadcast_mul_add": lambda x: gc_cuda.broadcast_mul_add(x, x.amax((2, 3)), x.amin((2, 3))),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def operators_of(graphs):
    return {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}


def assert_one_graph(counter, compilations=1):
    assert counter.frame_count == compilations, f"compiled {counter.frame_count} times"
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert not counters["recompiles"], dict(counters["recompiles"])


def both_ways(function, x, grad):
    """The output and the gradient of x."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(leaf)
    out.backward(grad)
    return out.detach(), leaf.grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_any_size_are_one_graph(random, name, layout, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(FUNCTIONS[name], backend=counter, fullgraph=True, dynamic=True)
    for size in SIZES:
        x = random(*size, dtype=torch.float32, device=device, layout=layout)
        grad = torch.ones_like(FUNCTIONS[name](x))
        for actual, expected in zip(both_ways(compiled, x, grad), both_ways(FUNCTIONS[name], x, grad)):
            assert torch.equal(actual, expected)
    assert_one_graph(counter)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_global_context_of_any_size_is_one_graph(random, configuration, layout, device):
    """Every input needs its gradient, and all sizes but C come from the same compilation."""
    names = list(draw_inputs(random, configuration, SIZES[0]))
    counter = CompileCounterWithBackend("aot_eager")
    function = function_of(gc_cuda, configuration, names)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for size in SIZES:
        inputs = draw_inputs(
            random, configuration, size, dtype=torch.float32, device=device, layout=layout
        ).values()
        grad = random(*size, dtype=torch.float32, device=device, layout=layout)

        def run(function, inputs=inputs, grad=grad):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            out = function(*leaves)
            return [out, *torch.autograd.grad(out, leaves, grad)]

        for actual, expected in zip(run(compiled), run(function)):
            assert torch.equal(actual, expected)
            assert actual.stride() == expected.stride()
    assert_one_graph(counter)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("pooling_type", ["att", "avg"])
def test_a_model_compiles_with_inductor(random, pooling_type, training, dynamic, device):
    """The default backend, with generated code around the operators."""
    net = new_net(pooling_type=pooling_type).to(device).train(training)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=dynamic)
    sizes = [(2, 3, 8, 9), (3, 3, 13, 5), (4, 3, 6, 6)]

    def run(function, x):
        net.zero_grad()
        if not training:
            with torch.no_grad():
                return [function(x)]
        out = function(x)
        out.square().sum().backward()
        return [out.detach(), *(parameter.grad.clone() for parameter in net.parameters())]

    for size in sizes:
        x = random(*size, dtype=torch.float32, device=device)
        for actual, expected in zip(run(compiled, x), run(net, x)):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert_one_graph(counter, 1 if dynamic else len(sizes)) if dynamic else None
    assert not counters["graph_break"]
    assert "gc_cuda.global_context.default" in operators_of(counter.graphs) or training


def test_training_follows_eager(random, device):
    """Five steps of SGD: the same parameters, and still one graph for all image sizes."""
    nets = [new_net().to(device) for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    functions = [nets[0], torch.compile(nets[1], backend=counter, fullgraph=True, dynamic=True)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in nets]
    for size in itertools.islice(itertools.cycle(SIZES), 5):
        x = random(size[0], 3, *size[2:], dtype=torch.float32, device=device)
        for function, optimizer in zip(functions, optimizers):
            optimizer.zero_grad()
            function(x).square().mean().backward()
            optimizer.step()
    for one, other in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert_one_graph(counter)


def test_autocast_inside_the_compiled_region(random, device):
    net = new_net().to(device)
    x = random(2, 3, 9, 14, dtype=torch.float32, device=device)

    def step(x):
        with torch.autocast(device.type, torch.bfloat16):
            return net(x)

    counter = CompileCounterWithBackend("aot_eager")
    actual, expected = torch.compile(step, backend=counter, fullgraph=True)(x), step(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert_one_graph(counter)


def test_the_first_of_the_recomputing_partitioner(random, device):
    """AOTAutograd's own forward and backward graphs: one operator in each, none of the reference's."""
    from torch._functorch.aot_autograd import aot_function

    graphs = {}

    def keep(name):
        def compiler(graph, example_inputs):
            graphs[name] = graph
            return graph

        return compiler

    inputs = draw_inputs(random, WHOLE, (2, 16, 5, 6), dtype=torch.float32, device=device)
    function = function_of(gc_cuda, WHOLE, inputs)
    traced = aot_function(function, fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    for actual, one in zip(torch.autograd.grad(traced(*leaves).sum(), leaves), expected):
        torch.testing.assert_close(actual, one)
    for name, operator in (("forward", "global_context"), ("backward", "global_context_backward")):
        ours = [target for target in operators_of([graphs[name]]) if "gc_cuda" in target]
        assert ours == [f"gc_cuda.{operator}.default"]


def test_compiled_gradient_of_torch_func(random):
    inputs = draw_inputs(random, WHOLE, (2, 16, 5, 6))
    function = function_of(gc_cuda, WHOLE, inputs)
    gradient = torch.func.grad(lambda x: function(x, *list(inputs.values())[1:]).square().sum())
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs["x"]), gradient(inputs["x"]))
