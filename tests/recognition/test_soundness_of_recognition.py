"""A recognised block obeys every later change, as its own class would."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from block_cases import Spy
from hand_written import BLOCKS, CHANNELS, HIDDEN, ECALayer, Residual
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from whole_models import FLOAT32_CONSTANT, assert_same, awake, step

import gc_cuda


def ours_in(spy):
    return {name for name in spy.names() if name.startswith("gc_cuda::")}


def net_of(name):
    torch.manual_seed(0)
    return awake(Residual(BLOCKS[name].make()))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class LoRALinear(nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Derived(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def forward_hook(block):
    block.squeeze.register_forward_hook(lambda module, args, out: 2 * out)


def forward_pre_hook(block):
    block.excite.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def backward_hook(block):
    block.excite.register_full_backward_hook(lambda module, grad_in, grad_out: (2 * grad_in[0],))


def hook_on_activation(block):
    block.nonlinear.register_forward_hook(lambda module, args, out: out + 1)


def hook_on_block(block):
    block.register_forward_hook(lambda module, args, out: 2 * out)


def pruning(block):
    prune.l1_unstructured(block.squeeze, "weight", 0.5)


def new_weight_norm(block):
    parametrizations.weight_norm(block.squeeze)
    with torch.no_grad():
        block.squeeze.parametrizations.weight.original0.mul_(3)


def old_weight_norm(block):
    nn.utils.weight_norm(block.squeeze)
    with torch.no_grad():
        block.squeeze.weight_g.mul_(3)


def parametrization(block):
    parametrize.register_parametrization(block.excite, "weight", Doubled())


def low_rank(block):
    torch.manual_seed(3)
    block.fc[0] = LoRALinear(block.fc[0])


def subclass_of_part(block):
    block.squeeze.__class__ = Derived


def put(name, make):
    return lambda block: setattr(block, name, make())


def put_at(name, index, make):
    return lambda block: getattr(block, name).__setitem__(index, make())


def option(path, name, value):
    return lambda block: setattr(block.get_submodule(path), name, value)


def scaled(path, factor=3.0):
    def change(block):
        with torch.no_grad():
            block.get_parameter(path).mul_(factor)

    return change


def new_parameter(block):
    block.squeeze.weight = nn.Parameter(-block.squeeze.weight.detach())


def without_bias(block):
    block.squeeze.bias = None


def new_statistics(block):
    block.middle[1].running_mean = torch.ones(HIDDEN, dtype=torch.float64)


def statistics_in_place(block):
    block.middle[1].running_var.fill_(7)


def conv():
    torch.manual_seed(5)
    return nn.Conv2d(CHANNELS, CHANNELS, 1).double()


CONVS, LINEAR, CONTEXT = "convolutions", "linear without bias", "context, attention, both, planes"
CHANGES = {
    "forward hook": (CONVS, forward_hook),
    "forward pre hook": (CONVS, forward_pre_hook),
    "backward hook": (CONVS, backward_hook),
    "hook on the activation": (CONVS, hook_on_activation),
    "hook on the block": (CONVS, hook_on_block),
    "pruning": (CONVS, pruning),
    "weight norm": (CONVS, new_weight_norm),
    "old weight norm": (CONVS, old_weight_norm),
    "parametrization": (CONVS, parametrization),
    "low-rank adapter": (LINEAR, low_rank),
    "class of a part": (CONVS, subclass_of_part),
    "activation": (CONVS, put("nonlinear", nn.Softplus)),
    "served activation": (CONVS, put("nonlinear", nn.SiLU)),
    "activation in a sequential": (LINEAR, put_at("fc", 1, nn.Hardswish)),
    "gate in a sequential": (LINEAR, put_at("fc", 3, nn.Hardsigmoid)),
    "longer sequential": (LINEAR, lambda block: block.fc.append(nn.Softplus())),
    "shorter sequential": (LINEAR, lambda block: block.fc.__delitem__(3)),
    "other pooling": (LINEAR, put("avg_pool", lambda: nn.AdaptiveMaxPool2d(1))),
    "own forward of a part": (
        CONVS,
        lambda block: setattr(block.nonlinear, "forward", torch.nn.functional.softplus),
    ),
    "own forward of the block": (CONVS, lambda block: setattr(block, "forward", lambda x: 2 * x)),
    "weight in place": (CONVS, scaled("squeeze.weight")),
    "weight as another object": (CONVS, new_parameter),
    "no bias any more": (CONVS, without_bias),
    "branch removed": (CONTEXT, put("channel_mul_conv", lambda: None)),
    "eps of the norm": (CONTEXT, option("channel_add_conv.1", "eps", 3.0)),
    "dimension of the softmax": (CONTEXT, option("softmax", "dim", 1)),
    "slope of the activation": ("leaky relu", option("nonlinear", "negative_slope", 0.7)),
    "approximation of the activation": ("gelu", option("nonlinear", "approximate", "tanh")),
    "statistics of the norm": ("batch norm", new_statistics),
    "statistics in place": ("batch norm", statistics_in_place),
    "eps of the batch norm": ("batch norm", option("middle.1", "eps", 3.0)),
    "a middle's hook": ("batch norm", lambda b: b.middle.register_forward_hook(lambda m, args, out: 2 * out)),
    "weight of ECA": ("convolution over channels", scaled("conv.weight")),
    "ECA that wraps around": (
        "convolution over channels",
        lambda block: setattr(block, "conv", wrapping(block.conv)),
    ),
    "one layer replaced": ("one layer", put("fc", conv)),
}


def wrapping(conv):
    other = nn.Conv1d(1, 1, 3, padding=1, bias=False, padding_mode="circular").double()
    other.load_state_dict(conv.state_dict())
    return other


def assert_equal_steps(ours, plain, x, relative=1e-10):
    """A change that makes a gradient zero but for roundings is measured by the largest of all."""
    actual, expected = (gradients_of(model, x) for model in (ours, plain))
    assert list(actual) == list(expected)
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for key, tensor in expected.items():
        error = float((actual[key] - tensor).abs().max())
        assert error <= relative * max(float(tensor.abs().max()), 1e-3 * largest), f"{key}: {error:.3g}"


def gradients_of(model, x):
    x = x.detach().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "gradient of x": x.grad, **gradients}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_obeyed(random, name):
    case, change = CHANGES[name]
    plain = net_of(case).eval()
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    assert gc_cuda.accelerate(ours).accelerated == ["attention"]
    before = gradients_of(ours, x)
    for model in (plain, ours):
        change(model.attention)
    expected = gradients_of(plain, x)
    same = list(expected) == list(before) and all(
        torch.allclose(tensor, before[key]) for key, tensor in expected.items()
    )
    assert not same, "the change matters"
    relative = FLOAT32_CONSTANT if any(isinstance(m, nn.Hardsigmoid) for m in ours.modules()) else 1e-10
    assert_equal_steps(ours, plain, x, relative)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_hook_on_every_part_runs(random, name):
    """Once per call, and not after it is removed: then the block is fused again."""
    net, x = net_of(name), random(2, 3, 9, 7)
    gc_cuda.accelerate(net)
    for path, part in list(net.attention.named_modules())[1:]:
        if isinstance(part, nn.Sequential) and not list(part.children()):
            continue
        seen = []
        handle = part.register_forward_hook(lambda *_, path=path, seen=seen: seen.append(path))
        net(x)
        assert seen == [path], path
        handle.remove()
        with Spy() as spy:
            net(x)
        assert seen == [path] and ours_in(spy), path


@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_on_all_modules_see_what_they_see_in_eager(random, name):
    plain = net_of(name)
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    gc_cuda.accelerate(ours)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(list(m._modules)))
    try:
        plain(x)
        expected, seen = seen, []
        ours(x)
    finally:
        handle.remove()
    assert seen == expected


@pytest.mark.parametrize("name", BLOCKS)
def test_functional_call(random, name):
    plain = net_of(name).eval()
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    gc_cuda.accelerate(ours)
    other = {key: 2 * tensor for key, tensor in plain.state_dict().items() if tensor.is_floating_point()}
    actual, expected = (torch.func.functional_call(model, other, (x,)) for model in (ours, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert_same(step(ours, x), step(plain, x), FLOAT32_CONSTANT)


@pytest.mark.parametrize("name", ["batch norm", "convolutions", "context, mean, mul"])
def test_training_flags_in_every_combination(random, name):
    """Also of a part alone, back and forth; running averages too."""
    plain = net_of(name)
    ours, x = copy.deepcopy(plain), random(3, 3, 9, 7)
    gc_cuda.accelerate(ours)
    for of_net, of_part in ((True, True), (True, False), (False, False), (False, True), (True, True)):
        for model in (plain, ours):
            model.train(of_net)
            list(model.attention.children())[-1].train(of_part)
        assert_equal_steps(ours, plain, x)
        for key, tensor in plain.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("frozen", ["weights", "block", "x"])
def test_frozen(random, name, frozen):
    plain = net_of(name).eval()
    for key, parameter in plain.named_parameters():
        parameter.requires_grad_(not (frozen == "block" or (frozen == "weights" and "weight" in key)))
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    gc_cuda.accelerate(ours)
    found = []
    for model in (ours, plain):
        given = x.clone().requires_grad_(frozen == "block")
        model(given).square().sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        found.append({"x": given.grad, **gradients})
    for key, expected in found[1].items():
        assert (expected is None) == (found[0][key] is None), key
        if expected is not None:
            torch.testing.assert_close(found[0][key], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Linear, nn.Sigmoid, nn.AdaptiveAvgPool2d, nn.Sequential])
def test_a_part_of_which_the_class_is_patched(random, monkeypatch, kind):
    own = kind.forward
    plain = net_of(LINEAR).eval()
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    gc_cuda.accelerate(ours)
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))
    before = ours(x)
    torch.testing.assert_close(before, plain(x), rtol=1e-10, atol=1e-10)
    monkeypatch.undo()
    assert not torch.allclose(plain(x), before)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-10, atol=1e-10)


def test_a_block_of_which_the_class_is_patched(random, monkeypatch):
    plain = net_of("convolution over channels").eval()
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    gc_cuda.accelerate(ours)
    monkeypatch.setattr(ECALayer, "forward", lambda self, x: 3 * x)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-10, atol=1e-10)


def test_call_of_all_modules_patched(random, monkeypatch):
    plain = net_of(CONVS).eval()
    ours, x, calls = copy.deepcopy(plain), random(2, 3, 9, 7), []
    gc_cuda.accelerate(ours)
    own = nn.Module.__call__

    @functools.wraps(own)
    def counting(self, *args, **kwargs):
        calls.append(type(self).__name__.removeprefix("Accelerated"))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", counting)
    plain(x)
    expected = calls.copy()
    calls.clear()
    ours(x)
    assert calls == expected
