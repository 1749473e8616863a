"""accelerate(recompute=True): the middle of a residual block keeps its convolution's output alone.

Shown on a double of torchvision's RegNet; the real models are in tests/integrations.
"""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
from block_cases import Spy
from small_steps import assert_same_steps, steps
from torch import nn
from whole_models import awake

import gc_cuda
from gc_cuda.models import middles

MISC, REGNET = "torchvision.ops.misc", "torchvision.models.regnet"


class Conv2dNormActivation(nn.Sequential):
    def __init__(self, channels, out, act):
        modules = [nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)]
        super().__init__(*modules, *([] if act is None else [act]))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Sigmoid()

    def _scale(self, x):
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))

    def forward(self, x):
        return self._scale(x) * x


class BottleneckTransform(nn.Sequential):
    def __init__(self, act):
        modules = Conv2dNormActivation(8, 6, nn.ReLU()), Conv2dNormActivation(6, 6, act)
        super().__init__(*modules, SqueezeExcitation(6, 3), Conv2dNormActivation(6, 8, None))


for kind, module in ((Conv2dNormActivation, MISC), (SqueezeExcitation, MISC), (BottleneckTransform, REGNET)):
    kind.__module__ = module


@pytest.fixture(autouse=True)
def torchvision(monkeypatch):
    """As if it were installed."""
    for module in (MISC, REGNET):
        for dots in range(module.count(".") + 1):
            name = ".".join(module.split(".")[: dots + 1])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for kind in (Conv2dNormActivation, SqueezeExcitation, BottleneckTransform):
        setattr(sys.modules[kind.__module__], kind.__name__, kind)


@pytest.fixture
def operations(monkeypatch):
    """How often a middle was one operation."""
    calls, run = [], middles.bn_act_context

    def counting(*arguments):
        calls.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(middles, "bn_act_context", counting)
    return calls


ACTS = {"relu": lambda: nn.ReLU(inplace=True), "silu": nn.SiLU, "hardswish": nn.Hardswish}
SIZE = 2, 3, 6, 5


def new_net(act="silu"):
    torch.manual_seed(0)
    blocks = [BottleneckTransform(ACTS[act]()) for _ in range(2)]
    return awake(nn.Sequential(nn.Conv2d(3, 8, 1), *blocks))


def recomputed(net):
    ours = copy.deepcopy(net)
    assert gc_cuda.accelerate(ours, recompute=True).middles == ["1", "2"]
    return ours


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("training", [True, False])
def test_three_steps(random, act, training, layout, operations):
    """Outputs, gradients, parameters and running statistics are those of eager."""
    plain, x = new_net(act).train(training), random(*SIZE, layout=layout)
    ours = recomputed(plain)
    expected = steps(plain, x)
    with Spy() as spy:
        actual = steps(ours, x)
    assert_same_steps(actual, expected)
    assert len(operations) == 6
    assert spy.names().count("gc_cuda::global_context_backward") == 6


def kept_maps(net, x):
    """In maps of the middles, of which there are two, without parameters."""
    own = {one.untyped_storage()._cdata for one in [*net.parameters(), *net.buffers()]}
    saved = {}

    def pack(tensor):
        saved.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    count = sum(storage.nbytes() for key, storage in saved.items() if key not in own)
    return count / (x.shape[0] * 6 * x.shape[2] * x.shape[3] * 8)


@pytest.mark.parametrize(("act", "fewer"), [("relu", 1), ("silu", 2), ("hardswish", 2)])
def test_less_is_kept(random, act, fewer):
    plain, x = new_net(act), random(2, 3, 40, 40)
    block_only = copy.deepcopy(plain)
    gc_cuda.accelerate(block_only)
    counts = [kept_maps(net, x) for net in (plain, block_only, recomputed(plain))]
    assert counts[0] - counts[2] == pytest.approx(2 * fewer, abs=0.1)
    assert counts[1] - counts[2] == pytest.approx(2 * fewer, abs=0.1)


def _with_hook(name):
    return lambda net: net[1].get_submodule(name).register_forward_hook(lambda *_: None)


OWN_FORWARD = {
    "hook on the norm": _with_hook("1.1"),
    "hook on the activation": _with_hook("1.2"),
    "hook on what holds both": _with_hook("1"),
    "hook on a part of the block": _with_hook("2.fc1"),
    "another activation": lambda net: net[1][1].__setitem__(2, nn.GELU()),
    "another norm": lambda net: net[1][1].__setitem__(1, nn.GroupNorm(2, 6).double()),
    "statistics of several processes": lambda net: net[1][1].__setitem__(1, nn.SyncBatchNorm(6).double()),
    "no running statistics": lambda net: setattr(net[1][1][1], "track_running_stats", False),
    "no momentum": lambda net: setattr(net[1][1][1], "momentum", None),
    "another block": lambda net: net[1].__setitem__(2, nn.Identity()),
}


@pytest.mark.parametrize("change", OWN_FORWARD)
def test_what_is_changed_later_runs_its_own_forward(random, change, operations):
    plain, x = new_net(), random(*SIZE)
    ours = recomputed(plain)
    for net in (plain, ours):
        OWN_FORWARD[change](net)
    assert_same_steps(steps(ours, x), steps(plain, x))
    assert len(operations) == 3, "the other one's"


def test_hooks_outside_of_the_middle_run(random, operations):
    net, seen = recomputed(new_net()), []
    for name in ("1", "1.0", "1.1.0", "1.3"):
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    net(random(*SIZE)).sum().backward()
    assert seen == ["1.0", "1.1.0", "1.3", "1"]
    assert len(operations) == 2


def test_its_own_forward_runs_where_nothing_would_be_gained(random, operations):
    net, x = recomputed(new_net()), random(*SIZE)
    with torch.no_grad():
        net(x)
    with torch.autocast("cpu", torch.bfloat16):
        net.float()(x.float())
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    compiled(x.float()).sum().backward()
    torch.compiler.reset()
    net.bfloat16()(x.bfloat16())
    assert operations == []
    net.float()(x.float())
    assert len(operations) == 2


def test_one_value_per_channel_is_eagers_error(operations):
    plain = new_net()
    for net in (plain, recomputed(plain)):
        net[1][0].eval()
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            net(torch.zeros(1, 3, 1, 1).double())
        assert int(net[1][1][1].num_batches_tracked) == 1, "PyTorch counts before it looks"
    assert operations == []


def test_copies_and_restore(random):
    net, x = new_net(), random(*SIZE)
    ours = recomputed(net)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(one) for one in twin.modules()] == [type(one) for one in ours.modules()]
        assert_same_steps(steps(twin, x), steps(copy.deepcopy(ours), x), 0)
    again = gc_cuda.accelerate(ours, recompute=True)
    assert {entry.action for entry in again.entries} == {"accelerated before"}
    gc_cuda.restore(ours)
    assert [type(one) for one in ours.modules()] == [type(one) for one in net.modules()]


def test_the_report():
    net = new_net()
    assert gc_cuda.accelerate(copy.deepcopy(net)).middles == []
    net[2][1][2] = nn.GELU()
    report = gc_cuda.accelerate(net, recompute=True)
    assert report.middles == ["1"] and report.middles_left_alone == {"2": "activation GELU"}
    assert report.accelerated == ["1.2", "2.2"]
    assert f"middle of {REGNET}.BottleneckTransform" in str(report)
    assert str(report).endswith("2 of 2 blocks run fused\n1 of 2 middles are computed again")
