"""Graphs of torch.fx: a block is a node that calls it, and so runs fused; the rest is traced as ever."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from block_cases import Spy
from gcnet_double import ContextBlock, gcnet  # noqa: F401 (a fixture of every test)
from small_net import new_net
from torch import fx, nn
from whole_models import assert_same, awake, step

import gc_cuda
from gc_cuda import blocks

SIZE = (2, 3, 7, 8)


def accelerated(**options):
    torch.manual_seed(0)
    block = ContextBlock(8, 1 / 2, **options)
    net = awake(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(block, nn.ReLU())))
    assert gc_cuda.accelerate(net).accelerated == ["1.0"]
    return net


def calls(graph):
    """The modules that it calls."""
    return [node.target for node in graph.graph.nodes if node.op == "call_module"]


def operators(module, x):
    with Spy() as spy:
        module(x)
    return {name for name in spy.names() if name.startswith("gc_cuda::")}


def assert_fused(graph, x):
    assert operators(graph, x) == {"gc_cuda::global_context_kept"}


def assert_traced_inside(graph, x):
    assert "1.0" not in calls(graph) and not operators(graph, x)


@pytest.mark.parametrize("pooling_type", ["att", "avg"])
@pytest.mark.parametrize("fusion_types", [("channel_add",), ("channel_add", "channel_mul")], ids=str)
def test_an_accelerated_block_is_a_node(random, pooling_type, fusion_types):
    net, x = accelerated(pooling_type=pooling_type, fusion_types=fusion_types), random(*SIZE)
    graph = fx.symbolic_trace(net)
    assert calls(graph) == ["0", "1.0", "1.1"]
    assert_fused(graph, x)
    assert_same(step(graph, x), step(net, x), 0)
    plain = copy.deepcopy(net)
    gc_cuda.restore(plain)
    assert_same(step(graph, x), step(plain, x))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "graph of the graph"])
def test_copies_of_a_graph(random, way):
    net, x = accelerated(), random(*SIZE)
    graph = fx.symbolic_trace(net)
    if way == "deepcopy":
        twin = copy.deepcopy(graph)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(graph))
    else:
        twin = fx.symbolic_trace(graph)
    assert_fused(twin, x)
    assert torch.equal(twin(x), net(x))


def test_the_graph_has_the_blocks_of_the_model(random):
    """So `restore` of either is of both; what is changed later is looked at as ever."""
    net, x = accelerated(), random(*SIZE)
    graph, expected = fx.symbolic_trace(net), net(x)
    seen = []
    hook = net[1][0].softmax.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)
    assert seen == [1]
    hook.remove()
    assert_fused(graph, x)
    gc_cuda.restore(net)
    assert not operators(graph, x)
    torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)
    gc_cuda.accelerate(graph)
    assert_fused(net, x)


def test_a_block_alone_is_traced_inside(random):
    """A graph has no name for its own root."""
    for block in (accelerated()[1][0], awake(gc_cuda.ContextBlock(8, 1 / 2)), awake(blocks.SEBlock(8))):
        x = random(2, 8, 5, 6)
        graph = fx.symbolic_trace(block)
        assert not operators(graph, x) and operators(block, x)
        assert_same(step(graph, x), step(block, x))


def test_leaves_that_the_user_names(random):
    net, x = accelerated(), random(*SIZE)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, ContextBlock) or super().is_leaf_module(module, name)

    graph = fx.GraphModule(net, Leaves().trace(net))
    assert calls(graph) == ["0", "1.0", "1.1"]
    assert torch.equal(graph(x), net(x))


def double(module, args, out):
    return 2 * out


@contextlib.contextmanager
def removing(hook):
    yield
    hook.remove()


class Doubling(gc_cuda.ContextBlock):
    def forward(self, x):
        return 2 * super().forward(x)


class DoublingCalls(gc_cuda.ContextBlock):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_what_is_around_the_forward_is_done_once(random):
    """torch.fx runs a hook, or a subclass's own forward, while it traces: the block is traced inside then."""
    x = random(*SIZE)
    net = accelerated()
    for add in (
        lambda: net[1][0].register_forward_hook(double),
        lambda: net[1][0].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda: nn.modules.module.register_module_forward_hook(
            lambda module, args, out: 2 * out if isinstance(module, ContextBlock) else None
        ),
    ):
        plain = net(x)
        with removing(add()):
            expected, graph = net(x), fx.symbolic_trace(net)
            assert not torch.equal(expected, plain)
        assert_traced_inside(graph, x)
        torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)
    for block in (Doubling(8, 1 / 2), DoublingCalls(8, 1 / 2)):
        net[1][0] = awake(block)
        graph = fx.symbolic_trace(net)
        assert_traced_inside(graph, x)
        torch.testing.assert_close(graph(x), net(x), rtol=1e-12, atol=1e-12)
    net = accelerated()
    inner = net[1][0].forward
    net[1][0].forward = lambda x: 2 * inner(x)
    expected, graph = net(x), fx.symbolic_trace(net)
    assert_traced_inside(graph, x)
    torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)


def test_hooks_that_come_later_run_once(random):
    net, x, seen = accelerated(), random(*SIZE), []
    graph = fx.symbolic_trace(net)
    net[1][0].register_forward_hook(lambda *_: seen.append("after"))
    net[1][0].register_full_backward_hook(lambda *_: seen.append("backward"))
    step(graph, x)
    assert seen == ["after", "backward"]


def test_a_proxy_without_a_model(random):
    """Passes write into a graph by a tracer that knows no modules."""
    block = accelerated()[1][0]
    graph = fx.Graph()
    x = fx.Proxy(graph.placeholder("x"))
    graph.output(block(x).node)
    assert len(graph.nodes) > 3 and not any(node.target == "1.0" for node in graph.nodes)
    assert fx.GraphModule(block, graph) is not None


@pytest.mark.filterwarnings("ignore")  # torch.ao announces its successor
def test_quantization_by_fx(random):
    """The block stays as it is, in floating point, and everything around it is quantized."""
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    net, x = accelerated().float().eval(), random(*SIZE, dtype=torch.float32)
    expected = net(x)
    prepared = quantize_fx.prepare_fx(net, get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    assert type(prepared.get_submodule("1.0")) is type(net[1][0])
    if "x86" in torch.backends.quantized.supported_engines:
        torch.testing.assert_close(quantize_fx.convert_fx(prepared)(x), expected, rtol=0.1, atol=0.1)


def test_our_own_blocks_are_nodes(random):
    x = random(2, 16, 5, 7)
    for block, operator in (
        (gc_cuda.ContextBlock(16, 1 / 4), "gc_cuda::global_context_kept"),
        (blocks.SEBlock(16), "gc_cuda::global_context_kept"),
        (blocks.SimplifiedNonLocalBlock(16), "gc_cuda::attention_pool"),
    ):
        net = awake(nn.Sequential(nn.Conv2d(16, 16, 1), block))
        graph = fx.symbolic_trace(net)
        assert calls(graph) == ["0", "1"]
        assert operator in operators(graph, x)
        assert_same(step(graph, x), step(net, x), 0)


def test_a_model_of_our_own_blocks(random):
    net = new_net()
    graph = fx.symbolic_trace(net)
    assert calls(graph) == ["stem", "first", "down", "second", "head"]
    x = random(2, 3, 10, 13, dtype=torch.float32)
    assert_same(step(graph, x), step(net, x), 0)
    for again in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(again(x), net(x))
    shapes = fx.passes.shape_prop.ShapeProp(graph)
    assert shapes.propagate(x).shape == (2, 5)
