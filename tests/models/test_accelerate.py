"""accelerate changes the class of a block and nothing else, and leaves alone what it cannot serve.

The mechanism is shown on a double of GCNet's block; the real ones of mmcv, timm and torchvision have files of
their own.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from block_cases import Spy
from gcnet_double import MODULE, ContextBlock, gcnet  # noqa: F401 (a fixture of every test)
from torch import nn
from whole_models import assert_same, awake, step

import gc_cuda
from gc_cuda import _extension


def model(**options):
    torch.manual_seed(0)
    block = ContextBlock(8, 1 / 2, **options)
    return awake(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(block, nn.ReLU())))


@pytest.mark.parametrize("pooling_type", ["att", "avg"])
@pytest.mark.parametrize(
    "fusion_types", [("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")], ids=str
)
def test_same_results(random, pooling_type, fusion_types, layout):
    net = model(pooling_type=pooling_type, fusion_types=fusion_types)
    x = random(2, 3, 9, 8, layout=layout)
    expected = step(net, x)
    report = gc_cuda.accelerate(net)
    assert report.accelerated == ["1.0"]
    with Spy() as spy:
        out = net(x)
    assert "gc_cuda::global_context_kept" in spy.names()
    assert torch.equal(out, net(x))
    assert_same(step(net, x), expected)


def test_nothing_but_the_class_changes():
    net = model().eval()
    block = net[1][0]
    hook = block.register_forward_hook(lambda *_: None)
    before, objects = dict(vars(block)), [*net.modules(), *net.parameters()]
    keys = list(net.state_dict())
    gc_cuda.accelerate(net)
    assert vars(block) == before
    assert all(a is b for a, b in zip([*net.modules(), *net.parameters()], objects))
    assert list(net.state_dict()) == keys
    assert isinstance(block, ContextBlock)
    assert not block.training
    assert hook.id in block._forward_hooks
    gc_cuda.restore(net)
    assert type(block) is ContextBlock
    assert vars(block) == before


def test_hooks_of_the_block_run(random):
    net = model()
    seen = []
    net[1][0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    net[1][0].register_forward_hook(lambda module, args, out: seen.append("after"))
    net[1][0].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    gc_cuda.accelerate(net)
    step(net, random(1, 3, 5, 5))
    assert seen == ["before", "after", "backward"]


def test_twice_is_once_and_restore_of_nothing_is_nothing(random):
    net = model()
    gc_cuda.restore(net)
    gc_cuda.accelerate(net)
    kind = type(net[1][0])
    report = gc_cuda.accelerate(net)
    assert type(net[1][0]) is kind
    assert report.entries[0].action == "accelerated before"
    assert report.accelerated == ["1.0"]
    gc_cuda.restore(net)
    gc_cuda.restore(net)
    assert type(net[1][0]) is ContextBlock


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_accelerated_and_are_independent(random, way):
    net = model()
    gc_cuda.accelerate(net)
    if way == "deepcopy":
        twin = copy.deepcopy(net)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(net, protocol=pickle.HIGHEST_PROTOCOL))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = random(2, 3, 7, 7)
    assert type(twin[1][0]) is type(net[1][0])
    assert torch.equal(twin(x), net(x))
    before = net(x)
    nn.init.zeros_(twin[1][0].channel_add_conv[3].weight)
    assert torch.equal(net(x), before)
    assert not torch.equal(twin(x), before)
    gc_cuda.restore(twin)
    assert type(twin[1][0]) is ContextBlock


def test_a_block_is_a_model():
    block = ContextBlock(8, 1 / 2)
    assert gc_cuda.accelerate(block).accelerated == [""]
    assert type(block).__name__ == "AcceleratedContextBlock"


def test_shared_block_counts_once():
    block = ContextBlock(8, 1 / 2)
    assert gc_cuda.accelerate(nn.ModuleList([block, block])).accelerated == ["0"]


def test_checkpoints_pass_both_ways(random):
    plain, fused = model(), model()
    gc_cuda.accelerate(fused)
    nn.init.normal_(plain[1][0].conv_mask.weight)
    fused.load_state_dict(plain.state_dict(), strict=True)
    x = random(2, 3, 7, 7)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    plain.load_state_dict(fused.state_dict(), strict=True)


class Derived(ContextBlock):
    pass


class WithForward(ContextBlock):
    def forward(self, x):
        return super().forward(x) + 1


class WithPooling(ContextBlock):
    def spatial_pool(self, x):
        return x.amax((2, 3), keepdim=True)


def test_a_subclass_that_computes_the_same_is_served(random):
    block = Derived(8, 1 / 2)
    assert gc_cuda.accelerate(block).accelerated == [""]
    assert isinstance(block, Derived)
    gc_cuda.restore(block)
    assert type(block) is Derived


def changed(change):
    block = ContextBlock(8, 1 / 2)
    change(block)
    return block


def set_part(index, module):
    return lambda block: block.channel_add_conv.__setitem__(index, module)


LEFT_ALONE = {
    "forward": (WithForward(8, 1 / 2), "WithForward overrides forward of ContextBlock"),
    "pooling": (WithPooling(8, 1 / 2), "WithPooling overrides spatial_pool of ContextBlock"),
    "own forward": (
        changed(lambda b: setattr(b, "forward", lambda x: x)),
        "the instance has a forward of its own",
    ),
    "activation": (changed(set_part(2, nn.GELU())), "activation GELU"),
    "another activation": (changed(set_part(2, nn.SiLU())), "activation SiLU"),
    "norm": (changed(set_part(1, nn.BatchNorm2d(4))), "norm BatchNorm2d"),
    "norm without weight": (
        changed(set_part(1, nn.LayerNorm([4, 1, 1], elementwise_affine=False))),
        "channel_add_conv.1 has no weight or no bias",
    ),
    "no bias": (changed(set_part(0, nn.Conv2d(8, 4, 1, bias=False))), "channel_add_conv.0 has no bias"),
    "groups": (
        changed(set_part(0, nn.Conv2d(8, 4, 1, groups=2))),
        "channel_add_conv.0 is no plain 1x1 convolution",
    ),
    "linear": (changed(set_part(0, nn.Linear(8, 4))), "channel_add_conv.0 is a Linear, not a Conv2d"),
    "hook": (changed(lambda b: b.conv_mask.register_forward_hook(print)), "conv_mask has a hook"),
    "old weight norm": (
        changed(lambda b: nn.utils.weight_norm(b.channel_add_conv[3])),
        "channel_add_conv.3 has a hook",
    ),
    "another structure": (changed(lambda b: delattr(b, "softmax")), "it is built differently: "),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_with_a_reason(case):
    block, reason = LEFT_ALONE[case]
    kind = type(block)
    report = gc_cuda.accelerate(nn.ModuleDict({"block": block}))
    assert report.accelerated == []
    assert report.left_alone["block"].startswith(reason)
    assert type(block) is kind


def test_two_different_eps_are_left_alone():
    block = ContextBlock(8, 1 / 2, "att", ("channel_add", "channel_mul"))
    block.channel_mul_conv[1].eps = 1e-3
    assert gc_cuda.accelerate(block).left_alone[""] == "its norms have different eps, [1e-05, 0.001]"
    block.channel_add_conv[1].eps = 1e-3
    assert gc_cuda.accelerate(block).accelerated == [""]


def test_changes_after_accelerate_are_seen(random):
    """What is not served any more runs by the block's own forward; parametrizations stay served."""
    net = model()
    gc_cuda.accelerate(net)
    block, x = net[1][0], random(2, 3, 7, 7)

    def operators():
        with Spy() as spy:
            net(x)
        return "gc_cuda::global_context_kept" in spy.names()

    nn.utils.parametrizations.weight_norm(block.channel_add_conv[0])
    assert operators()
    seen = []
    hook = block.conv_mask.register_forward_hook(lambda *_: seen.append(1))
    expected = net(x)
    assert seen == [1]
    hook.remove()
    assert operators()
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    block.channel_add_conv[2] = nn.GELU()
    assert not operators()


