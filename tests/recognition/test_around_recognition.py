"""What recognition leaves behind, which is nothing, and what else PyTorch does with a recognised block."""

from __future__ import annotations

import copy
import random as random_of_python
import warnings

import numpy as np
import pytest
import torch
from block_cases import Spy
from hand_written import BLOCKS, CHANNELS, ECALayer, FunctionalSE, LinearSE, NormedSE, Residual
from near_misses import NEAR_MISSES
from torch import nn
from whole_models import FLOAT32_CONSTANT, assert_same, awake, step

import gc_cuda

SOME = ["context, attention, both, planes", "linear without bias", "batch norm", "convolution over channels"]


def net_of(name):
    torch.manual_seed(0)
    return awake(Residual(BLOCKS[name].make()))


def ours_in(spy):
    return {name for name in spy.names() if name.startswith("gc_cuda::")}


def state_of_everything():
    return [
        torch.get_rng_state().tolist(),
        random_of_python.getstate(),
        [np.asarray(one).tolist() for one in np.random.get_state()],
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        len(warnings.filters),
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*BLOCKS, *NEAR_MISSES])
def test_no_trace(random, name, training):
    """Not in the model, its gradients and flags, nor in any random state or mode."""
    torch.manual_seed(0)
    net = awake(Residual((BLOCKS | NEAR_MISSES)[name].make())).train(training)
    net(random(2, 3, 7, 7)).sum().backward()
    net.attention.eval()  # flags that differ
    before = [
        {key: (id(p), p._version, p.clone(), p.grad.clone()) for key, p in net.named_parameters()},
        {key: (id(b), b._version, b.clone()) for key, b in net.named_buffers()},
        {key: (module.training, list(vars(module))) for key, module in net.named_modules()},
    ]
    states = state_of_everything()
    gc_cuda.accelerate(net)
    assert state_of_everything() == states
    for now, then in zip((dict(net.named_parameters()), dict(net.named_buffers())), before):
        assert list(now) == list(then)
        for key, (identity, version, value, *grad) in then.items():
            assert id(now[key]) == identity and now[key]._version == version, key
            assert torch.equal(now[key], value), key
            assert not grad or torch.equal(now[key].grad, grad[0]), key
    assert {key: (m.training, list(vars(m))) for key, m in net.named_modules()} == before[2]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "float64", "meta", "autocast"])
def test_recognised_under_any_mode(random, name, way):
    """Where accelerate is called does not matter."""
    plain = net_of(name).eval()
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    modes = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "meta": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    if way == "float64":
        torch.set_default_dtype(torch.float64)
        try:
            report = gc_cuda.accelerate(ours)
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with modes[way]():
            report = gc_cuda.accelerate(ours)
    assert report.accelerated == ["attention"], str(report)
    assert_same(step(ours, x), step(plain, x), FLOAT32_CONSTANT)


@pytest.mark.parametrize("name", BLOCKS)
def test_meta_model(name):
    """As large models are built: recognised there, and it stays so with numbers."""
    with torch.device("meta"):
        net = Residual(BLOCKS[name].make()).eval()
        assert gc_cuda.accelerate(net).accelerated == ["attention"]
        assert net(torch.empty(2, 3, 8, 8)).shape == (2, 4, 8, 8)
    filled = net_of(name).eval().float()
    net.load_state_dict(filled.state_dict(), assign=True)
    x = torch.randn(2, 3, 8, 8)
    with Spy() as spy:
        out = net(x)
    assert ours_in(spy)
    torch.testing.assert_close(out, filled(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_half(random, name, dtype):
    plain = net_of(name).eval().to(dtype)
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7).to(dtype)
    assert gc_cuda.accelerate(ours).accelerated == ["attention"]
    actual, expected = ours(x), plain(x)
    assert actual.dtype == expected.dtype == dtype
    units = torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * units)


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_autocast(random, name, inputs):
    """The dtype of the output is eager's, and of the gradients."""
    plain = BLOCKS[name].make().eval()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    found, values = [], random(2, CHANNELS, 9, 7).to(inputs)
    for block in (ours, plain):
        x = values.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        out.float().square().sum().backward()
        found.append((out, x.grad, *(p.grad for p in block.parameters())))
    for actual, expected in zip(*found):
        assert actual.dtype == expected.dtype


def test_twice(random):
    net = net_of("batch norm")
    gc_cuda.accelerate(net)
    kind, expected = type(net.attention), step(net.eval(), random(2, 3, 8, 8))
    report = gc_cuda.accelerate(net)
    assert type(net.attention) is kind and report.accelerated == ["attention"]
    assert report.entries[0].action == "accelerated before"
    assert expected["output"].isfinite().all()
    gc_cuda.restore(net)
    assert type(net.attention) is NormedSE
    assert gc_cuda.accelerate(net).accelerated == ["attention"]
    assert type(net.attention) is kind


