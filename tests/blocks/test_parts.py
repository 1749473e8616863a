"""A block never bypasses its parts: whatever is done to one, it computes what plain PyTorch would."""

from __future__ import annotations

import copy
import timeit

import pytest
import torch
from block_cases import Spy
from part_cases import BLOCKS, CHANNELS, EVERYWHERE, MANIPULATIONS, concatenation, not_in_place
from torch import nn
from whole_models import awake

import gc_cuda

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(params=BLOCKS)
def kind(request):
    return BLOCKS[request.param]


def run(block, forward, x):
    """Two steps of training: outputs, the gradients of x and of every parameter, what hooks have seen."""
    results = {}
    for step in range(2):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        out.square().mean().backward()
        results |= {f"output {step}": out.detach(), f"x {step}": leaf.grad}
        for name, parameter in block.named_parameters():
            # the mask's bias has no effect: what is left of its gradient in PyTorch is rounding
            if parameter.grad is not None and not name.endswith(("conv_mask.bias", "conv_attn.bias")):
                results[f"{name} {step}"] = parameter.grad.clone()
    seen = {
        name: torch.tensor(module.seen) for name, module in block.named_modules() if hasattr(module, "seen")
    }
    return results | seen


def runs_fused(block, x):
    with torch.no_grad(), Spy() as spy:
        block(x)
    return any(name.startswith("gc_cuda::") for name in spy.names())


def applies(block, kinds):
    return any(isinstance(part, kinds) for part in block.modules())


@pytest.mark.parametrize("manipulation", MANIPULATIONS)
def test_what_is_done_to_a_part_counts(kind, manipulation, random):
    """After the block has run once, and its reader has taken notes."""
    manipulate, fused, kinds = MANIPULATIONS[manipulation]
    block, x = awake(kind.make()), random(2, CHANNELS, 4, 3)
    twin = copy.deepcopy(block)
    assert runs_fused(block, x)
    fused = fused or not applies(block, kinds)
    for one in (block, twin):
        torch.manual_seed(0)
        manipulate(one)
        one.double()
    expected = run(twin, lambda leaf: kind.eager(twin, leaf), x)
    actual = run(block, block, x)
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert runs_fused(block, x) == fused


@pytest.mark.parametrize(
    "manipulation", [*(name for name, (_, _, kinds) in MANIPULATIONS.items() if nn.Conv2d in kinds), "bias"]
)
def test_what_is_done_to_the_projection_of_a_non_local_block_counts(manipulation, random):
    """Its weight is read, too, so that a tensor of 2P x S x S is not made."""
    block, x = awake(gc_cuda.blocks.NonLocalBlock(CHANNELS, mode="concatenation")), random(2, CHANNELS, 4, 3)
    twin = copy.deepcopy(block)
    with torch.no_grad():
        torch.testing.assert_close(block(x), concatenation(block, x), rtol=1e-9, atol=1e-11)
    for one in (block, twin):
        torch.manual_seed(0)
        if manipulation == "bias":
            one.concat_project.conv.bias = nn.Parameter(torch.randn(1))
        else:
            MANIPULATIONS[manipulation].do(one)
        one.double()
    expected = run(twin, lambda leaf: concatenation(twin, leaf), x)
    actual = run(block, block, x)
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_bias_that_a_simplified_block_gets_later_counts(random):
    block, x = awake(gc_cuda.blocks.SimplifiedNonLocalBlock(CHANNELS)), random(2, CHANNELS, 4, 3)
    block(x)
    block.conv_value.bias = nn.Parameter(random(CHANNELS))
    torch.testing.assert_close(block(x), BLOCKS["simplified"].eager(block, x), rtol=1e-9, atol=1e-11)
    assert runs_fused(block, x)


