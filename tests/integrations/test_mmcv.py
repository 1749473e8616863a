"""ContextBlock stands in for mmcv's: same parameters from the same seed, state_dict both ways, same results;
by accelerate in a model that there is, and by the registry in one that is built from a config.

Needs mmcv-lite and mmengine (./compile.sh test installs them); skipped where they are absent.
"""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import nn
from whole_models import FUSIONS, POOLINGS, check_accelerated, randomised, run

import gc_cuda

mmcv_cnn = pytest.importorskip("mmcv.cnn", reason="mmcv-lite is not installed")


@pytest.mark.parametrize("pooling_type", POOLINGS)
@pytest.mark.parametrize("fusion_types", FUSIONS)
def test_same_seed_same_parameters(pooling_type, fusion_types):
    torch.manual_seed(3)
    theirs = mmcv_cnn.ContextBlock(32, 1 / 4, pooling_type, fusion_types).state_dict()
    torch.manual_seed(3)
    ours = gc_cuda.ContextBlock(32, 1 / 4, pooling_type, fusion_types).state_dict()
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert torch.equal(ours[name], parameter), name


@pytest.mark.parametrize("pooling_type", POOLINGS)
@pytest.mark.parametrize("fusion_types", FUSIONS)
@pytest.mark.parametrize("in_channels, ratio", [(64, 1 / 16), (48, 1 / 4)])
def test_state_dict_both_ways(random, pooling_type, fusion_types, in_channels, ratio, layout):
    theirs = randomised(mmcv_cnn.ContextBlock(in_channels, ratio, pooling_type, fusion_types)).double()
    ours = gc_cuda.ContextBlock(in_channels, ratio, pooling_type, fusion_types).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)

    x, grad = (random(2, in_channels, 9, 14, layout=layout) for _ in range(2))
    (out, gradients), (expected, expected_gradients) = run(ours, x, grad), run(theirs, x, grad)
    assert_close_to_truth("out", out, expected, expected)
    for name, gradient in expected_gradients.items():
        scale = grad.abs().sum() if name == "conv_mask.bias" else gradient
        assert_close_to_truth(f"grad of {name}", gradients[name], gradient, gradient, scale)

    randomised(ours.float())
    back = mmcv_cnn.ContextBlock(in_channels, ratio, pooling_type, fusion_types)
    back.load_state_dict(ours.state_dict(), strict=True)
    for name, parameter in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], parameter), name


@pytest.mark.parametrize(
    "arguments",
    [
        {"pooling_type": "max"},
        {"fusion_types": "channel_add"},
        {"fusion_types": ("channel_sub",)},
        {"fusion_types": ()},
    ],
    ids=str,
)
def test_the_same_assertions(arguments):
    for block in (mmcv_cnn.ContextBlock, gc_cuda.ContextBlock):
        with pytest.raises(AssertionError):
            block(16, 1 / 4, **arguments)


def test_the_same_attributes():
    """What mmcv's users read off a block, and the name under which its plugin mechanism registers one."""
    theirs, ours = (block(64, ratio=1 / 16) for block in (mmcv_cnn.ContextBlock, gc_cuda.ContextBlock))
    for name in ("in_channels", "ratio", "planes", "pooling_type", "fusion_types", "_abbr_"):
        assert getattr(ours, name) == getattr(theirs, name), name


def stages(*blocks):
    """The blocks with a convolution between them, as in a backbone."""
    return nn.Sequential(*(module for block in blocks for module in (nn.Conv2d(16, 16, 3), block)))


@pytest.mark.parametrize("pooling_type", POOLINGS)
def test_accelerate(random, pooling_type, layout):
    blocks = [mmcv_cnn.ContextBlock(16, 1 / 4, pooling_type, fusion_types) for fusion_types in FUSIONS]
    report = check_accelerated(stages(*blocks), random(2, 16, 12, 13, layout=layout), len(blocks))
    assert {entry.kind for entry in report.entries} == {"mmcv.cnn.bricks.context_block.ContextBlock"}


class SELayer(nn.Module):
    """The parts of mmdetection's, which is not installed here, with mmcv's own ConvModule."""

    def __init__(self, channels, ratio=4, act_cfg=({"type": "ReLU"}, {"type": "Sigmoid"}), **options):
        super().__init__()
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        hidden = int(channels / ratio)
        self.conv1 = mmcv_cnn.ConvModule(channels, hidden, 1, act_cfg=act_cfg[0], **options)
        self.conv2 = mmcv_cnn.ConvModule(hidden, channels, 1, act_cfg=act_cfg[1], **options)

    def forward(self, x):
        return x * self.conv2(self.conv1(self.global_avgpool(x)))