def test_one_class_in_two_structures(random):
    """A trace of one is not taken for the other."""
    torch.manual_seed(0)
    plain = awake(nn.Sequential(LinearSE(), LinearSE(), LinearSE(reduction=2))).eval()
    plain[1].fc[1] = nn.Tanh()
    plain[2].fc[3] = nn.Softplus()
    ours, x = copy.deepcopy(plain), random(2, CHANNELS, 6, 6)
    assert gc_cuda.accelerate(ours).accelerated == ["0", "1", "2"]
    assert_same(step(ours, x), step(plain, x))


def test_a_subclass_is_looked_at_by_itself(random):
    class Doubling(FunctionalSE):
        def forward(self, x):
            return 2 * super().forward(x)

    class Same(FunctionalSE):
        pass

    net = nn.Sequential(Same(), Doubling())
    report = gc_cuda.accelerate(net)
    assert report.accelerated == ["0"] and list(report.left_alone) == ["1"]


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled(random, name):
    """Equal results in one graph, in training and evaluation."""
    torch.compiler.reset()
    plain = net_of(name)
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    gc_cuda.accelerate(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for training in (False, True):
        plain.train(training)
        ours.train(training)
        given = [x.clone().requires_grad_() for _ in range(2)]
        out = [model(one) for model, one in zip((compiled, plain), given)]
        torch.testing.assert_close(*out, rtol=1e-9, atol=1e-9)
        for one in out:
            one.square().mean().backward()
        torch.testing.assert_close(*(one.grad for one in given), rtol=1e-6, atol=1e-8)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", BLOCKS)
def test_what_leaves_python_is_plain_pytorch(random, name):
    net, x = net_of(name).eval(), random(2, 3, 9, 7)
    expected = net(x)
    gc_cuda.accelerate(net)
    traced = torch.jit.trace(net, (x,), check_trace=False)
    assert "gc_cuda" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected, rtol=1e-10, atol=1e-10)
    exported = torch.export.export(net, (x,), strict=False)
    assert "gc_cuda" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SOME)
def test_transforms_of_functions(random, name):
    """vmap and jvp run the block's own forward."""
    plain = BLOCKS[name].make().double().eval()
    ours, x = copy.deepcopy(plain), random(2, CHANNELS, 5, 6)
    gc_cuda.accelerate(ours)
    for transform in (
        lambda block: torch.func.jvp(block, (x,), (x.cos(),))[1],
        lambda block: torch.func.grad(lambda t: block(t).square().sum())(x),
        lambda block: torch.func.vmap(lambda one: block(one[None])[0])(x),
    ):
        torch.testing.assert_close(transform(ours), transform(plain), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_odd_inputs(random, name):
    """One pixel, an empty batch, strides; what does not fit is refused in PyTorch's words."""
    plain = net_of(name).attention.eval()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    sizes = (2, CHANNELS, 1, 1), (0, CHANNELS, 4, 4), (1, CHANNELS, 199, 3)
    strided = random(2, CHANNELS, 12, 14)[:, :, ::2, 1::2]
    for x in (*(random(*size) for size in sizes), strided):
        expected = outcome(plain, x)
        if isinstance(expected, torch.Tensor):  # a view may want other strides, or more than nothing
            torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)
    for wrong in (random(2, CHANNELS - 1, 4, 4), random(2, CHANNELS, 4, 4).float(), random(CHANNELS), "x"):
        actual, expected = outcome(ours, wrong), outcome(plain, wrong)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        else:
            assert actual == expected


def outcome(block, x):
    try:
        return block(x)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize(("layout", "least"), [("nchw", 3_000_000), ("channels_last", 1_500_000)])
def test_small_maps_are_the_modules_own(monkeypatch, layout, least):
    """Where a training step gains nothing, and without gradients, the own forward runs."""
    monkeypatch.undo()
    block = ECALayer()
    gc_cuda.accelerate(block)
    memory_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
    enough = -(-least // 64)  # of 64 bytes
    for pixels, fused in ((enough, True), (enough - 1, False)):
        x = torch.ones(1, 16, 1, pixels).to(memory_format=memory_format).requires_grad_()
        with Spy() as spy:
            block(x)
        assert ("gc_cuda::pixel_sum" in spy.names()) == fused
        with torch.no_grad(), Spy() as spy:
            block(x)
        assert "gc_cuda::pixel_sum" not in spy.names()


def test_an_unpickled_block_within_a_dispatch_mode(random):
    """It is not traced there, where the mode would see it; its own forward runs."""
    from gc_cuda.recognition import blocks

    block, x = awake(ECALayer()), random(2, 16, 5, 6)
    gc_cuda.accelerate(block)
    expected = block(x)
    blocks._judged.clear()
    blocks._verdicts.clear()
    twin = copy.deepcopy(block)
    with Spy() as spy:
        torch.testing.assert_close(twin(x.requires_grad_()), expected)
    assert "gc_cuda::pixel_sum" not in spy.names() and not blocks._verdicts
    twin(x)
    with Spy() as spy:
        twin(x)
    assert "gc_cuda::pixel_sum" in spy.names()
