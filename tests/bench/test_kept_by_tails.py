"""What the tails of a backbone keep for the backward pass, on meta tensors: what a plain ResNet's keep.

Two images of 800×1333, GCNet's blocks in c3 to c5 or squeeze-and-excitation everywhere, real channel counts.
"""

from __future__ import annotations

import copy
import sys
import types
from functools import partial

import pytest
import torch

import gc_cuda

# MB beyond the plain backbone
LIMITS = {("GC", "R50"): 2, ("GC", "R101"): 4, ("SE", "R50"): 2, ("SE", "R101"): 2}
# MB of x, which eager blocks keep and tails do not
OF_X = {("GC", "R50"): 532, ("GC", "R101"): 1118, ("SE", "R50"): 942, ("SE", "R101"): 1527}


@pytest.fixture
def bottleneck(bench):
    return bench("bottleneck")


@pytest.fixture
def kept(bench):
    """MB of a variant of a backbone."""
    memory = bench("memory")

    def counted(setting, variant, **options):
        return memory.kept_on_meta(setting, variant, **options) / memory.MEGABYTE

    return counted


def settings(bottleneck, depth="R50"):
    return [setting for setting in bottleneck.SETTINGS if setting.depth == depth]


def test_tails_keep_no_more_than_plain_ones(bottleneck, kept):
    for setting in bottleneck.SETTINGS:
        plain, eager, block_only, tails = (
            kept(setting, variant)
            for variant in (bottleneck.BARE, bottleneck.PLAIN, bottleneck.BLOCK, bottleneck.FUSED)
        )
        of = setting.kind, setting.depth
        assert tails - plain <= LIMITS[of], setting.name
        for with_x in (eager, block_only):
            assert with_x - plain == pytest.approx(OF_X[of], abs=1), setting.name


def test_with_cp_tails_keep_no_more_than_eager(bottleneck, kept):
    for setting in bottleneck.SETTINGS:
        eager, tails = (
            kept(setting, variant, with_cp=True) for variant in (bottleneck.PLAIN, bottleneck.FUSED)
        )
        assert tails <= eager < kept(setting, bottleneck.BARE), setting.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_in_place_of_out_keep_more_wherever_out_is_used(bottleneck, kept, dtype):
    """Without a pyramid nothing uses the last out: there bits keep less, if the others are few."""
    for setting in bottleneck.SETTINGS:
        out, bits = (
            kept(setting, bottleneck.FUSED, dtype=dtype, pyramid=True, with_bits=with_bits)
            for with_bits in (False, True)
        )
        assert out < bits, setting.name
    for setting in settings(bottleneck, "R101"):
        assert kept(setting, bottleneck.FUSED) < kept(setting, bottleneck.FUSED, with_bits=True)


def test_the_accounting_is_that_of_real_tensors(bench, bottleneck):
    """A bottleneck, whatever its tail: on meta tensors as when it runs.

    But for two vectors, which PyTorch's batch norm with given statistics has on meta tensors alone.
    """
    vectors = 2 * 4 * (16 + 16 + 64)
    kept_by = bench("kept").kept_by
    for variant in bottleneck.VARIANTS:
        for training in (True, False):
            found = []
            for device in ("meta", "cpu"):
                with torch.device(device):
                    module = bottleneck.Bottleneck(64, 16, 1)
                    module.variant = variant
                    module.context = (
                        bottleneck.Context(bottleneck.GC, 64) if variant != bottleneck.BARE else None
                    )
                    x = torch.randn(2, 64, 6, 7).requires_grad_()
                found.append(kept_by(module.train(training), x))
            of_meta, real = found
            allowed = 0 if training else vectors
            assert 0 <= of_meta - real <= allowed < real, (variant, training)


@pytest.fixture
def torchvisions(bottleneck, monkeypatch):
    """A bottleneck with the forward of torchvision's, by whose name `insert` and `accelerate` know it."""

    class Bottleneck(bottleneck.Bottleneck):
        def forward(self, x):
            out = self.bn3(self.stem(x))
            out += x if self.downsample is None else self.downsample(x)
            return self.relu(out)

    Bottleneck.__module__ = Bottleneck.forward.__module__ = "torchvision.models.resnet"
    Bottleneck.__qualname__ = "Bottleneck"
    for name in ("torchvision", "torchvision.models", "torchvision.models.resnet"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torchvision.models.resnet"].Bottleneck = Bottleneck
    return Bottleneck


@pytest.mark.parametrize(("depth", "count"), [("R50", 13), ("R101", 30)])
def test_through_accelerate(bench, bottleneck, torchvisions, depth, count):
    pytest.importorskip("gc_cuda.models.tails", reason="accelerate takes no tails yet")
    kept_by, memory = bench("kept").kept_by, bench("memory")
    for setting in settings(bottleneck, depth):
        if setting.kind == bottleneck.SE:
            continue
        with torch.device("meta"):
            plain = bottleneck.Backbone(depth, torchvisions)
            x = torch.empty(memory.BACKBONE_INPUT[1])
        blocks = copy.deepcopy(plain)
        gc_cuda.insert(blocks)
        tails = copy.deepcopy(blocks)
        assert len(gc_cuda.accelerate(tails).tails) == count
        for model in (plain, blocks, tails):
            bottleneck.prepare(model, setting)
        of_plain, of_blocks, of_tails = (kept_by(m, x) / memory.MEGABYTE for m in (plain, blocks, tails))
        assert of_tails - of_plain <= LIMITS["GC", depth]
        assert of_blocks - of_plain == pytest.approx(OF_X["GC", depth], abs=1)


def _add_input(kept, _, inputs):
    kept.add(inputs[0])


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")  # mmdetection does not say which
def test_with_cp_through_accelerate(bench, monkeypatch):
    """mmdetection's with_cp, by a double of its bottleneck: the inputs of what is recomputed count, too."""
    doubles = pytest.importorskip("bottlenecks", reason="accelerate takes no tails yet")
    for name, module in doubles.stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)
    keeping = bench("kept").keeping
    channels = doubles.CHANNELS
    with torch.device("meta"):
        plugins = [("context_block", gc_cuda.ContextBlock(channels, 1 / 4)) for _ in range(3)]
        eager = torch.nn.Sequential(
            *(doubles.MmdetBottleneck(channels, with_cp=True, after_conv3=[plugin]) for plugin in plugins)
        )
        x = torch.empty(2, channels, 200, 200).requires_grad_()
    tails = copy.deepcopy(eager)
    assert len(gc_cuda.accelerate(tails).tails) == len(plugins)
    found = []
    for model in (eager, tails):
        with keeping([*model.parameters(), *model.buffers()]) as kept:
            for bottleneck in model:
                bottleneck.register_forward_pre_hook(partial(_add_input, kept))
            model(x)
        found.append(kept.bytes)
    of_eager, of_tails = found
    assert x.untyped_storage().nbytes() <= of_tails <= of_eager
