"""torch.compile makes one graph of a model with the block: static and dynamic sizes, forward and training,
and no second compilation when the image size changes.

The operators stay in the compiled graph; test_opcheck.py shows that they keep torch's rules.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from block_cases import (
    CONFIGURATIONS,
    FUNCTIONS,
    SQUEEZE_EXCITE,
    WHOLE,
    draw_inputs,
    function_of,
    without_norm,
)
from small_net import new_net
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import gc_cuda

# PyTorch compiles sizes of 0 and 1 apart, always; these are the others.
SIZES = [(2, 16, 8, 9), (3, 16, 13, 5), (4, 16, 6, 6), (2, 16, 21, 34)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def operators_of(graphs):
    return {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}


def assert_nothing_more_is_compiled(counter, calls):
    """The calls after the first one reuse its graph. That one may be traced twice: PyTorch starts again once
    it knows that eps is no symbol.
    """
    first, *others = calls
    first()
    compiled = counter.frame_count
    assert 1 <= compiled <= 2
    for call in others:
        call()
    assert counter.frame_count == compiled
    assert not counters["graph_break"], dict(counters["graph_break"])


def gradients_keep_their_layout():
    """AOTAutograd of torch 2.4 copies the gradient that flows in to NCHW: ours is computed from that."""
    x = torch.zeros(1, 2, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = torch.compile(lambda x: 2 * x, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(out, x, torch.zeros_like(out))
    return grad.is_contiguous(memory_format=torch.channels_last)


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

    def compare(size):
        x = random(*size, dtype=torch.float32, device=device, layout=layout)
        grad = torch.ones_like(FUNCTIONS[name](x))
        for actual, expected in zip(both_ways(compiled, x, grad), both_ways(FUNCTIONS[name], x, grad)):
            assert torch.equal(actual, expected)

    assert_nothing_more_is_compiled(counter, [partial(compare, size) for size in SIZES])


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half beside float32"])
@pytest.mark.parametrize("case", [*CONFIGURATIONS, "no norm"], ids=str)
def test_global_context_of_any_size_is_one_graph(random, case, half, layout, device):
    """N, H and W come and go within one compilation. Every input needs its gradient; beside half x, all but a
    weight.
    """
    configuration, policy = case, {}
    if case == "no norm":
        configuration, policy = SQUEEZE_EXCITE, {"activation": "hardswish", "gate": "hardsigmoid"}

    def drawn(size):
        dtype = torch.half if half else torch.float32
        inputs = draw_inputs(
            random, configuration, size, dtype=dtype, parameters=torch.float32, device=device, layout=layout
        )
        return inputs if case != "no norm" else without_norm(inputs)

    function = function_of(gc_cuda, configuration, drawn(SIZES[0]), **policy)
    same_calls = layout == torch.contiguous_format or gradients_keep_their_layout()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    frozen = f"{configuration.branches[0]}.w1" if half else ""

    def compare(size):
        inputs = drawn(size)
        grad = random(*size, dtype=inputs["x"].dtype, device=device, layout=layout)
        leaves = [tensor.requires_grad_(name != frozen) for name, tensor in inputs.items()]
        needing = [leaf for leaf in leaves if leaf.requires_grad]
        outs = [compiled(*leaves), function(*leaves)]
        results = [[out, *torch.autograd.grad(out, needing, grad)] for out in outs]
        for actual, expected in zip(*results):
            if same_calls:
                assert torch.equal(actual, expected)
                assert actual.stride() == expected.stride()
            else:
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    assert_nothing_more_is_compiled(counter, [partial(compare, size) for size in SIZES[: 2 if half else 4]])


@pytest.mark.parametrize(
    ("backend", "training", "dynamic", "pooling_type", "layout"),
    [
        ("inductor", False, False, "att", torch.contiguous_format),
        ("aot_eager", True, True, "att", torch.contiguous_format),
        ("aot_eager", True, False, "att", torch.channels_last),
        ("aot_eager", True, False, "avg", torch.contiguous_format),
        ("aot_eager", False, True, "avg", torch.contiguous_format),
    ],
    ids=str,
)
def test_a_model_compiles_as_one_graph(random, backend, training, dynamic, pooling_type, layout, device):
    net = new_net(pooling_type=pooling_type).to(device).train(training)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=dynamic)

    def run(function, x):
        net.zero_grad()
        x = x.detach().clone().requires_grad_(training)
        with torch.set_grad_enabled(training):
            out = function(x)
        if not training:
            return [out]
        out.square().sum().backward()
        return [out.detach(), x.grad, *(parameter.grad.clone() for parameter in net.parameters())]

    def compare(size):
        x = random(size[0], 3, *size[2:], dtype=torch.float32, device=device, layout=layout)
        for actual, expected in zip(run(compiled, x), run(net, x)):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    sizes = SIZES if dynamic else [SIZES[0]] * 2
    assert_nothing_more_is_compiled(counter, [partial(compare, size) for size in sizes])
    if not training:  # elsewhere it stands in the subgraphs of an autograd function
        ours = [target for target in operators_of(counter.graphs) if "gc_cuda" in target]
        left = pooling_type == "avg" and device.type == "cpu"  # test_left_to_the_compiler.py
        assert ours == ([] if left else ["gc_cuda.global_context.default"])


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_the_default_backend_compiles_once_for_any_size(random, training, device):
    """With generated code around the operators. A model with a strided convolution Inductor compiles for each
    size in training, with the block in plain PyTorch too: here is none.
    """
    block = torch.nn.Sequential(new_net().first, torch.nn.ReLU()).to(device)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)

    def compare(size):
        x = random(*size, dtype=torch.float32, device=device)
        if training:
            grad = random(*size, dtype=torch.float32, device=device)
            results = both_ways(compiled, x, grad), both_ways(block, x, grad)
        else:
            with torch.no_grad():
                results = [compiled(x)], [block(x)]
        for actual, expected in zip(*results):
            torch.testing.assert_close(actual, expected)

    assert_nothing_more_is_compiled(counter, [partial(compare, size) for size in SIZES])


def test_training_follows_eager(random, device):
    """Steps of SGD at changing image sizes: the same parameters."""
    nets = [new_net().to(device) for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    functions = [nets[0], torch.compile(nets[1], backend=counter, fullgraph=True, dynamic=True)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in nets]

    def step(size):
        x = random(size[0], 3, *size[2:], dtype=torch.float32, device=device)
        for function, optimizer in zip(functions, optimizers):
            optimizer.zero_grad()
            function(x).tanh().square().mean().backward()
            optimizer.step()

    assert_nothing_more_is_compiled(counter, [partial(step, size) for size in SIZES])
    for one, other in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_autocast_inside_the_compiled_region(random, device):
    net = new_net().to(device)
    x = random(2, 3, 9, 14, dtype=torch.float32, device=device)

    def step(x):
        with torch.autocast(device.type, torch.bfloat16):
            return net(x)

    actual, expected = torch.compile(step, backend="aot_eager", fullgraph=True)(x), step(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_aot_autograd_traces_one_operator_each_way(random, device):
    """Its own forward and backward graphs hold our operators, and nothing of the reference's softmax."""
    from functorch.compile import aot_function, make_boxed_func

    graphs = {}

    def keep(name):
        def compiler(graph, example_inputs):
            graphs[name] = graph
            return make_boxed_func(graph)

        return compiler

    inputs = draw_inputs(random, WHOLE, (2, 16, 5, 6), dtype=torch.float32, device=device)
    function = function_of(gc_cuda, WHOLE, inputs)
    traced = aot_function(function, fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    for actual, one in zip(torch.autograd.grad(traced(*leaves).sum(), leaves), expected):
        torch.testing.assert_close(actual, one)
    for name, operator in (("forward", "global_context_kept"), ("backward", "global_context_backward")):
        names = operators_of([graphs[name]])
        assert [target for target in names if "gc_cuda" in target] == [f"gc_cuda.{operator}.default"]
        assert not any("softmax" in target for target in names)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_compiled_transforms_of_torch_func(random, configuration):
    """The compiler would trace the operator under grad as if it had no derivative: it gets the reference.

    A torch without torch.compiler.is_exporting cannot tell in a graph that a transform is under way: it runs
    the call uncompiled, and refuses one that must be one graph.
    """
    one_graph = hasattr(torch.compiler, "is_exporting")
    inputs = draw_inputs(random, configuration, (2, 16, 5, 6))
    _, *others = inputs.values()
    function = function_of(gc_cuda, configuration, inputs)
    gradient = torch.func.grad(lambda x: function(x, *others).square().sum())
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=one_graph)
    torch.testing.assert_close(compiled(inputs["x"]), gradient(inputs["x"]))
    mapped = torch.func.vmap(lambda x: function(x, *others))
    x = inputs["x"].expand(3, *inputs["x"].shape) * torch.arange(1.0, 4.0).double().view(3, 1, 1, 1, 1)
    compiled = torch.compile(mapped, backend="aot_eager", fullgraph=one_graph)
    torch.testing.assert_close(compiled(x), torch.stack([function(one, *others) for one in x]))


