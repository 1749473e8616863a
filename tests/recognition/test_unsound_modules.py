"""What a look at a module cannot show is not served: it is left alone, or obeyed in every call."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
import unsound
from hand_written import Residual
from unsound import UNSOUND
from whole_models import awake, step

import gc_cuda

# A word of the reason
REASONS = {
    "random numbers": "rand",
    "random numbers of Python": "random",
    "global counter": "CALLS",
    "written attribute": "last",
    "written list": "seen",
    "written buffer": "calls",
    "width": "size",
    "batch size": "size",
    "environment": "os",
    "item": "item",
    "tensor as condition": "",  # in PyTorch's words
    "no_grad inside": "grad",
    "in place": "mul_",
    "another precision": "",
    "mode of autograd": "grad",
}


@pytest.mark.parametrize("name", UNSOUND)
def test_left_alone(random, name):
    """With a reason, and without a trace: accelerate has not called it where that can be seen."""
    make = UNSOUND[name]
    torch.manual_seed(0)
    net = awake(Residual(make()))
    twin, x = copy.deepcopy(net), random(2, 3, 9, 7)
    before, state = copy.deepcopy(vars(net.attention)), copy.deepcopy(net.state_dict())
    report = gc_cuda.accelerate(net)
    assert type(net.attention) is make
    assert list(report.left_alone) == ["attention"], str(report)
    assert REASONS[name] in report.left_alone["attention"]
    assert list(vars(net.attention)) == list(before)
    assert getattr(net.attention, "seen", []) == [] and getattr(net.attention, "last", None) is None
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    results = []
    for model in (net, twin):
        torch.manual_seed(1)
        results.append(step(model, x))
    assert all(torch.equal(results[0][key], tensor) for key, tensor in results[1].items())


def test_a_second_input_is_no_block():
    """In no entry, or with a reason."""
    block = unsound.TwoInputsSE()
    report = gc_cuda.accelerate(block)
    assert not report.accelerated and type(block) is unsound.TwoInputsSE


def set_global(monkeypatch, net):
    monkeypatch.setattr(unsound, "FACTOR", 3.0)


def set_setting(monkeypatch, net):
    monkeypatch.setitem(unsound.SETTINGS, "factor", 3.0)


def set_function(monkeypatch, net):
    monkeypatch.setattr(unsound, "gate_of", torch.tanh)


def set_code(monkeypatch, net):
    def other(t):
        return torch.tanh(t)

    monkeypatch.setattr(unsound.gate_of, "__code__", other.__code__)


def set_default(monkeypatch, net):
    monkeypatch.setattr(unsound.default_of, "__defaults__", ({"factor": 3.0},))


def change_default(monkeypatch, net):
    monkeypatch.setitem(unsound.default_of.__defaults__[0], "factor", 3.0)


def without_relu(block, pooled):
    return torch.sigmoid(block.fc2(block.fc1(pooled)))


def set_helper(monkeypatch, net):
    net.attention.scale = functools.partial(without_relu, net.attention)


def set_attribute(name, value):
    return lambda monkeypatch, net: setattr(net.attention, name, value)


CHANGES = {
    "global": (unsound.GlobalSE, set_global),
    "global dictionary": (unsound.SettingsSE, set_setting),
    "global function": (unsound.GlobalFunctionSE, set_function),
    "code of a global function": (unsound.GlobalFunctionSE, set_code),
    "default": (unsound.DefaultSE, set_default),
    "default in place": (unsound.DefaultSE, change_default),
    "constant default": (
        unsound.ConstantDefaultSE,
        lambda monkeypatch, net: monkeypatch.setattr(unsound.times_default, "__defaults__", (3.0,)),
    ),
    "global module": (
        unsound.GlobalModuleSE,
        lambda monkeypatch, net: monkeypatch.setattr(unsound.ACT, "negative_slope", -1.0),
    ),
    "module in a tuple": (
        unsound.TupleSE,
        lambda monkeypatch, net: setattr(net.attention.acts[0], "negative_slope", -1.0),
    ),
    "global of the instance's function": (unsound.UnderscoreSE, set_global),
    "global of a function in a tuple": (unsound.FunctionsSE, set_global),
    "global of another class's function": (unsound.OtherClassSE, set_global),
    "attribute": (unsound.AttributeSE, set_attribute("factor", 3.0)),
    "attribute of another type": (unsound.AttributeSE, set_attribute("factor", torch.tensor(3.0))),
    "attribute over the class's": (unsound.AttributeSE, set_attribute("of_class", 3.0)),
    "attribute of the class": (
        unsound.AttributeSE,
        lambda monkeypatch, net: monkeypatch.setattr(unsound.AttributeSE, "of_class", 3.0),
    ),
    "attribute in a dictionary": (
        unsound.AttributeSE,
        lambda monkeypatch, net: net.attention.options.update(factor=3.0),
    ),
    "attribute behind a property": (unsound.AttributeSE, set_attribute("_behind", 3.0)),
    "property": (
        unsound.AttributeSE,
        lambda monkeypatch, net: monkeypatch.setattr(unsound.AttributeSE, "behind", property(lambda _: 3.0)),
    ),
    "buffer": (unsound.BufferReadingSE, set_attribute("factor", torch.full((), 3.0))),
    "buffer in place": (unsound.BufferReadingSE, lambda monkeypatch, net: net.attention.factor.fill_(3.0)),
    "helper of the class": (
        unsound.GlobalSE,
        lambda monkeypatch, net: monkeypatch.setattr(unsound.GlobalSE, "scale", without_relu),
    ),
    "helper of the instance": (unsound.GlobalSE, set_helper),
    "helper of a base class": (
        unsound.GlobalSE,
        lambda monkeypatch, net: monkeypatch.setattr(unsound.TwoConvs, "scale", without_relu),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_obeyed(random, monkeypatch, name):
    make, change = CHANGES[name]
    torch.manual_seed(0)
    plain = awake(Residual(make())).eval()
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    gc_cuda.accelerate(ours)
    before = step(ours, x)
    for model in (plain, ours):
        change(monkeypatch, model)
    expected = step(plain, x)
    assert not torch.allclose(expected["output"], before["output"]), "the change matters"
    actual = step(ours, x)
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-10, atol=1e-10)


def test_a_changed_variable_of_a_closure_is_obeyed(random):
    make, change = unsound.closed_over()
    plain = awake(Residual(make())).eval()
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    gc_cuda.accelerate(ours)
    before = ours(x)
    change(3.0)
    assert not torch.allclose(plain(x), before)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-10, atol=1e-10)


def test_what_a_part_has_is_obeyed(random, monkeypatch):
    """The block's code reads an attribute, and a property, of a part, whose own code does not."""
    plain = awake(Residual(unsound.OuterSE())).eval()
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    assert gc_cuda.accelerate(ours).accelerated == ["attention"]
    before = ours(x)
    for net in (plain, ours):
        net.attention.inner.factor = 3.0
    assert not torch.allclose(plain(x), before)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(unsound.Inner, "halved", property(lambda self: 5.0), raising=False)
    report = gc_cuda.accelerate(Residual(unsound.OuterOfPropertySE()))
    assert "halved of the class Inner, a property" in report.left_alone["attention"]


