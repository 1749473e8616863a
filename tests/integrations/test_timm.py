"""timm's real models: accelerated and restored, blocks inserted, checkpoints converted.

Needs timm and torchvision (./compile.sh cuda installs them beside a torch with CUDA); skipped where they are
absent.
"""

from __future__ import annotations

import copy

import pytest
import torch
from block_cases import Spy
from inserted import POSITIONS, check_by_hand, check_positions
from small_steps import assert_same_steps, steps
from torch import nn
from whole_models import (
    FLOAT32_CONSTANT,
    FLOAT64,
    assert_runs_fused,
    assert_same,
    awake,
    check_accelerated,
    check_inserted,
    check_inserted_after_the_norm,
    step,
)

import gc_cuda

timm = pytest.importorskip("timm", reason="timm is not installed")

from timm.layers import GlobalContext, SEModule  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite  # noqa: E402
from timm.models._features_fx import FeatureGraphNet  # noqa: E402

# timm's name of the model, its blocks, the bound
MODELS = {
    "gcresnet50t": (16, FLOAT64),
    "seresnet50": (16, FLOAT64),
    "legacy_seresnet18": (8, FLOAT64),
    "regnety_002": (13, FLOAT64),
    "efficientnet_b0": (16, FLOAT64),
    "mobilenetv3_small_100": (9, FLOAT32_CONSTANT),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(random, name):
    blocks, relative = MODELS[name]
    model = timm.create_model(name, num_classes=5).eval()
    check_accelerated(model, random(2, 3, 64, 48), blocks, relative)


def test_training_mode(random):
    """With batch statistics and running averages."""
    model = timm.create_model("regnety_002", num_classes=5).train()
    check_accelerated(model, random(4, 3, 64, 64), 13, 1e-8)


@pytest.mark.parametrize("use_attn", [True, False], ids=["attention", "mean"])
@pytest.mark.parametrize("fuse", [(True, False), (False, True), (True, True)], ids=["add", "scale", "both"])
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
def test_global_context(random, use_attn, fuse, gate, layout):
    """Any hidden width, and timm's own eps of 1e-6."""
    fuse_add, fuse_scale = fuse
    block = GlobalContext(
        24, use_attn=use_attn, fuse_add=fuse_add, fuse_scale=fuse_scale, rd_channels=5, gate_layer=gate
    )
    relative = FLOAT32_CONSTANT if gate == "hard_sigmoid" else FLOAT64
    check_accelerated(nn.Sequential(block), random(2, 24, 9, 7, layout=layout), 1, relative)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Hardswish], ids=lambda act: act.__name__)
@pytest.mark.parametrize("kind", [SEModule, SqueezeExcite], ids=lambda kind: kind.__name__)
def test_squeeze_excite(random, kind, act, layout):
    for gate in ("sigmoid", "hard_sigmoid"):
        block = kind(24, rd_channels=6, act_layer=act, gate_layer=gate)
        check_accelerated(nn.Sequential(block), random(2, 24, 9, 7, layout=layout), 1, FLOAT32_CONSTANT)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: GlobalContext(24, act_layer=nn.GELU), "activation GELU"),
        (lambda: GlobalContext(24, gate_layer="tanh"), "gate Tanh"),
        (lambda: SEModule(24, add_maxpool=True), "it pools by the maximum too"),
    ],
)
def test_left_alone(block, reason):
    assert gc_cuda.accelerate(block()).left_alone == {"": reason}


@pytest.mark.parametrize(
    ("block", "formula"),
    [
        (lambda: SEModule(24, bias=False), "x * sigmoid(W2 relu(W1 mean(x)))"),
        (lambda: SEModule(24, norm_layer=nn.BatchNorm2d), "conv2d batch_norm relu conv2d sigmoid of mean(x)"),
        (lambda: SEModule(24, act_layer=nn.Mish), "conv2d mish conv2d sigmoid of mean(x)"),
        (lambda: SqueezeExcite(24, gate_layer=nn.Softplus), "conv2d relu conv2d softplus of mean(x)"),
    ],
)
def test_options_beside_the_readers(random, block, formula):
    """Without biases the reader takes it; the other options are recognized by what they compute."""
    report = check_accelerated(nn.Sequential(block()).eval(), random(2, 24, 9, 7), 1)
    assert report.entries[0].formula.endswith(formula)


