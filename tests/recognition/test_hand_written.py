"""Blocks of unknown classes are served by what they compute, and what only looks like one is left alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from block_cases import Spy
from hand_written import AROUND, BLOCKS, FUSED, ConvSE, Residual
from near_misses import NEAR_MISSES
from small_steps import assert_same_steps, steps
from torch import nn
from whole_models import FLOAT32_CONSTANT, assert_same, awake, step

import gc_cuda

WHOLE = "gc_cuda::global_context_kept"


def net_of(name):
    torch.manual_seed(0)
    return awake(Residual(BLOCKS[name].make()))


def relative(net):
    """PyTorch differentiates its double hard sigmoid with one sixth in float32."""
    return FLOAT32_CONSTANT if any(isinstance(m, nn.Hardsigmoid) for m in net.modules()) else 1e-10


def ours_in(spy):
    return {name for name in spy.names() if name.startswith("gc_cuda::")}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_served(random, name, training, layout):
    """Two sizes, three steps each: outputs, all gradients, and what the steps leave."""
    plain = net_of(name).train(training)
    ours = copy.deepcopy(plain)
    report = gc_cuda.accelerate(ours)
    assert report.accelerated == ["attention"] and not report.left_alone, str(report)
    for size in ((2, 3, 9, 7), (3, 3, 12, 16)):
        x = random(*size, layout=layout)
        with Spy() as spy:
            ours(x.requires_grad_())
        fused = ours_in(spy)
        assert fused == {WHOLE} if BLOCKS[name].way == FUSED else fused and WHOLE not in fused, fused
        plain.load_state_dict(ours.state_dict())  # the running averages
        assert_same_steps(steps(ours, x), steps(plain, x), relative(ours))


@pytest.mark.parametrize("name", BLOCKS)
def test_without_gradients(random, name):
    plain = net_of(name).eval()
    ours, x = copy.deepcopy(plain), random(2, 3, 8, 11)
    gc_cuda.accelerate(ours)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Spy() as spy:
            out = ours(x)
        assert bool(ours_in(spy)) == (BLOCKS[name].way == FUSED)  # around a middle nothing is gained here
        torch.testing.assert_close(out, plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_but_the_class_changes(random, name):
    net, x = net_of(name), random(2, 3, 8, 8)
    expected = step(net, x)
    own_class, before = type(net.attention), dict(vars(net.attention))
    state = copy.deepcopy(net.state_dict())
    objects = [*net.modules(), *net.parameters(), *net.buffers()]
    report = gc_cuda.accelerate(net)
    assert vars(net.attention) == before
    now = [*net.modules(), *net.parameters(), *net.buffers()]
    assert len(now) == len(objects) and all(a is b for a, b in zip(now, objects))
    assert list(state) == list(net.state_dict())
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert isinstance(net.attention, own_class) and type(net.attention) is not own_class
    assert report.entries[0].formula.startswith("x ")
    kinds = [type(module) for module in net.modules() if module is not net.attention]
    gc_cuda.restore(net)
    assert type(net.attention) is own_class and vars(net.attention) == before
    assert [type(module) for module in net.modules() if module is not net.attention] == kinds
    net.load_state_dict(state)
    restored = step(net, x)
    assert all(torch.equal(restored[key], tensor) for key, tensor in expected.items())


def test_a_block_is_a_model(random):
    block, x = awake(ConvSE()), random(2, 16, 5, 6)
    expected = step(block, x)
    assert gc_cuda.accelerate(block).accelerated == [""]
    assert gc_cuda.accelerate(block).entries[0].action == "accelerated before"
    assert_same(step(block, x), expected)


def test_all_blocks_in_one_model(random):
    """Also many of one class, which are proved once, with parameters of their own."""
    torch.manual_seed(0)
    blocks = [block.make() for block in BLOCKS.values() for _ in range(2)]
    plain = awake(nn.Sequential(*blocks)).eval()
    ours, x = copy.deepcopy(plain), random(2, 16, 6, 5)
    assert len(gc_cuda.accelerate(ours).accelerated) == len(blocks)
    assert_same_steps(steps(ours, x, 1), steps(plain, x, 1), 1e-6)


def copied(net, way):
    if way == "deepcopy":
        return copy.deepcopy(net)
    if way == "pickle":
        return pickle.loads(pickle.dumps(net, protocol=pickle.HIGHEST_PROTOCOL))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", BLOCKS)
def test_copies_stay_accelerated_and_are_independent(random, name, way):
    net, x = net_of(name).eval(), random(2, 3, 7, 7)
    own_class = type(net.attention)
    gc_cuda.accelerate(net)
    twin = copied(net, way)
    assert type(twin.attention) is type(net.attention)
    before = net(x)
    with Spy() as spy:
        assert torch.equal(twin(x), before)
    assert ours_in(spy) or BLOCKS[name].way == AROUND
    for parameter in twin.attention.parameters():
        nn.init.constant_(parameter, 0.3)
    assert torch.equal(net(x), before)
    assert not torch.equal(twin(x), before)
    gc_cuda.restore(twin)
    assert type(twin.attention) is own_class


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(random, name, training):
    make, reason, size = NEAR_MISSES[name]
    torch.manual_seed(0)
    net = awake(Residual(make())).train(training)
    twin, x = copy.deepcopy(net), random(2, 3, *size)
    report = gc_cuda.accelerate(net)
    assert type(net.attention) is make
    assert not report.accelerated
    assert list(report.left_alone) == ["attention"], str(report)
    (said,) = report.left_alone.values()
    assert any(word in said.lower() for word in reason.split("|")), said
    for model in (net, twin):
        torch.manual_seed(1)
        model.result = step(model, x)
    assert all(torch.equal(net.result[key], tensor) for key, tensor in twin.result.items())


def test_both_ways_are_tested():
    ways = [block.way for block in BLOCKS.values()]
    assert ways.count(FUSED) >= 10 and ways.count(AROUND) >= 6 and len(NEAR_MISSES) >= 10
