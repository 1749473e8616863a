"""torchvision's real models: accelerated and restored, blocks inserted.

Needs torchvision (./compile.sh cuda installs it beside a torch with CUDA); skipped where it is absent.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from block_cases import Spy
from inserted import POSITIONS, check_by_hand, check_positions
from small_steps import assert_same_steps, steps
from torch import nn
from whole_models import (
    FLOAT32_CONSTANT,
    FLOAT64,
    awake,
    check_accelerated,
    check_inserted,
    check_inserted_after_the_norm,
    step,
)

import gc_cuda

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402
from torchvision.ops.misc import SqueezeExcitation  # noqa: E402

# the model, its blocks, the bound
MODELS = {
    "efficientnet_b0": (16, FLOAT64),
    "mobilenet_v3_small": (9, FLOAT32_CONSTANT),
    "regnet_y_400mf": (16, FLOAT64),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(random, name):
    blocks, relative = MODELS[name]
    model = torchvision.models.get_model(name, num_classes=5).eval()
    check_accelerated(model, random(2, 3, 64, 48), blocks, relative)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid], ids=lambda kind: kind.__name__)
def test_squeeze_excitation(random, activation, gate, layout):
    block = SqueezeExcitation(24, 7, activation=activation, scale_activation=gate)
    check_accelerated(nn.Sequential(block), random(2, 24, 9, 7, layout=layout), 1, FLOAT32_CONSTANT)


class WithScale(SqueezeExcitation):
    def _scale(self, input):
        return super()._scale(input) * 2


def test_left_alone():
    blocks = nn.ModuleList([SqueezeExcitation(24, 7, activation=nn.Mish), WithScale(24, 7)])
    assert gc_cuda.accelerate(blocks).left_alone == {
        "0": "activation Mish",
        "1": "WithScale overrides _scale of SqueezeExcitation",
    }


def fused(module, x):
    """The output, and how many blocks ran fused."""
    with Spy() as spy:
        out = module(x)
    return out, spy.names().count("gc_cuda::global_context_kept")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_feature_extractor_of_an_accelerated_model(random, training):
    """Its two graphs, of both modes, hold the blocks."""
    model = awake(torchvision.models.regnet_y_400mf(num_classes=5))
    x = random(2, 3, 64, 64)
    nodes = ["trunk_output.block1", "trunk_output.block2.block2-0.f.se"]
    plain = create_feature_extractor(copy.deepcopy(model), nodes).train(training)
    gc_cuda.accelerate(model)
    ours = create_feature_extractor(model, nodes).train(training)
    for extractor in (ours, copy.deepcopy(ours).train(training)):  # a copy of theirs starts in training
        actual, blocks = fused(extractor, x)
        assert blocks == 2
        for name, expected in plain(x).items():
            torch.testing.assert_close(actual[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_insert(random, name):
    model = torchvision.models.get_model(name, num_classes=5).eval().double()
    check_inserted(model, "context_block", random(1, 3, 64, 64))


# the channels after the first two convolutions of layer2; the third has 512
WIDTHS = {"resnet50": 128, "resnext50_32x4d": 256, "wide_resnet50_2": 256}


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("position", POSITIONS)
def test_insert_at_a_position(random, name, position):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    check_positions(model, position, "context_block")
    bottleneck = model.layer2[0].to_empty(device="cpu")
    for buffer in bottleneck.buffers():
        nn.init.ones_(buffer)
    assert bottleneck.context_block.in_channels == (512 if position == "after_conv3" else WIDTHS[name])
    check_by_hand(bottleneck, {position: "context_block"}, random(2, 256, 6, 5))


def test_insert_refuses_basic_blocks():
    with pytest.raises(ValueError, match=r"made of \['BasicBlock'\]; a BasicBlock has no place for a block"):
        gc_cuda.insert(torchvision.models.resnet18())


def test_insert_stands_after_the_norm(random):
    model = torchvision.models.resnet50().eval()
    gc_cuda.insert(model, ["layer2"], ratio=1 / 4, pooling_type="avg", fusion_types=["channel_mul"])
    check_inserted_after_the_norm(model.layer2[0], "context_block", random(1, 256, 10, 8))


def test_copies_of_an_inserted_model(random):
    model = torchvision.models.resnet50(num_classes=5).eval()
    gc_cuda.insert(model, ["layer4"])
    awake(model)
    x = random(1, 3, 64, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(twin.layer4[0]) is type(model.layer4[0])
        assert torch.equal(twin(x), model(x))
    assert "gradient of x" in step(model, x)


def test_insert_takes_device_dtype_and_mode():
    model = torchvision.models.resnet50().half().to("meta").eval()
    gc_cuda.insert(model, ["layer3"])
    block = model.layer3[0].context_block
    assert not block.training
    assert {(p.dtype, p.device.type) for p in block.parameters()} == {(torch.float16, "meta")}


def test_insert_refuses_and_leaves_everything():
    model = torchvision.models.resnet50()
    kind = type(model.layer2[0])
    with pytest.raises(ValueError, match="stages names 'layer5', which the model does not have; it has"):
        gc_cuda.insert(model, ["layer2", "layer5"])
    with pytest.raises(ValueError, match="stage 'fc' has no bottleneck"):
        gc_cuda.insert(model, ["layer2", "fc"])
    with pytest.raises(ValueError, match="at least one hidden unit"):
        gc_cuda.insert(model, ratio=1e-9)
    assert type(model.layer2[0]) is kind
    assert not hasattr(model.layer2[0], "context_block")


# Tails


def with_blocks(name="resnet50", **options):
    """Blocks in the last stage of a ResNet, whose other bottlenecks are no tails."""
    model = torchvision.models.get_model(name, num_classes=5)
    gc_cuda.insert(model, ["layer4"], **options)
    return awake(model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet50", {}),
        ("resnext50_32x4d", {"pooling_type": "avg", "fusion_types": ["channel_mul"]}),
    ],
)
def test_three_steps_with_tails(random, name, options):
    plain = with_blocks(name, **options)
    ours = copy.deepcopy(plain)
    report = gc_cuda.accelerate(ours)
    assert report.tails == [f"layer4.{i}" for i in range(3)] and not report.tails_left_alone
    assert {entry.kind for entry in report.entries} == {"torchvision.models.resnet.Bottleneck"}
    x = random(2, 3, 64, 48)
    assert_same_steps(steps(ours, x), steps(plain, x), 1e-7)
    assert int(ours.layer4[2].bn3.num_batches_tracked) == 3


def test_copies_of_a_model_with_tails(random):
    model = with_blocks().eval()
    kinds = [type(module) for module in model.modules()]
    gc_cuda.accelerate(model)
    x = random(1, 3, 64, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(twin.layer4[0]) is type(model.layer4[0])
        assert torch.equal(twin(x), model(x))
        gc_cuda.restore(twin)
        assert [type(module) for module in twin.modules()] == kinds
        torch.testing.assert_close(twin(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("error::UserWarning")  # of graphs that differ between the modes
def test_feature_extractor_of_a_model_with_tails(random):
    """The bottlenecks' nodes keep their names and the blocks are nodes, unless the bottlenecks are leaves."""
    plain, x = with_blocks().eval(), random(1, 3, 64, 64)
    model = copy.deepcopy(plain)
    leaves = [type(model.get_submodule(name)) for name in gc_cuda.accelerate(model).tails]
    for nodes, options in (
        (["layer4.0.bn3", "layer4.1.context_block", "layer4.2.relu_2"], {}),
        (["layer4"], {"tracer_kwargs": {"leaf_modules": leaves}}),
    ):
        actual, blocks = fused(create_feature_extractor(model, nodes, **options).eval(), x)
        assert blocks == (0 if options else 3)
        for name, expected in create_feature_extractor(plain, nodes).eval()(x).items():
            torch.testing.assert_close(actual[name], expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"'layer4\.0\.context_block\.softmax' is not present in model"):
        create_feature_extractor(model, ["layer4.0.context_block.softmax"])


@pytest.mark.parametrize(
    ("name", "middles"), [("mobilenet_v3_small", 9), ("regnet_y_400mf", 16), ("efficientnet_b0", 16)]
)
def test_middles_are_computed_again(random, name, middles):
    """Outputs, gradients and running statistics of a training step are those of eager."""
    plain = awake(torchvision.models.get_model(name, num_classes=5).train())
    for module in plain.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    ours = copy.deepcopy(plain)
    report = gc_cuda.accelerate(ours, recompute=True)
    assert len(report.middles) == middles and not report.middles_left_alone
    x = random(4, 3, 64, 64)
    with Spy() as spy:
        actual = steps(ours, x, 1)
    assert spy.names().count("gc_cuda::global_context_kept") == middles
    assert_same_steps(actual, steps(plain, x, 1), FLOAT32_CONSTANT)