def test_compiled_gradients_have_the_strides_of_their_parameters(random):
    """What the fake kernels promise is what AOTAutograd gives out."""
    block = gc_cuda.ContextBlock(8, 1 / 2).to(memory_format=torch.channels_last)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    compiled(random(2, 8, 5, 6, dtype=torch.float32)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def test_fake_gradients_have_the_strides_of_the_real_ones(random):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def strides():
        x = torch.randn(2, 8, 3, 4)
        weight, w1, w2 = (
            torch.empty(size, memory_format=torch.channels_last).fill_(0.5)
            for size in ((1, 8, 1, 1), (4, 8, 1, 1), (8, 4, 1, 1))
        )
        add = [w1, torch.randn(4), torch.randn(4), torch.randn(4), w2, torch.randn(8)]
        bias = torch.zeros(1)
        _, kept = torch.ops.gc_cuda.global_context_kept(x, weight, bias, add, [], 1e-5, 0, 0)
        needed = [True] * 9 + [False] * 6
        gradients = torch.ops.gc_cuda.global_context_backward(x, x, weight, bias, add, [], kept, 0, 0, needed)
        return [gradient.stride() for gradient in gradients]

    real = strides()
    with FakeTensorMode():
        assert strides() == real
    assert real[3] == (8, 1, 8, 8)


class Tail(nn.Module):
    """A convolution, and a tail or a block on what it gives."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1, bias=False)
        self.block = gc_cuda.ContextBlock(16, 1 / 4)
        self.whole = whole

    def forward(self, x):
        y = self.conv(x)
        return gc_cuda.bn_context_add_relu(y, x) if self.whole else self.block(y)


@pytest.mark.parametrize(("whole", "name"), [(True, "bn_context_add_relu"), (False, "global_context")])
def test_the_layout_of_a_convolution_is_taken_as_it_is(random, whole, name):
    """Inductor makes convolutions channels_last on the CPU: no map is copied for our operators."""
    model = nn.Sequential(*[Tail(whole) for _ in range(3)])
    x = random(2, 16, 9, 10, dtype=torch.float32)
    expected = model(x)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        out, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    assert out.stride() == expected.stride()
    convolved = re.findall(r"(buf\d+) = .*convolution", code)
    taken = re.findall(rf"gc_cuda\.{name}\.default\((buf\d+)", code)
    assert len(convolved) == len(taken) == 3
    assert set(taken) == set(convolved), "a copy stands between"
