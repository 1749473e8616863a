"""When a bottleneck is left alone, or runs its own forward although it is accelerated: as eager does."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
from bottlenecks import CHANNELS, MMDET, TORCHVISION, MmdetBottleneck, new_net
from small_steps import assert_same_steps, steps
from torch import nn
from torch.nn.utils import parametrize

import gc_cuda
from gc_cuda import reference

pytestmark = pytest.mark.usefixtures("frameworks")

SIZE = 2, 3, 9, 8


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class WithPooling(gc_cuda.ContextBlock):
    def spatial_pool(self, x):
        return x.amax((2, 3), keepdim=True)


def loud(module: nn.Module) -> Callable[..., Any]:
    """A forward for the instance, twice its class's."""
    return lambda *inputs: 2 * type(module).forward(module, *inputs)


def put(name: str, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(bottleneck):
        torch.manual_seed(5)
        setattr(bottleneck, name, make().double())

    return change


def another_plugin(bottleneck):
    """Into the list that is there already."""
    torch.manual_seed(5)
    bottleneck.add_module("other", nn.Conv2d(CHANNELS, CHANNELS, 1).double())
    bottleneck.after_conv3_plugin_names.append("other")


def without_statistics(bottleneck):
    bottleneck.bn3.running_mean = bottleneck.bn3.running_var = None


class Change(NamedTuple):
    """What is done to a bottleneck, and what the report says then."""

    do: Callable[[Any], object]
    reason: str
    framework: str = TORCHVISION


def attribute(path: str, value: Any) -> Callable[[Any], None]:
    def change(bottleneck):
        part, _, name = path.rpartition(".")
        setattr(bottleneck.get_submodule(part), name, value)

    return change


CHANGES = {
    "GroupNorm": Change(put("bn3", lambda: nn.GroupNorm(4, CHANNELS)), "norm GroupNorm"),
    "a norm of its own": Change(put("bn3", lambda: Doubling(CHANNELS)), "norm Doubling"),
    "parametrized norm": Change(
        lambda b: parametrize.register_parametrization(b.bn3, "weight", Halved()),
        "norm ParametrizedBatchNorm2d",
    ),
    "forward of the norm": Change(
        lambda b: setattr(b.bn3, "forward", loud(b.bn3)), "bn3 has a forward of its own"
    ),
    "momentum": Change(attribute("bn3.momentum", None), "bn3 averages its statistics over all batches"),
    "batch statistics": Change(
        attribute("bn3.track_running_stats", False), "bn3 tracks no running statistics"
    ),
    "batch statistics from the start": Change(
        put("bn3", lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False)),
        "bn3 tracks no running statistics",
    ),
    "activation": Change(put("relu", nn.SiLU), "activation SiLU"),
    "a kind of ReLU": Change(put("relu", nn.ReLU6), "activation ReLU6"),
    "forward of the activation": Change(
        lambda b: setattr(b.relu, "forward", loud(b.relu)), "relu has a forward of its own"
    ),
    "a kind of block": Change(
        put("context_block", lambda: WithPooling(CHANNELS, 1 / 4)),
        "WithPooling overrides spatial_pool of ContextBlock",
    ),
    "activation of the block": Change(
        lambda b: b.context_block.channel_add_conv.__setitem__(2, nn.GELU()), "activation GELU"
    ),
    "two plugins": Change(
        another_plugin, "there is more than one block before the addition: context_block, other", MMDET
    ),
    "forward_plugin": Change(
        lambda b: setattr(b, "forward_plugin", lambda x, names: x / 2),
        "the instance has a forward_plugin of its own",
        MMDET,
    ),
    **{
        f"{kind} on {part}": Change(
            lambda b, part=part, register=register: getattr(b.get_submodule(part), register)(lambda *_: None),
            f"{part.rpartition('.')[-1]} has a hook",
        )
        for kind, register, part in (
            ("hook", "register_forward_hook", "bn3"),
            ("hook before", "register_forward_pre_hook", "relu"),
            ("backward hook", "register_full_backward_hook", "context_block.conv_mask"),
            ("hook before backward", "register_full_backward_pre_hook", "context_block.softmax"),
        )
    },
}


@pytest.mark.parametrize("case", CHANGES)
def test_left_alone_with_a_reason(random, case, operations):
    change, reason, framework = CHANGES[case]
    net = new_net(framework)
    change(net[1][1])
    kind = type(net[1][1])
    report = gc_cuda.accelerate(net)
    assert report.tails == ["1.0"]
    assert report.tails_left_alone["1.1"].startswith(reason)
    assert type(net[1][1]) is kind
    net(random(*SIZE))
    assert operations.count == 1


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("eval_first", [False, True])
def test_changed_after_accelerate(random, case, eval_first, operations):
    change, _, framework = CHANGES[case]
    plain = new_net(framework).train(not eval_first)
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    x = random(*SIZE)
    with torch.no_grad():
        ours(x), plain(x)
    assert operations.count == 2
    for net in (plain, ours):
        change(net[1][1])
    assert_same_steps(steps(ours, x), steps(plain, x))
    assert operations.count == 2 + 3