SELayer.__module__ = "mmdet.models.layers.se_layer"
HARD_SIGMOID = {"type": "HSigmoid", "bias": 3.0, "divisor": 6.0}


@pytest.mark.filterwarnings("ignore:In MMCV v1.4.4")
@pytest.mark.parametrize(
    "act_cfg",
    [
        ({"type": "ReLU"}, {"type": "Sigmoid"}),
        ({"type": "Swish"}, {"type": "Sigmoid"}),
        ({"type": "HSwish"}, HARD_SIGMOID),
    ],
    ids=["ReLU", "Swish", "HSwish"],
)
def test_accelerate_se_layer(random, act_cfg):
    for bias in (True, False):
        check_accelerated(stages(SELayer(16, act_cfg=act_cfg, bias=bias)), random(2, 16, 9, 8), 1)


@pytest.mark.filterwarnings("ignore:In MMCV v1.4.4")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"act_cfg": ({"type": "GELU"}, {"type": "Sigmoid"})}, "activation GELU"),
        (
            {"act_cfg": ({"type": "ReLU"}, {"type": "HSigmoid", "bias": 1.0, "divisor": 2.0})},
            "gate HSigmoid with the constants (1.0, 2.0, 0.0, 1.0), not (3, 6, 0, 1)",
        ),
        ({"norm_cfg": {"type": "BN"}}, "conv1 is not a convolution and an activation"),
    ],
    ids=["activation", "gate", "norm"],
)
def test_se_layer_left_alone(options, reason):
    assert gc_cuda.accelerate(SELayer(16, **options)).left_alone == {"": reason}


@pytest.fixture
def registered():
    """gc_cuda.integrations.mmcv, imported anew; mmcv's own block is back in the registry afterwards."""
    from mmengine.registry import MODELS

    before = MODELS.get("ContextBlock")
    sys.modules.pop("gc_cuda.integrations.mmcv", None)
    yield importlib.import_module("gc_cuda.integrations.mmcv")
    MODELS.register_module(name="ContextBlock", force=True, module=before)


def test_importing_the_integration_registers_the_block(registered):
    name, block = mmcv_cnn.build_plugin_layer({"type": "ContextBlock", "ratio": 1 / 16}, in_channels=64)
    assert name == "context_block"
    assert type(block) is registered.ContextBlock
    assert isinstance(block, gc_cuda.ContextBlock)
    block.load_state_dict(mmcv_cnn.ContextBlock(64, 1 / 16).state_dict(), strict=True)


def test_custom_imports_of_a_config(registered, tmp_path):
    from mmengine.config import Config

    config = tmp_path / "config.py"
    config.write_text(
        "custom_imports = dict(imports=['gc_cuda.integrations.mmcv'], allow_failed_imports=False)\n"
        "plugin = dict(type='ContextBlock', ratio=1. / 4)\n"
    )
    plugin = Config.fromfile(config).plugin
    assert type(mmcv_cnn.build_plugin_layer(plugin, in_channels=16)[1]) is registered.ContextBlock


def test_zero_init_survives_the_init_of_a_resnet(registered, random):
    """mmdetection's backbone fills all of its convolutions, those of the block among them."""
    from mmengine.model import BaseModule, Sequential

    class Bottleneck(BaseModule):
        def __init__(self):
            super().__init__()
            self.conv3 = nn.Conv2d(16, 16, 1)
            name, block = mmcv_cnn.build_plugin_layer(
                {"type": "ContextBlock", "ratio": 1 / 4}, in_channels=16
            )
            self.add_module(name, block)

        def forward(self, x):
            return self.context_block(self.conv3(x))

    class ResNet(BaseModule):
        def __init__(self):
            super().__init__(init_cfg=[{"type": "Kaiming", "layer": "Conv2d"}])
            self.layer2 = Sequential(Bottleneck(), Bottleneck())

    net = ResNet()
    assert "layer2.0.context_block.channel_add_conv.3.weight" in net.state_dict()
    nn.init.ones_(net.layer2[1].context_block.channel_add_conv[3].weight)
    net.init_weights()
    x = random(2, 16, 5, 6, dtype=torch.float32)
    for bottleneck in net.layer2:
        assert torch.equal(bottleneck(x), bottleneck.conv3(x))


