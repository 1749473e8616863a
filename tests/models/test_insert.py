"""insert at mmdetection's positions, on doubles of torchvision's and mmdetection's bottlenecks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from block_cases import Spy
from bottlenecks import CHANNELS, MMDET, MmdetBottleneck, TorchvisionBottleneck, downsampling
from inserted import POSITIONS, check_by_hand
from small_steps import assert_same_steps, steps
from torch import nn
from whole_models import awake

import gc_cuda
from gc_cuda.integrations import torchvision
from gc_cuda.models import swap

pytestmark = pytest.mark.usefixtures("frameworks")

KINDS = {"torchvision": TorchvisionBottleneck, "mmdetection": MmdetBottleneck}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def new_net(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(kind(8, downsampling(8)), kind(CHANNELS)))


def inserted(kind, *positions):
    net = new_net(kind)
    for i, position in enumerate(positions):
        # A layer norm of two hidden units has one answer, whose gradient is zero.
        gc_cuda.insert(net, ["1"], 1, position=position, postfix=i or "")
    return awake(net)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_position(random, kind, position):
    net = inserted(kind, position)
    channels = CHANNELS if position == "after_conv3" else CHANNELS // 4
    for bottleneck in net[1]:
        assert bottleneck.context_block.in_channels == channels
        assert [name for name, _ in bottleneck.named_children()][-1] == "context_block"
        check_by_hand(bottleneck, {position: "context_block"}, random(2, bottleneck.conv1.in_channels, 5, 6))


@pytest.mark.parametrize("position", POSITIONS)
def test_a_new_block_is_the_identity(random, kind, position):
    net, x = new_net(kind).double(), random(2, 3, 7, 8)
    expected, keys = net(x), list(net.state_dict())
    assert gc_cuda.insert(net, ["1"], 1 / 2, position=position) == ["1.0.context_block", "1.1.context_block"]
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert [key for key in net.state_dict() if ".context_block." not in key] == keys


@pytest.mark.parametrize(
    "positions", [("after_conv2", "after_conv3"), ("after_conv3", "after_conv2"), POSITIONS], ids=str
)
def test_several_positions_in_turn(random, kind, positions):
    """The name of a second block ends with the postfix."""
    net = inserted(kind, *positions)
    blocks = {one: f"context_block{i or ''}" for i, one in enumerate(positions)}
    check_by_hand(net[1][0], blocks, random(2, 8, 5, 6))
    assert len({type(bottleneck) for bottleneck in net[1]}) == 1
    assert swap.innermost(type(net[1][0])) is kind


@pytest.mark.parametrize("positions", [POSITIONS[:1], POSITIONS[1:2], POSITIONS], ids=str)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "strict load"])
def test_copies(random, kind, positions, way):
    net, x = inserted(kind, *positions), random(2, 3, 7, 8)
    if way == "strict load":
        twin = inserted(kind, *positions)
        nn.init.zeros_(twin[1][0].conv1.weight)
        twin.load_state_dict(net.state_dict(), strict=True)
    else:
        twin = copy.deepcopy(net) if way == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert [type(module) for module in twin.modules()] == [type(module) for module in net.modules()]
    assert_same_steps(steps(twin, x), steps(net, x), 0)


@pytest.mark.parametrize(
    ("positions", "tails"),
    [
        (POSITIONS[:1], []),
        (POSITIONS[1:2], []),
        (POSITIONS[1:], ["1.0", "1.1"]),
        (POSITIONS, ["1.0", "1.1"]),
    ],
    ids=str,
)
def test_accelerated_afterwards(random, operations, kind, positions, tails):
    """A block after conv3 makes a tail; the others run fused, each by itself."""
    plain, x = inserted(kind, *positions), random(2, 3, 7, 8)
    ours = copy.deepcopy(plain)
    report = gc_cuda.accelerate(ours)
    assert report.tails == tails and not report.left_alone and not report.tails_left_alone
    with Spy() as spy:
        ours(x)
    blocks = 2 * len(positions) - len(tails)
    assert spy.names().count("gc_cuda::global_context_kept") == blocks and operations.count == len(tails)
    ours.load_state_dict(plain.state_dict())  # the statistics
    assert_same_steps(steps(ours, x), steps(plain, x), 1e-7)
    gc_cuda.restore(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in plain.modules()]
    assert_same_steps(steps(ours, x), steps(plain, x), 1e-7)


@pytest.mark.parametrize("positions", [POSITIONS[:1], POSITIONS[1:]], ids=str)
def test_compiled_and_traced_by_fx(random, kind, positions):
    net, x = inserted(kind, *positions).eval(), random(2, 3, 7, 8)
    gc_cuda.accelerate(net)
    expected = net(x)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
    graph = torch.fx.symbolic_trace(net)
    assert "1.0.context_block" in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)


def test_what_is_taken(kind):
    net = inserted(kind, "after_conv2")
    keys = list(net.state_dict())
    for options, message in (
        ({"position": "after_conv2"}, "one block stands after_conv2"),
        ({"position": "after_conv2", "postfix": "2"}, "one block stands after_conv2"),
        ({}, "give the new block another name by a postfix"),
    ):
        with pytest.raises(ValueError, match=rf"1\.0\.context_block is taken by a ContextBlock: {message}"):
            gc_cuda.insert(net, ["1"], 1 / 2, **options)
    assert list(net.state_dict()) == keys
    gc_cuda.insert(net, ["1"], 1 / 2, postfix=2)
    gc_cuda.accelerate(net)
    with pytest.raises(
        ValueError, match=r"1\.0 is accelerated already: call gc_cuda\.restore\(model\), insert"
    ):
        gc_cuda.insert(net, ["1"], 1 / 2, position="after_conv1", postfix=3)
    gc_cuda.restore(net)
    assert gc_cuda.insert(net, ["1"], 1 / 2, position="after_conv1", postfix=3)[1] == "1.1.context_block3"


def test_one_that_is_taken_keeps_the_others_unchanged(kind):
    net = new_net(kind)
    gc_cuda.insert(net[1], ["1"], position="after_conv1", ratio=1 / 2)
    with pytest.raises(ValueError, match=r"1\.1\.context_block is taken"):
        gc_cuda.insert(net, ["1"], position="after_conv1", ratio=1 / 2)
    assert type(net[1][0]) is kind and not hasattr(net[1][0], "context_block")


def test_arguments(kind):
    net = new_net(kind)
    positions = r"\('after_conv1', 'after_conv2', 'after_conv3'\)"
    with pytest.raises(ValueError, match=rf"position must be one of {positions}, got 'after_conv4'"):
        gc_cuda.insert(net, ["1"], position="after_conv4")
    with pytest.raises(TypeError, match="postfix must be a string or an integer, got float"):
        gc_cuda.insert(net, ["1"], postfix=1.5)
    with pytest.raises(
        ValueError, match=r"postfix must be made of letters, digits and underscores, got 'a\.b'"
    ):
        gc_cuda.insert(net, ["1"], postfix="a.b")


def test_a_basic_block_is_refused():
    class BasicBlock(nn.Module):
        pass

    net = nn.ModuleDict({"layer2": nn.Sequential(BasicBlock())})
    with pytest.raises(ValueError, match="a BasicBlock has no place for a block: take a ResNet of 50 layers"):
        gc_cuda.insert(net, ["layer2"])


def test_plugins_of_mmdetections_own(random):
    """They stay, before a block of ours at another position; at one position there is one."""
    bottleneck = MmdetBottleneck(CHANNELS, after_conv2=[("gain", nn.Conv2d(4, 4, 1))])
    net = nn.ModuleDict({"layer2": nn.Sequential(bottleneck)})
    with pytest.raises(
        ValueError, match=r"layer2\.0\.gain is taken by a Conv2d: one block stands after_conv2"
    ):
        gc_cuda.insert(net, ["layer2"], position="after_conv2")
    assert gc_cuda.insert(net, ["layer2"], 1 / 2) == ["layer2.0.context_block"]
    assert bottleneck.after_conv2_plugin_names == ["gain"]
    assert bottleneck.after_conv3_plugin_names == ["context_block"]
    assert f"{type(bottleneck).__module__}.{type(bottleneck).__qualname__}" == f"{MMDET}.Bottleneck"


def test_a_bottleneck_that_an_older_version_made(random):
    """It has a block after conv3 and says nothing of plugins."""
    bottleneck = TorchvisionBottleneck(CHANNELS)
    bottleneck.context_block = gc_cuda.ContextBlock(CHANNELS, 1 / 2)
    old = swap.Derivation(TorchvisionBottleneck, "GC", torchvision._bottleneck_forward)
    bottleneck.__class__ = swap.derive(old)
    net, x = nn.ModuleDict({"layer2": nn.Sequential(bottleneck)}), random(2, CHANNELS, 5, 6)
    check_by_hand(bottleneck, {"after_conv3": "context_block"}, x)
    for postfix in ("", "2"):
        with pytest.raises(
            ValueError, match=r"layer2\.0\.context_block is taken by a ContextBlock: one block"
        ):
            gc_cuda.insert(net, ["layer2"], 1 / 2, postfix=postfix)
    gc_cuda.insert(net, ["layer2"], 1 / 2, position="after_conv1", postfix="2")
    check_by_hand(bottleneck, {"after_conv1": "context_block2", "after_conv3": "context_block"}, x)
