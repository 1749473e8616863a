"""The end of a bottleneck as one operation: what it computes, and what accelerate leaves as it was.

Shown on doubles of torchvision's and mmdetection's bottlenecks; the real ones are in tests/integrations. When
a tail is not one operation is in test_tails_own_forward.py.
"""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest
import torch
from block_cases import Spy
from bottlenecks import MMDET, TORCHVISION, new_net
from small_steps import assert_same_steps, steps
from torch import nn
from torch.optim.swa_utils import AveragedModel

import gc_cuda

pytestmark = pytest.mark.usefixtures("frameworks")

SIZE = 2, 3, 9, 8
BOTH = pytest.mark.parametrize("framework", [TORCHVISION, MMDET], ids=lambda name: name.partition(".")[0])


def norm_eval(net):
    """As mmdetection's backbones: the model trains, its batch norms do not."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


MODES = {"training": nn.Module.train, "norm_eval": norm_eval, "evaluation": nn.Module.eval}


@BOTH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("pooling_type", "fusion_types"),
    [
        ("att", ("channel_add",)),
        ("att", ("channel_mul",)),
        ("att", ("channel_add", "channel_mul")),
        ("avg", ("channel_add",)),
        ("avg", ("channel_mul",)),
        ("avg", ("channel_add", "channel_mul")),
    ],
    ids=str,
)
def test_three_steps(random, framework, mode, pooling_type, fusion_types, layout, operations):
    """Outputs, gradients, parameters and running statistics are those of eager."""
    x = random(*SIZE, layout=layout)
    plain = new_net(framework, pooling_type, fusion_types)
    ours = copy.deepcopy(plain)
    assert gc_cuda.accelerate(ours).tails == ["1.0", "1.1"]
    for net in (plain, ours):
        MODES[mode](net)
    expected = steps(plain, x)
    assert operations.count == 0
    with Spy() as spy:
        actual = steps(ours, x)
    assert_same_steps(actual, expected)
    assert operations.count == 6
    assert spy.names().count("gc_cuda::bn_context_add_relu_backward") == 6
    assert not any("global_context" in name for name in spy.names())


def test_which_modules_train_is_seen_in_every_call(random, operations):
    """The norm's own flag counts; frozen parameters get no gradient."""
    plain = new_net()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    x, state = random(*SIZE), copy.deepcopy(plain.state_dict())

    def frozen(net):
        for bottleneck in net[1]:
            bottleneck.bn3.requires_grad_(False)
            bottleneck.bn3.momentum = 0.3
            bottleneck.bn3.eps = 0.01

    for change in (nn.Module.eval, nn.Module.train, norm_eval, nn.Module.train, frozen):
        for net in (plain, ours):
            net.load_state_dict(state)
            change(net)
        assert_same_steps(steps(ours, x), steps(plain, x))
    assert operations.count == 30


@BOTH
def test_nothing_but_the_class_changes(framework):
    net = new_net(framework).eval()
    bottleneck = net[1][0]
    kind = type(bottleneck)
    hook = bottleneck.register_forward_hook(lambda *_: None)
    before, objects = dict(vars(bottleneck)), [*net.modules(), *net.parameters(), *net.buffers()]
    keys = list(net.state_dict())
    gc_cuda.accelerate(net)
    assert type(bottleneck).__name__ == f"Accelerated{kind.__name__}" and isinstance(bottleneck, kind)
    assert vars(bottleneck) == before
    now = [*net.modules(), *net.parameters(), *net.buffers()]
    assert all(a is b for a, b in zip(now, objects)) and len(now) == len(objects)
    assert list(net.state_dict()) == keys
    assert hook.id in bottleneck._forward_hooks
    made = type(bottleneck)
    report = gc_cuda.accelerate(net)
    assert type(bottleneck) is made
    assert {entry.action for entry in report.entries} == {"accelerated before"}
    assert report.tails == ["1.0", "1.1"]
    gc_cuda.restore(net)
    assert type(bottleneck) is kind
    assert vars(bottleneck) == before


def test_tails_are_left_alone_where_they_are_not_wanted(random, operations):
    net = new_net()
    kinds = [type(module) for module in net.modules()]
    report = gc_cuda.accelerate(net, tails=False)
    assert report.entries == ()
    assert [type(module) for module in net.modules()] == kinds
    net(random(*SIZE))
    assert operations.count == 0
    gc_cuda.accelerate(net)
    gc_cuda.accelerate(net, tails=False)
    net(random(*SIZE))
    assert operations.count == 2


