"""Under torch.compile a block that pools by the mean runs its own forward: the compiler then keeps no more
than without gc_cuda. With attention, and as part of a tail, it stays an operator.
"""

from __future__ import annotations

import copy

import pytest
import torch
from block_cases import Spy
from bottlenecks import new_net
from gcnet_double import ContextBlock, gcnet  # noqa: F401 (a fixture of every test)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from whole_models import FUSIONS, POOLINGS, assert_same, awake, step

import gc_cuda
from gc_cuda import blocks

# What AOTAutograd's partitioner keeps is what Inductor keeps; no code is generated.
PARTITIONED = "aot_eager_decomp_partition"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Middle(nn.Sequential):
    """Where MobileNetV3, EfficientNet and RegNet have their blocks."""

    def __init__(self, block: nn.Module, act: nn.Module) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), act, block, nn.Conv2d(8, 4, 1))


def pair(pooling_type, fusion_types=("channel_mul",), act=None):
    """As its framework made it, and accelerated."""
    plain = awake(Middle(ContextBlock(8, 1 / 2, pooling_type, fusion_types), act or nn.SiLU()))
    ours = copy.deepcopy(plain)
    return plain, ours, gc_cuda.accelerate(ours)


def kept_bytes(model, x):
    """What autograd keeps, each storage once, parameters and buffers not."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved.setdefault(storage._cdata, storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in saved.values())


def operators_of(graphs):
    """Ours, wherever in the graphs."""
    modules = [module for graph in graphs for module in graph.modules() if hasattr(module, "graph")]
    targets = {str(node.target) for module in modules for node in module.graph.nodes}
    return {target for target in targets if "gc_cuda" in target}


@pytest.mark.parametrize("pooling_type", POOLINGS)
@pytest.mark.parametrize("fusion_types", FUSIONS, ids=str)
def test_one_graph_with_eager_results(random, pooling_type, fusion_types, layout):
    plain, ours, report = pair(pooling_type, fusion_types)
    x = random(2, 4, 7, 6, layout=layout)
    counter = CompileCounterWithBackend("aot_eager")
    assert_same(step(torch.compile(ours, backend=counter, fullgraph=True), x), prefixed(step(plain, x)))
    left = pooling_type == "avg"
    assert report.left_to_the_compiler == (["3"] if left else [])
    assert bool(operators_of(counter.graphs)) is not left
    with Spy() as spy:
        ours(x)
    assert "gc_cuda::global_context_kept" in spy.names(), "fused without the compiler"


def prefixed(results):
    return {
        name if " " in name or name == "output" else f"_orig_mod.{name}": r for name, r in results.items()
    }


@pytest.mark.parametrize("pooling_type", POOLINGS)
@pytest.mark.parametrize("fusion_types", FUSIONS, ids=str)
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Hardswish])
def test_no_more_is_kept_than_without_us(random, pooling_type, fusion_types, act):
    plain, ours, _ = pair(pooling_type, fusion_types, act())
    x = random(2, 4, 24, 24)
    of_map = 2 * x.nbytes
    of_plain, of_ours = (
        kept_bytes(torch.compile(net, backend=PARTITIONED, fullgraph=True), x) for net in (plain, ours)
    )
    assert of_ours <= of_plain + of_map / 20, "more than vectors of channels"


def test_inductor_keeps_no_more(random):
    """The same through the backend that people use, in training steps."""
    plain, ours, _ = pair("avg")
    x = random(2, 4, 24, 24)
    compiled = [torch.compile(net, fullgraph=True, dynamic=False) for net in (plain, ours)]
    kept = [kept_bytes(net, x) for net in compiled]
    assert kept[1] == kept[0]
    assert_same(step(compiled[1], x), prefixed(step(copy.deepcopy(ours), x)), 1e-9)


def test_a_tail_stays_an_operator_and_keeps_no_more(random, frameworks):
    """Of a bare tail the compiler keeps a mask of the ReLU in place of out, as of PyTorch's own."""
    plain = new_net(pooling_type="avg", fusion_types=("channel_mul",))
    ours = copy.deepcopy(plain)
    assert len(gc_cuda.accelerate(ours).tails) == 2
    x = random(2, 3, 24, 24)
    counter = CompileCounterWithBackend(PARTITIONED)
    kept = []
    for net, backend in ((plain, PARTITIONED), (ours, counter)):
        torch.compiler.reset()
        kept.append(kept_bytes(torch.compile(net[1], backend=backend, fullgraph=True), net[0](x).detach()))
    of_map = net[1](net[0](x)).nbytes
    assert kept[1] <= kept[0] + of_map / 20
    assert any("bn_context_add_relu" in name for name in operators_of(counter.graphs))


@pytest.mark.parametrize(
    "make", [lambda: blocks.SEBlock(8), lambda: gc_cuda.ContextBlock(8, 1 / 2, "avg", ["channel_mul"])]
)
def test_our_own_blocks_are_left_to_it_too(random, make):
    """What does not fit is said in our words all the same."""
    block = make().double()
    x = random(2, 8, 7, 6)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-12, atol=1e-12)
    assert operators_of(counter.graphs) == set()
    with pytest.raises(Exception, match="x must be"):
        torch.compile(make(), backend="eager")(x)


def test_the_report_says_so():
    nets = nn.ModuleList([pair("avg")[0], pair("att")[0]])
    report = gc_cuda.accelerate(nets)
    assert report.accelerated == ["0.3", "1.3"] and report.left_to_the_compiler == ["0.3"]
    first, _, *rows, _ = str(report).splitlines()
    assert first.endswith("under torch.compile")
    assert [row.endswith("its own forward") for row in rows] == [True, False]
    assert gc_cuda.accelerate(nets).left_to_the_compiler == ["0.3"], "said again"
    del nets[1]
    gc_cuda.restore(nets)
    nets[0][3].spatial_pool = lambda x: x
    assert gc_cuda.accelerate(nets).left_to_the_compiler == []