@pytest.mark.parametrize("fuse", [(True, False), (True, True)], ids=["add", "both"])
def test_convert_state_dict(random, fuse):
    """timm's parameters in our block and back, bit for bit."""
    fuse_add, fuse_scale = fuse
    theirs = awake(GlobalContext(32, fuse_add=fuse_add, fuse_scale=fuse_scale, rd_ratio=1 / 4))
    fusions = ("channel_add", "channel_mul")[: 1 + fuse_scale]
    ours = gc_cuda.ContextBlock(32, 1 / 4, "att", fusions, eps=1e-6).double()
    converted = gc_cuda.convert_state_dict(theirs.state_dict(), source="timm")
    ours.load_state_dict(converted, strict=True)
    x = random(2, 32, 9, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
    back = gc_cuda.convert_state_dict(ours.state_dict(), source="gc_cuda", target="timm")
    assert list(back) == list(gc_cuda.convert_state_dict(converted, "mmcv", "timm"))
    theirs.load_state_dict(back, strict=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_insert(random, name):
    model = timm.create_model(name, num_classes=5).eval().double()
    check_inserted(model, "se", random(1, 3, 64, 64))


# the channels after the first two convolutions of layer2; the third has 512
WIDTHS = {"resnet50": 128, "resnext50_32x4d": 256, "wide_resnet50_2": 256}


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("position", POSITIONS)
def test_insert_at_a_position(random, name, position):
    model, place = timm.create_model(name), "se" if position == "after_conv3" else "context_block"
    check_positions(model, position, place)
    bottleneck = model.layer2[0]
    channels = 512 if position == "after_conv3" else WIDTHS[name]
    assert bottleneck.get_submodule(place).in_channels == channels
    check_by_hand(bottleneck, {position: place}, random(2, 256, 6, 5))


def test_insert_beside_what_timm_has_there(random):
    """Squeeze-and-excitation after conv3, stochastic depth and anti-aliasing stay; the block is behind the
    latter, where the map has the size that conv2 gives it in other models."""
    model = timm.create_model("seresnet50", drop_path_rate=0.2, aa_layer=timm.layers.BlurPool2d)
    b = model.layer2[0]
    assert gc_cuda.insert(model, ["layer2"], position="after_conv2")[0] == "layer2.0.context_block"
    gc_cuda.insert(model, ["layer2"], position="after_conv1", postfix="_first")
    awake(b)
    x = random(2, 256, 7, 6)

    def by_hand():
        out = b.context_block_first(b.bn1(b.conv1(x)).relu())
        out = b.context_block(b.aa(b.bn2(b.conv2(out)).relu()))
        return (b.drop_path(b.se(b.bn3(b.conv3(out)))) + b.downsample(x)).relu()

    seen = []
    b.context_block.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    for accelerated in (False, True):
        assert (gc_cuda.accelerate(b).tails == [""]) if accelerated else True
        for training in (True, False):
            b.train(training)
            torch.manual_seed(5)
            actual = b(x)
            torch.manual_seed(5)
            torch.testing.assert_close(actual, by_hand(), rtol=1e-9, atol=1e-9)
    assert set(seen) == {(2, 128, 4, 3)}
    b.context_block._forward_hooks.clear()
    compiled = torch.compile(b, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), by_hand(), rtol=1e-9, atol=1e-9)


def test_insert_stands_after_the_norm(random):
    bottleneck = timm.create_model("resnet50").layer2[1].eval()
    model = nn.ModuleDict({"layer2": nn.Sequential(bottleneck)})
    assert gc_cuda.insert(model, ["layer2"], ratio=1 / 4, fusion_types=["channel_mul"]) == ["layer2.0.se"]
    check_inserted_after_the_norm(bottleneck, "se", random(1, 512, 7, 6))


def test_insert_refuses():
    with pytest.raises(ValueError, match=r"layer2\.0\.se is taken by a SEModule"):
        gc_cuda.insert(timm.create_model("seresnet50"))
    with pytest.raises(ValueError, match="made of \\['BasicBlock'\\]"):
        gc_cuda.insert(timm.create_model("resnet18"))


def test_an_inserted_model_is_accelerated_too(random):
    """Its own blocks need no help; the tails that they stand in are entries of the report."""
    model = timm.create_model("resnet50", num_classes=5).eval()
    gc_cuda.insert(model, ["layer4"])
    report = gc_cuda.accelerate(model)
    assert report.tails == ["layer4.0", "layer4.1", "layer4.2"] and len(report.entries) == 3


def test_copies(random):
    model = awake(timm.create_model("gcresnext26ts", num_classes=5).eval())
    gc_cuda.accelerate(model)
    twin, x = copy.deepcopy(model), random(1, 3, 64, 64)
    assert_runs_fused(twin.stages[0][0].attn)
    assert_same(step(twin, x), step(model, x), 0)


@pytest.mark.parametrize("name", ["efficientnet_b0", "gcresnet50t", "legacy_seresnet18", "seresnet50"])
def test_features_of_an_accelerated_model_by_fx(random, name):
    """timm makes the graph of the model that it is given: its blocks run fused where it was accelerated."""
    model = awake(timm.create_model(name, num_classes=5).eval())
    x = random(1, 3, 64, 64)
    expected = FeatureGraphNet(copy.deepcopy(model), (1, 4))(x)
    blocks = len(gc_cuda.accelerate(model).accelerated)
    features = FeatureGraphNet(model, (1, 4)).eval()
    with Spy() as spy:
        actual = features(x)
    assert spy.names().count("gc_cuda::global_context_kept") == blocks
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "middles"),
    [("mobilenetv3_small_100", 9), ("regnety_002", 13), ("gcresnext26ts", 8), ("seresnext26ts", 8)],
)
def test_middles_are_computed_again(random, name, middles):
    """Outputs, gradients and running statistics of a training step are those of eager."""
    plain = awake(timm.create_model(name, num_classes=5, drop_rate=0).train())
    ours = copy.deepcopy(plain)
    report = gc_cuda.accelerate(ours, recompute=True)
    assert len(report.middles) == middles and not report.middles_left_alone
    x = random(4, 3, 64, 64)
    with Spy() as spy:
        actual = steps(ours, x, 1)
    assert spy.names().count("gc_cuda::global_context_kept") == middles
    assert_same_steps(actual, steps(plain, x, 1), FLOAT32_CONSTANT)
