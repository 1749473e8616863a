"""Where only plain PyTorch serves, the operations are plain PyTorch; who watches sees nothing else change."""

from __future__ import annotations

import copy
import itertools
from typing import ClassVar

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from block_cases import Spy
from gcnet_double import ContextBlock as TheirBlock
from gcnet_double import gcnet  # noqa: F401 (a fixture of every test)
from process_group import end_process_group
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from whole_models import awake

import gc_cuda
from gc_cuda import Transform, blocks, reference

SIZE = (2, 8, 3, 4)


def accelerated():
    net = nn.Sequential(TheirBlock(8, 1 / 2, fusion_types=("channel_add", "channel_mul")))
    assert gc_cuda.accelerate(net).accelerated == ["0"]
    return net


MODULES = {
    "block": lambda: gc_cuda.ContextBlock(8, 1 / 2, fusion_types=("channel_add", "channel_mul")),
    "average": lambda: gc_cuda.ContextBlock(8, 1 / 2, "avg"),
    "squeeze-excite": lambda: blocks.SEBlock(8, 4),
    "simplified": lambda: blocks.SimplifiedNonLocalBlock(8),
    "accelerated": accelerated,
}


@pytest.fixture(params=MODULES)
def module(request):
    return awake(MODULES[request.param]())


def plain(call):
    """The same computed by plain PyTorch: a hook on every part makes a block call them."""
    twin = copy.deepcopy(call)
    for part in twin.modules():
        if not list(part.children()):
            part.register_forward_hook(lambda *_: None)
    return twin


def functions(random):
    """Every public function with its other arguments, of x alone."""
    n, c, h, w = SIZE
    logits, weight, scale = random(n, h * w), random(c), random(n, c)
    branch = Transform(random(4, c), random(4), random(4), random(4), random(c, 4), random(c))
    return {
        "softmax_pool": lambda where, x: where.softmax_pool(x, logits),
        "attention_pool": lambda where, x: where.attention_pool(x, weight),
        "average_pool": lambda where, x: where.average_pool(x),
        "broadcast_add": lambda where, x: where.broadcast_add(x, scale),
        "broadcast_mul": lambda where, x: where.broadcast_mul(x, scale),
        "broadcast_mul_add": lambda where, x: where.broadcast_mul_add(x, scale, scale),
        "global_context": lambda where, x: where.global_context(x, weight, None, branch, branch),
        "global_context avg": lambda where, x: where.global_context(x, add=branch, pooling_type="avg"),
    }


NAMES = list(functions(lambda *size: torch.empty(*size)))


@pytest.fixture(params=NAMES)
def function(request, random):
    call = functions(random)[request.param]
    return lambda x: call(gc_cuda, x), lambda x: call(reference, x)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# Forward-mode AD outside of torch.func