class OnCuda(torch.Tensor):
    """Says that it is on a GPU; is_cuda is all that the bottleneck's forward asks."""

    gc_cuda_served = True
    is_cuda = True


def test_tails_on_cuda_only_where_they_are_asked_for(random, operations, monkeypatch):
    """And where kernels serve them: their definition would be slower than the fused block."""
    x = random(2, 8, 7, 6)
    ours = copy.deepcopy(net := new_net())[1]
    expected = net[1](x)
    for tails, count in ((None, 0), (True, 2), (None, 2), (False, 2)):
        gc_cuda.accelerate(ours, tails=tails)
        for kernels in (False, True):
            monkeypatch.setattr("gc_cuda.models.tails.by_kernels", lambda _, there=kernels: there)
            operations.count = 0
            found = ours(x.as_subclass(OnCuda))
            assert operations.count == count * kernels, tails
            assert torch.allclose(found.as_subclass(torch.Tensor), expected)
        twin = pickle.loads(pickle.dumps(ours))
        assert [type(part) for part in twin] == [type(part) for part in ours]
    gc_cuda.restore(ours)
    assert [type(part) for part in ours] == [type(part) for part in net[1]]
    with pytest.raises(TypeError, match="tails must be True, False or None, got str"):
        gc_cuda.accelerate(ours, tails="yes")


def test_the_report():
    """Tails have entries of their own, apart from the blocks'."""
    net = nn.ModuleDict({"a": new_net(MMDET)[1][1], "b": new_net(MMDET)[1][1]})
    net["b"].relu = nn.SiLU()
    report = gc_cuda.accelerate(net)
    assert report.tails == ["a"] and report.tails_left_alone == {"b": "activation SiLU"}
    assert report.accelerated == [] and report.left_alone == {}
    assert str(report).splitlines() == [
        "name  class                                             what was done  reason",
        "----  ------------------------------------------------  -------------  ---------------",
        "a     tail of mmdet.models.backbones.resnet.Bottleneck  accelerated",
        "b     tail of mmdet.models.backbones.resnet.Bottleneck  left alone     activation SiLU",
        "1 of 2 tails run fused",
    ]


def test_a_bottleneck_without_a_block_is_no_tail(random):
    """Nor one that somebody else gave a block."""
    net = new_net()
    for bottleneck in net[1]:
        gc_cuda.restore(bottleneck)
        bottleneck.__class__ = type(bottleneck).__mro__[2]
    assert gc_cuda.accelerate(net).entries == ()
    for bottleneck in net[1]:
        del bottleneck.context_block
    assert gc_cuda.accelerate(net).entries == ()


# Copies


@BOTH
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "average"])
def test_copies_stay_accelerated_and_are_independent(random, framework, way, operations):
    net, x = new_net(framework), random(*SIZE)
    gc_cuda.accelerate(net)
    if way == "deepcopy":
        twin = copy.deepcopy(net)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(net))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        average = AveragedModel(net, use_buffers=True)
        average.update_parameters(net)
        twin = average.module
    assert [type(module) for module in twin.modules()] == [type(module) for module in net.modules()]
    assert_same_steps(steps(copy.deepcopy(twin), x), steps(copy.deepcopy(net), x), 0)
    assert operations.count == 12
    before = copy.deepcopy(net.state_dict())
    twin(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    gc_cuda.restore(twin)
    plain = new_net(framework)
    assert [type(module) for module in twin.modules()] == [type(module) for module in plain.modules()]
    assert_same_steps(steps(pickle.loads(pickle.dumps(twin)), x), steps(twin, x), 0)
    assert operations.count == 14


def test_checkpoints_pass_both_ways(random):
    plain, ours, x = new_net(), new_net(), random(*SIZE)
    gc_cuda.accelerate(ours)
    steps(plain, x)
    ours.load_state_dict(plain.state_dict(), strict=True)
    steps(ours, x)
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert_same_steps(steps(ours, x), steps(plain, x))


def test_a_bottleneck_can_die(random):
    """What is remembered of it keeps nothing alive."""
    net = new_net()
    gc_cuda.accelerate(net)
    net(random(*SIZE))
    gone = [weakref.ref(net[1][0]), weakref.ref(net[1][0].bn3)]
    del net
    assert [one() for one in gone] == [None, None]
