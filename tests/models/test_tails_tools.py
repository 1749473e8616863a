"""What PyTorch users do to a model with tails: checkpointing, autocast, half types, torch.compile, exporters,
torch.func.
"""

from __future__ import annotations

import copy
import functools
import importlib.util

import pytest
import torch
from block_cases import Spy
from bottlenecks import MMDET, TORCHVISION, new_net
from small_steps import assert_same_steps, steps
from torch.utils import checkpoint

import gc_cuda

pytestmark = pytest.mark.usefixtures("frameworks")

SIZE = 2, 3, 9, 8
BOTH = pytest.mark.parametrize("framework", [TORCHVISION, MMDET], ids=lambda name: name.partition(".")[0])


def two(framework=TORCHVISION, **options):
    """A model and its accelerated twin."""
    plain = new_net(framework, **options)
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    return plain, ours


# Recomputation


@pytest.fixture(params=[True, False], ids=["reentrant", "not reentrant"])
def reentrant(request, monkeypatch):
    """mmdetection does not say which."""
    original = checkpoint.checkpoint

    @functools.wraps(original)
    def chosen(*arguments, **options):
        return original(*arguments, **{"use_reentrant": request.param, **options})

    monkeypatch.setattr(checkpoint, "checkpoint", chosen)


def test_with_cp(random, reentrant, operations):
    """mmdetection's: statistics move in the recomputation, too, and gradients are those of eager."""
    plain, ours = two(MMDET, with_cp=True)
    x = random(*SIZE)
    assert_same_steps(steps(ours, x), steps(plain, x))
    assert operations.count == 12
    assert ours[1][0].bn3.num_batches_tracked == 6
    with torch.no_grad():
        ours(x)
    assert ours[1][0].bn3.num_batches_tracked == 7


def test_with_cp_and_a_hook(random, reentrant, operations):
    plain, ours = two(MMDET, with_cp=True)
    for net in (plain, ours):
        net[1][0].bn3.register_forward_hook(lambda module, args, out: out * 2)
    x = random(*SIZE)
    assert_same_steps(steps(ours, x), steps(plain, x))
    assert operations.count == 6


def without_blocks(net):
    """The same without blocks."""
    for bottleneck in net[1]:
        bottleneck.context_block = torch.nn.Identity()
    return net


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_what_is_kept_is_what_a_bottleneck_without_a_block_keeps(framework, training):
    """But for small vectors and one number a pixel; eager keeps the block's input, too, and much more."""
    plain, ours = (net.train(training) for net in two(framework))
    x = random_of((2, 3, 34, 34)).requires_grad_()
    eager, out = kept_bytes(plain, x)
    actual, _ = kept_bytes(ours, x)
    bare, _ = kept_bytes(without_blocks(plain), x)
    one_map = out.numel() * out.element_size()
    assert actual < bare + one_map / 4
    assert eager > bare + one_map