def test_the_code_of_a_layer_on_top_of_a_torch_layer_is_read(random):
    """Its forward is PyTorch's, and calls a method of its own."""
    net = Residual(unsound.ScaledConvSE())
    reason = gc_cuda.accelerate(net).left_alone["attention"]
    assert "SETTINGS" in reason
    plain = awake(Residual(unsound.TripledConvSE()))
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    assert "its own mul conv2d" in gc_cuda.accelerate(ours).entries[0].formula
    for name, expected in step(plain, x).items():
        torch.testing.assert_close(step(ours, x)[name], expected, rtol=1e-9, atol=1e-9)


def test_changed_defaults_are_obeyed(random, monkeypatch):
    plain = awake(Residual(unsound.NumberDefaultSE())).eval()
    ours, x = copy.deepcopy(plain), random(2, 3, 9, 7)
    assert gc_cuda.accelerate(ours).accelerated == ["attention"]
    before = ours(x)
    monkeypatch.setattr(unsound.times, "__defaults__", (3.0,))
    assert not torch.allclose(plain(x), before)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-10, atol=1e-10)


def test_nothing_is_kept_of_what_is_left_alone():
    """Not by the reason either, whose traceback would have the module."""
    block = unsound.RememberingSE()
    assert gc_cuda.accelerate(block).left_alone
    kept = weakref.ref(block)
    del block
    gc.collect()
    assert kept() is None