def test_the_report_prints_as_a_table():
    report = gc_cuda.accelerate(
        nn.ModuleDict({"good": ContextBlock(8, 1 / 2), "bad": changed(set_part(2, nn.GELU()))})
    )
    assert str(report).splitlines() == [
        "name  class                                     what was done  reason",
        "----  ----------------------------------------  -------------  ---------------",
        f"good  {MODULE}.ContextBlock  accelerated",
        f"bad   {MODULE}.ContextBlock  left alone     activation GELU",
        "1 of 2 blocks run fused",
    ]
    assert "no global context" in str(gc_cuda.accelerate(nn.ReLU()))


def test_what_runs_by_the_own_forward(random):
    """A trace of torch.jit is one of PyTorch's own operators; it goes where gc_cuda is not."""
    net = model().eval()
    x = random(1, 3, 7, 7)
    gc_cuda.accelerate(net)
    traced = torch.jit.trace(net, x)
    assert "gc_cuda::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-12, atol=1e-12)


def test_transforms_of_torch_func(random):
    """They need more of an autograd.Function, and get the block's own forward."""
    net = model()
    parameters = dict(net.named_parameters())
    x = random(2, 3, 7, 7)

    def loss(parameters):
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    expected = torch.func.grad(loss)(parameters)
    gc_cuda.accelerate(net)
    for name, gradient in torch.func.grad(loss)(parameters).items():
        assert torch.equal(gradient, expected[name])