def test_other_statistics_than_two(random, operations):
    """Where the buffers are None although they are to be tracked, those of the batch count."""
    plain = new_net()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    for net in (plain, ours):
        without_statistics(net[1][1])
    x = random(*SIZE)
    for mode in (True, False):
        assert_same_steps(steps(ours.train(mode), x), steps(plain.train(mode), x))


def test_a_hook_comes_and_goes(random, operations):
    net = new_net()
    gc_cuda.accelerate(net)
    seen = []
    for part in (net[1][1].bn3, net[1][1].context_block, net[1][1].relu):
        hook = part.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        net(random(*SIZE))
        hook.remove()
    assert seen == ["BatchNorm2d", "ContextBlock", "ReLU", "ReLU", "ReLU"]
    assert operations.count == 3
    net(random(*SIZE))
    assert operations.count == 5


def test_hooks_that_stay_out_of_the_tail(random, operations):
    """On the bottleneck, on the stem and on the downsampling they run, and the tail is one operation."""
    plain = new_net()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    x, logs = random(*SIZE), []
    for net in (plain, ours):
        log = []
        for path in ("", "conv1", "bn2", "conv3", "downsample", "downsample.1"):
            part = net[1][0].get_submodule(path)
            part.register_forward_pre_hook(lambda *_, log=log, path=path: log.append(("before", path)))
            part.register_forward_hook(lambda *_, log=log, path=path: log.append(("after", path)))
        net[1][0].register_full_backward_hook(lambda *_, log=log: log.append("backward"))
        net[1][0].conv3.register_forward_hook(lambda module, args, out: 3 * out)
        net[1][0].register_forward_hook(lambda module, args, out: 2 * out)
        logs.append(log)
    assert_same_steps(steps(ours, x), steps(plain, x))
    assert logs[0] == logs[1] and "backward" in logs[0]
    assert operations.count == 6


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
    ],
    ids=lambda register: register.__name__,
)
def test_hooks_on_all_modules(random, register, operations):
    net = new_net()
    gc_cuda.accelerate(net)
    seen = []
    hook = register(lambda module, *_: seen.append(module))
    try:
        net(random(*SIZE))
    finally:
        hook.remove()
    assert net[1][1].bn3 in seen and net[1][1].context_block.softmax in seen
    assert operations.count == 0