@pytest.mark.parametrize("what", EVERYWHERE)
def test_what_is_done_to_all_modules_counts_while_it_lasts(kind, what, random):
    block, x = awake(kind.make()), random(2, CHANNELS, 4, 3)
    block.apply(not_in_place)
    twin = copy.deepcopy(block)
    before = run(block, block, x)
    concerned = {"activation's forward": nn.ReLU, "norm's forward": nn.LayerNorm}.get(what, nn.Conv2d)
    with EVERYWHERE[what]():
        # The hooks of the block itself run with ours: call both by their forwards.
        expected = run(twin, lambda leaf: kind.eager(twin, leaf), x)
        actual = run(block, block.forward, x)
        # A subclass with a forward of its own, as timm's LayerNorm2d, is not concerned.
        assert runs_fused(block, x) == all(type(part) is not concerned for part in block.modules())
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert runs_fused(block, x)
    after = run(block, block, x)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_channels_cut_out_of_the_parameters(kind, random):
    """As structured pruning does it, in place: shapes are those of the parameters, whatever numbers stay."""
    block = awake(kind.make())
    x = random(2, CHANNELS, 4, 3)
    assert runs_fused(block, x)
    kept = list(range(0, CHANNELS, 2))
    for module in block.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        weight = module.weight.detach()
        if weight.shape[1] == CHANNELS:
            weight = weight[:, kept]
        if weight.shape[0] == CHANNELS:
            weight = weight[kept]
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.detach()[kept])
        module.weight = nn.Parameter(weight.clone())
    x = x[:, kept].contiguous()
    torch.testing.assert_close(block(x), kind.eager(block, x), rtol=1e-9, atol=1e-11)
    assert runs_fused(block, x)


def test_asking_costs_little(random):
    """A block without gradients on a small map, against an addition in the same run: 4.2 on an AMD EPYC."""
    block = gc_cuda.ContextBlock(64, 1 / 4)
    x = random(1, 64, 7, 7, dtype=torch.float32)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, addition = [], []
    try:
        with (
            torch.no_grad()
        ):  # short and in turn: the least of each is of a moment when nobody else had the core
            for _ in range(60):
                ours.append(timeit.timeit(lambda: block(x), number=100))
                addition.append(timeit.timeit(lambda: x + 1, number=100))
    finally:
        torch.set_num_threads(threads)
    assert min(ours) <= 6 * min(addition)


def test_a_block_is_read_once(kind, random, monkeypatch):
    """While nothing changes, its reader's notes hold: also for another map, another mode, new values."""
    from gc_cuda.blocks import _fused

    block = awake(kind.make())
    looks = []
    look = _fused._look
    monkeypatch.setattr(_fused, "_look", lambda *args: looks.append(1) or look(*args))
    for size in ((2, CHANNELS, 4, 3), (1, CHANNELS, 5, 5)):
        block(random(*size)).sum().backward()
        block.eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1)
    block.load_state_dict(block.state_dict())
    block(random(2, CHANNELS, 4, 3))
    assert looks == [1]
    block.float()
    block.double()
    handle = next(block.children()).register_forward_hook(lambda *_: None)
    block(random(2, CHANNELS, 4, 3))
    handle.remove()
    block(random(2, CHANNELS, 4, 3))
    assert looks == [1] * 3


def test_a_function_in_the_place_of_a_part_that_was_not_there(random):
    block, x = awake(BLOCKS["avg"].make()), random(2, CHANNELS, 4, 3)
    assert runs_fused(block, x)
    block.channel_mul_conv = torch.tanh  # None before; it is no child of the module
    torch.testing.assert_close(block(x), BLOCKS["avg"].eager(block, x), rtol=1e-9, atol=1e-11)
    assert not runs_fused(block, x)


@pytest.mark.parametrize(
    ("name", "part", "option", "value"),
    [
        ("avg", "avg_pool", "output_size", (2, 2)),
        ("accelerated torchvision", "avgpool", "output_size", (2, 2)),
        ("att", "channel_add_conv.1", "normalized_shape", (4, 1, 2)),
        ("mmcv registry", "channel_mul_conv.1", "normalized_shape", (4, 1, 2)),
        ("accelerated mmcv", "channel_add_conv.1", "normalized_shape", (4, 1, 2)),
        ("att", "conv_mask", "stride", (2, 2)),
        ("SEBlock", "fc1", "kernel_size", (3, 3)),
    ],
)
def test_an_option_with_which_eager_refuses_or_differs(name, part, option, value, random):
    """The same error, or the same result."""
    block, x = awake(BLOCKS[name].make()), random(2, CHANNELS, 4, 3)
    assert runs_fused(block, x)
    setattr(block.get_submodule(part), option, value)
    with Spy() as spy:
        try:
            expected = BLOCKS[name].eager(block, x)
        except RuntimeError as error:
            with pytest.raises(RuntimeError) as ours:
                block(x)
            assert str(ours.value) == str(error)
        else:
            torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-11)
    assert not any(seen.startswith("gc_cuda::") for seen in spy.names())