def test_compiles_as_one_graph(random):
    net = model()
    x = random(2, 3, 7, 7)
    expected = step(net, x)
    gc_cuda.accelerate(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    actual = step(compiled, x)
    actual = {name.removeprefix("_orig_mod."): tensor for name, tensor in actual.items()}
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtype_of_the_original(random, dtype):
    net = model().float()
    x = random(2, 3, 7, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        expected = net(x)
        gc_cuda.accelerate(net)
        out = net(x)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


@pytest.mark.skipif(_extension.has_cuda(), reason="this build has the CUDA kernels")
def test_a_model_on_a_gpu_needs_the_cuda_kernels(monkeypatch):
    net = model()
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    with pytest.raises(ImportError, match=r"FORCE_CUDA=1 \./compile\.sh"):
        gc_cuda.accelerate(net)
    assert type(net[1][0]) is ContextBlock


def test_importing_gc_cuda_imports_no_framework():
    program = """
import sys, gc_cuda
print([name for name in ("mmcv", "mmengine", "mmdet", "timm", "torchvision") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_signature_of_forward_stays(random):
    """A call by keyword, and what inspects the forward."""
    block = ContextBlock(8, 1 / 2).double()
    before, x = inspect.signature(block.forward), random(2, 8, 3, 4)
    gc_cuda.accelerate(block)
    assert inspect.signature(block.forward) == before
    with Spy() as spy:
        out = block(x=x)
    assert "gc_cuda::global_context_kept" in spy.names()
    assert torch.equal(out, block(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        block(y=x)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        block()


@pytest.mark.parametrize("channels", [4, 16])
def test_an_x_of_other_channels_gets_the_error_of_the_block(random, channels):
    net = model()
    x = random(2, channels, 5, 5)
    with pytest.raises(RuntimeError) as theirs:
        net[1][0](x)
    gc_cuda.accelerate(net)
    with pytest.raises(RuntimeError) as ours:
        net[1][0](x)
    assert str(ours.value) == str(theirs.value)


def test_what_the_operator_does_not_take_runs_as_before(random):
    """A last convolution of one channel broadcasts in PyTorch."""
    net = model()
    net[1][0].channel_add_conv[3] = nn.Conv2d(4, 1, 1).double()
    x = random(2, 3, 7, 7)
    expected = net(x)
    gc_cuda.accelerate(net)
    assert torch.equal(net(x), expected)


def test_one_compilation_for_blocks_of_one_kind(random):
    """The guard of a block asks nothing that differs between two of the same shape."""
    blocks = [awake(ContextBlock(8, 1 / 2)) for _ in range(4)]
    for block in blocks:
        gc_cuda.accelerate(block)
    x, compiled = random(2, 8, 5, 5), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    run = torch.compile(lambda block, x: block(x), backend=backend, fullgraph=True)
    for block in blocks:
        torch.testing.assert_close(run(block, x), block(x), rtol=1e-12, atol=1e-12)
    assert len(compiled) == 1


def test_a_block_can_die(random):
    """What is remembered of it keeps nothing alive."""
    block = awake(ContextBlock(8, 1 / 2))
    gc_cuda.accelerate(block)
    block(random(2, 8, 5, 5))
    gone = weakref.ref(block)
    del block
    assert gone() is None


def test_the_own_forward_gets_the_x_that_was_given(random):
    """Under autocast to the other half type, where the fused form takes x in float32."""
    net = model().float()
    gc_cuda.accelerate(net)
    seen = []
    net[1][0].conv_mask.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net[1][0](random(2, 8, 5, 5, dtype=torch.float16))
    assert seen == [torch.float16]


def test_a_part_that_lost_what_such_a_part_has(random):
    """The block's own forward runs, and says what it says."""
    net = model()
    gc_cuda.accelerate(net)
    del net[1][0].softmax
    with pytest.raises(AttributeError, match="softmax"):
        net(random(2, 3, 7, 7))