def test_call_by_keyword(registered, random):
    """mmsegmentation's GCHead."""
    block = registered.ContextBlock(
        in_channels=16, ratio=1 / 4.0, pooling_type="att", fusion_types=("channel_add",)
    )
    x = random(1, 16, 5, 6, dtype=torch.float32)
    assert torch.equal(block(x), x)


MMCV_1 = """
import sys, types
class Registry:
    def __init__(self): self.entries = {"ContextBlock": None}
    def register_module(self, name=None, force=False, module=None):
        assert force or name not in self.entries
        self.entries[name] = module
for name in ("mmcv", "mmcv.cnn"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["mmcv"].cnn = sys.modules["mmcv.cnn"]
sys.modules["mmcv.cnn"].PLUGIN_LAYERS = Registry()
sys.modules["mmengine"] = None
import gc_cuda.integrations.mmcv as integration
assert sys.modules["mmcv.cnn"].PLUGIN_LAYERS.entries == {"ContextBlock": integration.ContextBlock}
"""
NO_MMCV = """
import sys
sys.modules["mmcv"] = None
try:
    import gc_cuda.integrations.mmcv
except ImportError as error:
    assert "pip install" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.parametrize("program", [MMCV_1, NO_MMCV], ids=["mmcv 1.x", "no mmcv"])
def test_other_installations(program):
    """A double of mmcv 1.x, whose registry is its own and which has no mmengine; and none at all."""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("kind", ["gc_cuda", "registry", "accelerated"])
def test_what_mmcv_asserts_of_its_block(kind):
    """The assertions of mmcv's own unit test of ContextBlock."""
    import mmcv.cnn.bricks

    import gc_cuda.integrations.mmcv

    makers = {
        "gc_cuda": gc_cuda.ContextBlock,
        "registry": gc_cuda.integrations.mmcv.ContextBlock,
        "accelerated": mmcv.cnn.bricks.ContextBlock,
    }

    def new(*args, **kwargs):
        block = makers[kind](*args, **kwargs)
        if kind == "accelerated":
            assert gc_cuda.accelerate(block).accelerated
        return block

    for wrong in (
        {"pooling_type": "unsupport_type"},
        {"fusion_types": "unsupport_type"},
        {"fusion_types": ("unsupport_type",)},
    ):
        with pytest.raises(AssertionError):
            new(16, 1.0 / 4, **wrong)

    images = torch.randn(2, 16, 20, 20)
    block = new(16, 1.0 / 4, pooling_type="att")
    assert block.conv_mask.in_channels == 16
    assert block.conv_mask.out_channels == 1
    assert block(images).shape == images.shape
    block = new(16, 1.0 / 4, pooling_type="avg")
    assert hasattr(block, "avg_pool")
    assert block(images).shape == images.shape
    for fusions in (("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")):
        block = new(16, 1.0 / 4, fusion_types=fusions)
        assert (block.channel_add_conv is not None) == ("channel_add" in fusions)
        assert (block.channel_mul_conv is not None) == ("channel_mul" in fusions)
        assert block(images).shape == images.shape


@pytest.mark.parametrize("kind", ["gc_cuda", "registry", "accelerated"])
def test_a_hook_on_softmax_gets_the_attention(kind, random):
    import mmcv.cnn.bricks

    import gc_cuda.integrations.mmcv

    theirs = mmcv.cnn.bricks.ContextBlock(16, 1 / 4).double()
    maps = {}
    for name, block in (
        ("theirs", theirs),
        (
            "ours",
            {
                "gc_cuda": gc_cuda.ContextBlock(16, 1 / 4),
                "registry": gc_cuda.integrations.mmcv.ContextBlock(16, 1 / 4),
                "accelerated": mmcv.cnn.bricks.ContextBlock(16, 1 / 4),
            }[kind].double(),
        ),
    ):
        block.load_state_dict(theirs.state_dict(), strict=True)
        if name == "ours" and kind == "accelerated":
            gc_cuda.accelerate(block)
        block.softmax.register_forward_hook(lambda module, args, out, name=name: maps.update({name: out}))
        torch.manual_seed(0)
        block(torch.randn(2, 16, 5, 6, dtype=torch.float64))
    assert maps["ours"].shape == (2, 1, 30)
    torch.testing.assert_close(maps["ours"], maps["theirs"])
