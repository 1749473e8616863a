"""What a look at a model costs, and what is said of it."""

from __future__ import annotations

import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from hand_written import ConvSE, ECALayer, Residual
from torch import nn
from whole_models import awake, step

import gc_cuda
from gc_cuda.recognition import blocks, tracing


class Bottleneck(nn.Module):
    """A residual block without attention."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels // 4, 1), nn.BatchNorm2d(channels // 4)
        self.conv2, self.bn2 = (
            nn.Conv2d(channels // 4, channels // 4, 3, padding=1),
            nn.BatchNorm2d(channels // 4),
        )
        self.conv3, self.bn3 = nn.Conv2d(channels // 4, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        return (self.bn3(self.conv3(out)) + x).relu()


class Wide(nn.Module):
    """Squeeze-and-excitation over as many channels as are asked for."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.last(self.first(x.mean((2, 3), keepdim=True)).relu()))


class Hidden(nn.Module):
    """A block whose weights do not tell the channels of its input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        pooled = x.mean((2, 3)).view(-1, 1, 16)
        return x * torch.sigmoid(self.conv(pooled)).view(-1, 16, 1, 1)


def counted(monkeypatch):
    """The traces that are made."""
    traces, trace = [], tracing.trace
    monkeypatch.setattr(tracing, "trace", lambda *a, **k: traces.append(1) or trace(*a, **k))
    return traces


def test_a_model_without_candidates_costs_nothing(monkeypatch):
    """By count, and in time: the bound is 0.5 s."""
    traces = counted(monkeypatch)
    net = nn.Sequential(*(Bottleneck(64) for _ in range(50)))
    start = time.perf_counter()
    report = gc_cuda.accelerate(net)
    assert time.perf_counter() - start < 0.5
    assert not traces and not report.entries
    assert str(report).startswith("gc_cuda: no global context, squeeze-and-excitation or other block")


def test_one_trace_for_each_structure_and_mode(monkeypatch):
    traces = counted(monkeypatch)
    net = nn.Sequential(*(Wide(channels) for _ in range(20) for channels in (21, 22, 23)))
    assert len(gc_cuda.accelerate(net).accelerated) == 60
    assert len(traces) == 6
    assert len(gc_cuda.accelerate(nn.Sequential(Wide(21), Wide(23))).accelerated) == 2
    assert len(traces) == 6
    net[0](torch.ones(1, 21, 3, 3))
    assert len(traces) == 6


def test_a_module_that_is_none_is_looked_at_once(monkeypatch):
    class Mixer(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.fc = nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            return self.fc(x - x.mean(1, keepdim=True))

    traces = counted(monkeypatch)
    assert not gc_cuda.accelerate(nn.Sequential(*(Mixer(channels) for channels in range(4, 30)))).entries
    assert len(traces) == 1


def test_a_module_that_takes_no_map_is_not_copied(monkeypatch):
    """As of a transformer, however large: its shapes tell, without numbers."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(48, 48)

        def forward(self, x):
            _images, _tokens, _channels = x.shape
            return self.fc(x - x.mean(1, keepdim=True))

    def refused(block):
        raise AssertionError("it was copied")

    monkeypatch.setattr(tracing, "copy_of", refused)
    assert not gc_cuda.accelerate(nn.Sequential(Tokens())).entries


def test_an_attention_block_that_is_left_alone_is_traced_twice(monkeypatch):
    """Others of its outline, of other sizes, are left alone with its reason; another option is looked at."""

    class Coordinates(nn.Module):
        def __init__(self, channels, mode):
            super().__init__()
            self.fc, self.mode = nn.Conv2d(channels, channels, 1), mode

        def forward(self, x):
            pooled = x.mean(2, keepdim=True) if self.mode == "rows" else x.mean((2, 3), keepdim=True)
            return x * torch.sigmoid(self.fc(F.relu(pooled)))

    traces = counted(monkeypatch)
    net = nn.Sequential(*(Coordinates(channels, "rows") for channels in range(4, 30)), Coordinates(4, "all"))
    report = gc_cuda.accelerate(net)
    assert len(report.left_alone) == 26 and set(report.left_alone.values()) == {
        "mean is over a part of the pixels"
    }
    assert report.accelerated == ["26"]
    assert len(traces) == 2 + 2


def test_memory_of_the_largest_candidate(monkeypatch):
    """One copy at a time, in float64."""
    alive, most = [0], [0]
    copied = tracing.copy_of

    def counting(block):
        twin = copied(block)
        size = sum(tensor.nbytes for tensor in (*twin.parameters(), *twin.buffers()))
        alive[0] += size
        most[0] = max(most[0], alive[0])
        weakref.finalize(twin, lambda: alive.__setitem__(0, alive[0] - size))
        return twin

    monkeypatch.setattr(tracing, "copy_of", counting)
    net = nn.Sequential(*(Wide(channels) for channels in (101, 102, 2000, 103)))
    gc_cuda.accelerate(net)
    largest = sum(parameter.numel() for parameter in net[2].parameters()) * 8
    assert most[0] == largest


def test_channels_by_an_example(random):
    net = awake(Residual(Hidden())).train()
    net.attention.eval()  # modes are put back, also mixed ones
    report = gc_cuda.accelerate(net)
    assert report.left_alone["attention"].startswith("its weights do not tell its channels: pass accelerate(")
    modes = [module.training for module in net.modules()]
    buffers = [buffer.clone() for buffer in net.buffers()]
    x, state = random(2, 3, 8, 7), torch.get_rng_state()
    for example in (x, (x,)):
        gc_cuda.restore(net)
        assert gc_cuda.accelerate(net, example=example).accelerated == ["attention"]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers))
    assert not net._forward_pre_hooks and not net.attention._forward_pre_hooks
    net.train()
    ours = step(net, x)
    gc_cuda.restore(net)
    for buffer, before in zip(net.buffers(), buffers):
        buffer.copy_(before)
    for name, tensor in step(net, x).items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-10, atol=1e-10)


def test_an_older_torch_is_told(monkeypatch):
    """Classes known by name are served there, and the report says that others were not looked at."""
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    net = Residual(ConvSE())
    report = gc_cuda.accelerate(net)
    assert not report.entries and type(net.attention) is ConvSE
    assert "wants torch 2.13 or newer" in str(report)
    monkeypatch.undo()
    assert blocks.available() and "wants torch" not in str(gc_cuda.accelerate(net))


@pytest.mark.parametrize("make", [ConvSE, ECALayer])
def test_a_graph_of_torch_fx_keeps_it(random, make):
    """As a node that calls the module: served, and not silently eager."""
    net = awake(Residual(make())).eval()
    x = random(2, 3, 8, 7)
    expected = step(net, x)
    gc_cuda.accelerate(net)
    graph = torch.fx.symbolic_trace(net)
    assert graph.get_submodule("attention") is net.attention
    actual = step(graph, x)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-10, atol=1e-10)


def test_a_graph_that_was_made_before_says_so():
    """As timm's feature_cls="fx" makes it: no block is left in it to be seen."""
    graph = torch.fx.symbolic_trace(Residual(ConvSE()))
    report = gc_cuda.accelerate(graph)
    assert not report.entries
    assert "accelerate the model before it is traced" in str(report)