def kept_bytes(net, x):
    """What autograd keeps of a forward pass, without parameters and buffers."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), *net.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x)
    return sum(storage.nbytes() for storage in kept.values()), out


def test_with_cp_keeps_no_more_than_eager(random, reentrant):
    plain, ours = two(MMDET, with_cp=True)
    x = random(*SIZE, grad=True)
    eager, _out = kept_bytes(plain, x)
    assert kept_bytes(ours, x)[0] <= eager


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_around_a_bottleneck(random, use_reentrant, operations):
    results = []
    for net in two():
        x = random_of(SIZE)
        inner = net[0](x)
        out = checkpoint.checkpoint(net[1], inner, use_reentrant=use_reentrant)
        out.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        results.append([{"output": out.detach(), **{f"gradient of {n}": g for n, g in gradients.items()}}])
        results[-1][0] |= {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert_same_steps(results[1], results[0])
    assert operations.count == 4


def random_of(size, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=dtype)


# Dtypes


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(framework, dtype, operations):
    plain, ours = two(framework)
    x = random_of(SIZE, torch.float32)
    found = []
    for net in (plain.float(), ours.float()):
        with torch.autocast("cpu", dtype):
            found.append(steps(net, x, 1)[0])
    expected, actual = found
    assert operations.count == 2
    assert_close(actual, expected, 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_model(dtype, operations):
    plain, ours = (net.to(dtype) for net in two())
    x = random_of(SIZE, dtype)
    actual, expected = steps(ours, x, 1)[0], steps(plain, x, 1)[0]
    assert operations.count == 2
    assert_close(actual, expected, 0.1)


def assert_close(actual, expected, relative):
    """Dtypes are the same, and values as near as half types give them."""
    assert list(actual) == list(expected)
    for name, truth in expected.items():
        assert actual[name].dtype == truth.dtype, name
        if name == "output" or "running" in name:
            error = (actual[name].double() - truth.double()).abs().max()
            assert error <= relative * truth.double().abs().max(), name


def test_on_meta(operations):
    net = new_net().to("meta")
    gc_cuda.accelerate(net)
    out = net(torch.empty(SIZE, dtype=torch.float64, device="meta"))
    out.sum().backward()
    assert operations.count == 2 and out.shape == (2, 16, 7, 6)


# The compiler


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(framework, training, operations, fresh_compiler):
    plain, ours = (net.train(training) for net in two(framework))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = random_of(SIZE)
    actual = [
        {name.replace("_orig_mod.", ""): tensor for name, tensor in step.items()}
        for step in steps(compiled, x)
    ]
    assert_same_steps(actual, steps(plain, x))
    assert operations.count >= 2


def test_compiles_with_cp(fresh_compiler):
    """Statistics move as often as in the compiled original."""
    found = []
    for net in two(MMDET, with_cp=True):
        torch.compiler.reset()
        compiled = torch.compile(net, backend="aot_eager")
        x = random_of(SIZE).requires_grad_()
        out = compiled(x)
        out.square().sum().backward()
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        found.append([{"output": out.detach(), "gradient of x": x.grad, **state}])
    assert_same_steps(found[1], found[0])


def test_one_compilation_for_equal_bottlenecks(fresh_compiler):
    """The guards ask nothing that differs between two of the same shape."""
    bottlenecks = [two()[1][1][1] for _ in range(4)]
    x, compiled = random_of((2, 16, 5, 6)), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    run = torch.compile(lambda bottleneck, x: bottleneck(x), backend=backend, fullgraph=True)
    for bottleneck in bottlenecks:
        twin = copy.deepcopy(bottleneck)
        torch.testing.assert_close(run(bottleneck, x), twin(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(bottleneck.bn3.running_var, twin.bn3.running_var)
    assert len(compiled) == 1


# A model that leaves Python


def assert_plain(names):
    assert names and not any("gc_cuda" in name for name in names), names


@BOTH
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(framework, strict, operations):
    plain, ours = (net.eval() for net in two(framework))
    x = random_of(SIZE)
    program = torch.export.export(ours, (x,), strict=strict)
    assert_plain({str(node.target) for node in program.graph.nodes if node.op == "call_function"})
    torch.testing.assert_close(program.module()(x), plain(x), rtol=1e-12, atol=1e-12)
    assert operations.count == 0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jit_trace():
    plain, ours = (net.eval() for net in two())
    x = random_of(SIZE)
    traced = torch.jit.trace(ours, x)
    assert "gc_cuda::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="an accelerated Bottleneck: restore the model first"):
        torch.jit.script(ours)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")),
    reason="onnx or onnxscript is not installed",
)
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.filterwarnings("ignore")  # of the exporters, about themselves
def test_onnx(dynamo, tmp_path):
    import onnx

    _, ours = two()
    path = str(tmp_path / "net.onnx")
    options = {"verbose": False} if dynamo else {}
    torch.onnx.export(ours.eval().float(), (random_of(SIZE, torch.float32),), path, dynamo=dynamo, **options)
    model = onnx.load(path)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}


def test_torch_fx_traces_a_bottleneck_with_its_block_as_a_node_unless_it_is_a_leaf(operations):
    plain, ours = (net.eval() for net in two())
    x = random_of(SIZE)
    kinds = {type(ours.get_submodule(name)) for name in gc_cuda.accelerate(ours).tails}

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return type(module) in kinds or super().is_leaf_module(module, name)

    for tracer, count, node in (
        (torch.fx.Tracer(), 0, "1.0.context_block"),
        (torch.fx.Tracer(), 0, "1.0.relu"),
        (Leaves(), 2, "1.0"),
    ):
        traced = torch.fx.GraphModule(ours, tracer.trace(ours))
        assert node in [one.target for one in traced.graph.nodes]
        torch.testing.assert_close(traced(x), plain(x), rtol=1e-12, atol=1e-12)
        assert operations.count == count


def test_efficient_conv_bn_eval_of_mmengine(operations):
    """It gives an instance a forward that computes conv3 and bn3 as one."""
    pytest.importorskip("mmengine")
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval

    plain, ours = (net.eval() for net in two())
    x = random_of(SIZE)
    expected = plain(x)
    turn_on_efficient_conv_bn_eval(ours, ["1"])
    with Spy() as spy:
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    assert operations.count == 0
    assert not any("batch_norm" in name for name in spy.names())
    gc_cuda.restore(ours)
    assert gc_cuda.accelerate(ours).tails == ["1.0", "1.1"]
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    assert operations.count == 0


# Transforms


def test_transforms_of_torch_func(operations):
    plain, ours = (net.eval() for net in two())
    x = random_of(SIZE)

    def loss(net, parameters, x):
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    found = []
    for net in (plain, ours):
        parameters = dict(net.named_parameters())
        gradients = torch.func.grad(functools.partial(loss, net))(parameters, x)
        rows = torch.func.vmap(lambda one, net=net: net(one[None]))(x)
        found.append([*gradients.values(), rows])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert operations.count == 0


def test_second_derivatives(operations):
    """They move no statistic."""
    found = []
    for net in two():
        x = random_of(SIZE).requires_grad_()
        (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        state = copy.deepcopy(net.state_dict())
        first.square().sum().backward()
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
        found.append(x.grad)
    assert operations.count == 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8 * float(found[0].abs().max()))