def tangent_of(call, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent


def test_forward_mode_of_a_module(module, random):
    x, tangent = random(*SIZE), random(*SIZE)
    close(tangent_of(module, x, tangent), tangent_of(plain(module), x, tangent))


def test_forward_mode_of_a_function(function, random):
    ours, theirs = function
    x, tangent = random(*SIZE), random(*SIZE)
    close(tangent_of(ours, x, tangent), tangent_of(theirs, x, tangent))


def test_forward_over_reverse(module, random):
    """The tangent of a gradient: a Hessian-vector product. The forward pass was made within the level."""
    x, tangent = random(*SIZE), random(*SIZE)

    def gradient(call):
        return lambda x: torch.autograd.grad(call(x).square().sum(), x, create_graph=True)[0]

    close(
        tangent_of(gradient(module), x.clone().requires_grad_(), tangent),
        tangent_of(gradient(plain(module)), x.clone().requires_grad_(), tangent),
    )


def test_a_gradient_with_a_tangent(module, random):
    """The forward pass was made before the level; the backward pass is linear in the gradient."""
    x, grad, tangent = random(*SIZE, grad=True), random(*SIZE), random(*SIZE)
    out = module(x)
    with forward_ad.dual_level():
        (of_x,) = torch.autograd.grad(out, x, forward_ad.make_dual(grad, tangent), retain_graph=True)
        actual = forward_ad.unpack_dual(of_x).tangent
    close(actual, torch.autograd.grad(out, x, tangent)[0])


def test_parameters_with_tangents(random):
    block = awake(gc_cuda.ContextBlock(8, 1 / 2))
    x, twin = random(*SIZE), reference.ContextBlock(8, 1 / 2).double()
    twin.load_state_dict(block.state_dict())
    tangents = [random(*parameter.shape) for parameter in block.parameters()]
    results = []
    for one in (block, twin):
        with forward_ad.dual_level():
            for (name, parameter), tangent in zip(list(one.named_parameters()), tangents):
                owner, _, leaf = name.rpartition(".")
                holder = one.get_submodule(owner)
                delattr(holder, leaf)
                setattr(holder, leaf, forward_ad.make_dual(parameter.detach(), tangent))
            results.append(forward_ad.unpack_dual(one(x)).tangent)
    close(*results)


# Batched gradients


def test_jacobian_vectorized(module, random):
    x = random(*SIZE)
    jacobian = torch.autograd.functional.jacobian
    close(jacobian(module, x, vectorize=True), jacobian(plain(module), x))


def test_batched_gradients_of_parameters(module, random):
    x = random(*SIZE)
    vectors = random(3, *SIZE)
    parameters = [p for n, p in module.named_parameters() if not n.endswith("conv_mask.bias")]
    out = module(x)
    batched = torch.autograd.grad(out, parameters, vectors, is_grads_batched=True, retain_graph=True)
    for i, vector in enumerate(vectors):
        alone = torch.autograd.grad(out, parameters, vector, retain_graph=True)
        for one, all_of_them in zip(alone, batched):
            close(all_of_them[i], one)


def test_batched_gradients_of_a_function(function, random):
    ours, theirs = function
    x = random(*SIZE, grad=True)
    expected = theirs(x)
    vectors = random(3, *expected.shape)
    close(
        torch.autograd.grad(ours(x), x, vectors, is_grads_batched=True),
        torch.autograd.grad(expected, x, vectors, is_grads_batched=True),
    )


def test_vmap_over_a_backward_pass(module, random):
    """torch.func.vmap over autograd.grad of a graph that was made outside of it."""
    x = random(*SIZE, grad=True)
    out, vectors = module(x), random(3, *SIZE)
    batched = torch.func.vmap(lambda v: torch.autograd.grad(out, x, v, retain_graph=True)[0])(vectors)
    close(batched, torch.stack([torch.autograd.grad(out, x, v, retain_graph=True)[0] for v in vectors]))


def test_gradcheck_of_batched_gradients_and_forward_mode(random):
    block = awake(gc_cuda.ContextBlock(4, 1 / 2, fusion_types=("channel_add", "channel_mul")))
    assert torch.autograd.gradcheck(
        block, random(1, 4, 2, 3, grad=True), check_batched_grad=True, check_forward_ad=True
    )


@pytest.mark.parametrize("grad", [False, True])
def test_a_tensor_from_a_finished_transform(module, grad, random):
    """It is still wrapped when it comes, and stands for the tensor that the transform was given."""
    kept = []
    x = random(*SIZE, grad=grad)
    torch.func.grad(lambda x: kept.append(x) or x.sum())(x)
    assert torch._C._functorch.is_gradtrackingtensor(kept[0])
    out = module(kept[0])
    close(out.detach(), module(x).detach())
    if grad:
        close(
            torch.autograd.grad(out.square().sum(), x)[0], torch.autograd.grad(module(x).square().sum(), x)[0]
        )


# Subclasses of Tensor


class Tagged(Tensor):
    """Carries something besides its numbers, which PyTorch's own operators keep."""


class Counting(Tensor):
    """Sees every function of torch that it meets."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


class Served(Tensor):
    gc_cuda_served = True


@pytest.mark.parametrize("kind", [Tagged, Counting])
def test_a_subclass_gets_plain_pytorch(module, kind, random):
    x = random(*SIZE)
    with torch.no_grad(), Spy() as spy:
        out = module(x.as_subclass(kind))
    assert type(out) is kind
    assert not any(name.startswith("gc_cuda::") for name in spy.names())
    close(out.as_subclass(Tensor), plain(module)(x))


def test_a_subclass_for_a_gradient(module, random):
    x, grad = random(*SIZE, grad=True), random(*SIZE)
    out = module(x)
    expected = torch.autograd.grad(out, x, grad, retain_graph=True)[0]
    with Spy() as spy:
        (actual,) = torch.autograd.grad(out, x, grad.as_subclass(Counting))
    assert not any(name.startswith("gc_cuda::") for name in spy.names())
    close(actual.as_subclass(Tensor), expected)


def test_a_subclass_among_the_parameters(random):
    block = awake(gc_cuda.ContextBlock(8, 1 / 2))
    x = random(*SIZE)
    expected = block(x)
    conv = block.channel_add_conv[0]
    weight = conv.weight.detach()
    del conv.weight
    conv.weight = weight.as_subclass(Counting)
    Counting.seen.clear()
    close(block(x).as_subclass(Tensor), expected)
    assert "conv2d" in Counting.seen


@pytest.mark.parametrize("name", NAMES)
def test_a_subclass_for_a_function(name, random):
    call, x = functions(random)[name], random(*SIZE)
    out = call(gc_cuda, x.as_subclass(Tagged))
    assert type(out) is Tagged
    close(out.as_subclass(Tensor), call(reference, x))


def test_a_subclass_that_says_it_is_served(random):
    block, x = awake(gc_cuda.ContextBlock(8, 1 / 2)), random(*SIZE)
    with torch.no_grad(), Spy() as spy:
        out = block(x.as_subclass(Served))
    assert "gc_cuda::global_context" in spy.names()
    close(out.as_subclass(Tensor), block(x))


def test_fake_tensors_stay_served():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        block = gc_cuda.ContextBlock(8, 1 / 2)
        x = torch.empty(*SIZE)
        with Spy() as spy:
            assert block(x).shape == SIZE
    assert "gc_cuda::global_context_kept" in spy.names()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_dtensors(tmp_path, random):
    """Sharded over the batch, as distribute_module does it; in one process."""
    tensors = pytest.importorskip("torch.distributed.tensor")
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = random(*SIZE, dtype=torch.float32)
        sharded = tensors.distribute_tensor(x, mesh, [tensors.Shard(0)])
        for make in MODULES.values():
            block = awake(make()).float()
            expected = block(x)
            block = tensors.distribute_module(block, mesh)
            out = block(sharded)
            assert out.placements == (tensors.Shard(0),)
            torch.testing.assert_close(out.full_tensor(), expected)
        out = gc_cuda.broadcast_add(
            sharded, tensors.distribute_tensor(x[:, :, 0, 0], mesh, [tensors.Shard(0)])
        )
        torch.testing.assert_close(out.full_tensor(), x + x[:, :, :1, :1])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_fully_shard_of_a_part(tmp_path, random):
    """A wrapping policy makes a unit of a convolution: its weights are there only while it is called."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = random(*SIZE)
        for make in MODULES.values():
            block = awake(make())
            twin = copy.deepcopy(block)
            expected = twin(x)
            for part in block.modules():
                if isinstance(part, nn.Conv2d):
                    fsdp.fully_shard(part, mesh=mesh)
            fsdp.fully_shard(block, mesh=mesh)
            out = block(x)
            close(out, expected)
            out.square().mean().backward()
            expected.square().mean().backward()
            for parameter, theirs in zip(block.parameters(), twin.parameters()):
                torch.testing.assert_close(parameter.grad.full_tensor(), theirs.grad, rtol=1e-9, atol=1e-9)
    finally:
        torch.distributed.destroy_process_group()


# Those who watch


class Functions(TorchFunctionMode):
    def __init__(self):
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_a_mode_of_functions_sees_the_operator(grad, random):
    block = awake(gc_cuda.ContextBlock(8, 1 / 2))
    x = random(*SIZE, grad=grad)
    with torch.set_grad_enabled(grad), Functions() as functions:
        out = block(x)
        if grad:
            out.sum().backward()
    assert "global_context" in str(functions.seen)
    assert not any(name in str(functions.seen) for name in ("conv2d", "softmax", "layer_norm"))


def test_saved_tensors_are_tensors(random):
    """Tools that draw graphs go through them."""
    n, c = SIZE[:2]
    x, scale = random(*SIZE, grad=True), random(n, c, grad=True)
    weight, bias = random(c, grad=True), random(1, grad=True)
    outs = [gc_cuda.broadcast_add(x, scale), gc_cuda.broadcast_mul(x, scale.detach())]
    outs += [gc_cuda.attention_pool(x, weight), gc_cuda.attention_pool(x, weight, bias)]
    for pooling, fusion in itertools.product(("att", "avg"), (("channel_add",), ("channel_mul",))):
        outs.append(awake(gc_cuda.ContextBlock(c, 1 / 2, pooling, fusion))(x))
    outs.append(awake(blocks.SEBlock(c, 4))(x))
    for out in outs:
        assert all(isinstance(tensor, Tensor) for tensor in out.grad_fn.saved_tensors)


@pytest.mark.parametrize("name", ["conv_mask.bias", "channel_add_conv.0.bias", "channel_add_conv.3.bias"])
def test_biases_may_change_before_the_backward_pass(name, random):
    """As those of PyTorch's convolutions may; one whose value is needed again is missed."""
    block = awake(gc_cuda.ContextBlock(8, 1 / 2))
    x = random(*SIZE, grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    out = block(x)
    with torch.no_grad():
        loss = out.square().sum().detach()
    loss = out.square().sum()
    with torch.no_grad():
        block.get_parameter(name).add_(1)
    for gradient, theirs in zip(torch.autograd.grad(loss, [x, *block.parameters()]), expected):
        close(gradient, theirs)
    out = block(x).square().sum()
    with torch.no_grad():
        block.get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, x, create_graph=True)


def test_weights_may_not(random):
    block = awake(gc_cuda.ContextBlock(8, 1 / 2))
    loss = block(random(*SIZE, grad=True)).sum()
    with torch.no_grad():
        block.channel_add_conv[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_have_the_strides_of_their_parameters(module, random, recwarn):
    """DDP warns, and copies, where they do not; after .to(memory_format=channels_last) for one."""
    for format in (torch.channels_last, torch.contiguous_format):
        module.to(memory_format=format)
        module.zero_grad()
        module(random(*SIZE)).square().sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp_does_not_warn_after_channels_last(tmp_path, random, recwarn):
    def train(net: nn.Module) -> None:
        net = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        net(random(*SIZE, dtype=torch.float32)).square().sum().backward()

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        for make in MODULES.values():
            train(awake(make()).float().to(memory_format=torch.channels_last))
    finally:
        end_process_group()
    assert not [warning for warning in recwarn if "strides" in str(warning.message)]