def test_what_was_replaced_in_a_class(random, monkeypatch, operations):
    """The forward of nn.BatchNorm2d, and that of mmdetection's bottleneck."""
    x = random(*SIZE)
    plain = new_net(MMDET).eval()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    norm, bottleneck = nn.BatchNorm2d.forward, MmdetBottleneck.forward
    for kind, other in (
        (nn.BatchNorm2d, lambda self, x: 2 * norm(self, x)),
        (MmdetBottleneck, lambda self, x: 2 * bottleneck(self, x)),
        (MmdetBottleneck, functools.wraps(bottleneck)(lambda self, x: 2 * bottleneck(self, x))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", other)
            assert torch.allclose(ours(x), plain(x), rtol=1e-12)
            assert operations.count == 0
            assert gc_cuda.accelerate(copy.deepcopy(plain)).tails == []
    ours(x)
    assert operations.count == 2


class Overriding(MmdetBottleneck):
    def forward(self, x):
        return super().forward(x) + 1


class WithNorm(MmdetBottleneck):
    norm3 = property(lambda self: nn.Identity())


class Derived(MmdetBottleneck):
    pass


def test_subclasses():
    def make(kind, block=gc_cuda.ContextBlock):
        return kind(CHANNELS, after_conv3=[("context_block", block(CHANNELS, 1 / 4))])

    net = nn.ModuleList([make(Overriding), make(WithNorm), make(Derived)])
    report = gc_cuda.accelerate(net)
    assert report.tails == ["2"]
    assert report.tails_left_alone == {
        "0": "Overriding overrides forward of Bottleneck",
        "1": "WithNorm overrides norm3 of Bottleneck",
    }
    assert isinstance(net[2], Derived)
    unknown = make(MmdetBottleneck, reference.ContextBlock)
    assert gc_cuda.accelerate(unknown).entries == ()
    unknown.forward = unknown.forward
    own = make(MmdetBottleneck)
    own.forward = own.forward
    assert gc_cuda.accelerate(own).tails_left_alone == {"": "the instance has a forward of its own"}


def test_a_bottleneck_that_is_built_differently():
    net = new_net(MMDET)
    del net[1][1].norm3_name
    assert gc_cuda.accelerate(net).tails == ["1.0"]


def test_insert_into_an_accelerated_model_says_that_the_place_is_taken():
    net = new_net()
    gc_cuda.accelerate(net)
    with pytest.raises(ValueError, match=r"1\.0\.context_block is taken by a ContextBlock"):
        gc_cuda.insert(net, ["1"])


def only_the_last(net):
    """The norms before the tail have given statistics."""
    for module in net.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.train(module is net[1][0].bn3 or module is net[1][1].bn3)


@pytest.mark.parametrize("convert_first", [False, True])
def test_converted_to_sync_batch_norm(random, tmp_path, operations, convert_first):
    """One operation without a process group; within one, what eager raises for tensors on the CPU."""
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(new_net())
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(new_net()) if convert_first else new_net()
    assert gc_cuda.accelerate(ours).tails == ["1.0", "1.1"]
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    x = random(*SIZE)
    assert_same_steps(steps(ours, x), steps(plain, x))
    assert operations.count == 6
    if not torch.distributed.is_available():
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for net in (plain, ours):
            with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
                net(x)
        assert operations.count == 6
        only_the_last(plain), only_the_last(ours)
        for net in (plain, ours):
            with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
                net(x)
        for name, tensor in plain.state_dict().items():
            assert "tracked" not in name or torch.equal(ours.state_dict()[name], tensor), name
        assert operations.count == 6
        assert_same_steps(steps(ours.eval(), x), steps(plain.eval(), x))
        assert operations.count == 12
    finally:
        torch.distributed.destroy_process_group()


# What only the tensors tell


def test_one_value_for_a_channel(random):
    """Eager refuses to train on it, after it has counted the batch."""
    plain = new_net()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    for net in (plain, ours):
        for module in net.modules():
            module.train(module is net[1][1].bn3)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            net(random(1, 3, 3, 3))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert ours[1][1].bn3.num_batches_tracked == 1


class Subclass(torch.Tensor):
    pass


def test_tensors_of_other_kinds(random, operations):
    """A subclass of Tensor, and what eager refuses, in its own words."""
    plain = new_net()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    x = random(*SIZE)
    out = ours(x.as_subclass(Subclass))
    assert type(out) is Subclass and operations.count == 0
    torch.testing.assert_close(out.as_subclass(torch.Tensor), plain(x), rtol=1e-12, atol=1e-12)
    for x in (
        random(*SIZE, dtype=torch.float32),
        random(2, 5, 9, 8),
        random(3, 9, 8),
        random(1, 3, 3, 3),
        "no tensor",
    ):
        messages = []
        for net in (plain, ours):
            with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
                net(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    assert all(
        torch.equal(tensor, plain.state_dict()[name])
        for name, tensor in ours.state_dict().items()
        if "tracked" in name
    )
    assert operations.count <= 1


@pytest.mark.parametrize(
    "downsample",
    [
        lambda x: x.mean((2, 3), keepdim=True).repeat(1, 2, 1, 1),
        lambda x: x.repeat(1, 2, 1, 1).as_subclass(Subclass),
        lambda x: x.repeat(1, 2, 1, 1).round().to(torch.int64).double(),
    ],
    ids=["broadcast", "subclass", "whole numbers"],
)
def test_other_identities(random, downsample, operations):
    class Downsample(nn.Module):
        def forward(self, x):
            return downsample(x)

    plain = new_net().eval()
    plain[1][0].downsample = Downsample()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    x = random(*SIZE)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-12, atol=1e-12)


def test_float_norms_in_a_half_model(random, operations):
    """What the operation takes and what not: a tail in float64 that has a norm in float32 raises as eager."""
    ours = new_net().bfloat16()
    for bottleneck in ours[1]:
        bottleneck.bn3.float()
    plain = copy.deepcopy(ours)
    gc_cuda.accelerate(ours)
    x = random(*SIZE, dtype=torch.bfloat16)
    actual, expected = steps(ours, x, 1), steps(plain, x, 1)
    assert operations.count == 2
    for name, tensor in expected[0].items():
        assert actual[0][name].dtype == tensor.dtype, name
    ours, plain = new_net(), new_net()
    gc_cuda.accelerate(ours)
    messages = []
    for net in (ours, plain):
        net[1][1].bn3.float()
        with pytest.raises(RuntimeError) as error:
            net(random(*SIZE))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
