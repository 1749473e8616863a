"""timm's real residual blocks with their tail as one operation: training as eager's, in float64."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from block_cases import Spy
from torch import nn
from whole_models import assert_same, awake, step

import gc_cuda

timm = pytest.importorskip("timm", reason="timm is not installed")

from timm.layers import BatchNormAct2d, DropPath, convert_sync_batchnorm  # noqa: E402

# Tails of a model, by architecture: bottleneck and basic block, with groups, with blurring, without the
# final dilation, of the legacy code, and the one whose norm is in a ConvNormAct.
MODELS = {
    "seresnet18": 8,
    "seresnet50": 16,
    "seresnext26d_32x4d": 8,
    "seresnetaa50d": 16,
    "resnetrs50": 16,
    "legacy_seresnet50": 16,
    "legacy_seresnext26_32x4d": 8,
    "tresnet_m": 7,
}
SIZE = 2, 3, 64, 96
# Batch statistics of a few values per channel amplify roundings from one layer to the next.
RELATIVE = 1e-7


def training_step(model, x):
    """With the running statistics after it; the same random numbers every time."""
    torch.manual_seed(11)
    found = step(model, x)
    return found | {name: tensor.clone().double() for name, tensor in model.state_dict().items()}


def operations_in(spy):
    return [name for name in spy.names() if name.startswith("gc_cuda::bn_context_add_relu")]


def check_tails(plain, x, tails, relative=RELATIVE):
    """Two steps, the second one from what the first has left; each tail once forward and once backward."""
    ours = copy.deepcopy(plain)
    report = gc_cuda.accelerate(ours)
    assert len(report.tails) == tails and not report.tails_left_alone, str(report)
    for _ in range(2):
        expected = training_step(plain, x)
        with Spy() as spy:
            actual = training_step(ours, x)
        assert_same(actual, expected, relative)
        assert len(operations_in(spy)) == 2 * tails
    return ours


@pytest.mark.parametrize("name", MODELS)
def test_training(random, name):
    plain = awake(timm.create_model(name, num_classes=5)).train()
    check_tails(plain, random(*SIZE), MODELS[name])


@pytest.mark.parametrize("name", ["seresnet50", "legacy_seresnext26_32x4d", "tresnet_m"])
def test_evaluation(random, name, layout):
    plain = awake(timm.create_model(name, num_classes=5)).eval()
    check_tails(plain, random(*SIZE, layout=layout), MODELS[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("pooling", "fusions"), [("att", ["channel_add"]), ("avg", ["channel_mul", "channel_add"])]
)
def test_after_insert(random, training, pooling, fusions):
    plain = timm.create_model("resnet50", num_classes=5)
    gc_cuda.insert(plain, pooling_type=pooling, fusion_types=fusions)
    check_tails(awake(plain).train(training), random(*SIZE), 13)


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("name", ["seresnet18", "seresnext26d_32x4d", "tresnet_m"])
def test_drop_path_draws_what_eager_draws(random, name, scales):
    """And as many numbers: the classifier's dropout comes after."""
    plain = awake(timm.create_model(name, num_classes=5, drop_path_rate=0.6, drop_rate=0.5)).train()
    for module in plain.modules():
        if isinstance(module, DropPath):
            module.scale_by_keep = scales
    x = random(4, *SIZE[1:])
    ours = check_tails(plain, x, MODELS[name])
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, DropPath):
                module.eval()
    assert_same(training_step(ours, x), training_step(plain, x), RELATIVE)


def test_drop_path_of_all_images(random):
    plain = awake(timm.create_model("seresnet18", num_classes=5)).train()
    for block in plain.layer3:
        block.drop_path = DropPath(1.0)
    check_tails(plain, random(*SIZE), 8)


@pytest.mark.parametrize("synchronised", [False, True])
def test_batch_norm_with_an_identity_as_activation(random, synchronised):
    norm = partial(BatchNormAct2d, apply_act=False)
    plain = awake(timm.create_model("seresnet18", num_classes=5, norm_layer=norm))
    plain = convert_sync_batchnorm(plain) if synchronised else plain
    check_tails(plain.train(), random(*SIZE), 8)
    check_tails(plain.eval(), random(*SIZE), 8)


def test_wider_shortcut(random):
    """The legacy block adds anew: its result has the wider dtype, where timm's own `+=` keeps that of x."""
    x = random(*SIZE, dtype=torch.float32)
    for name, dtype in (("legacy_seresnext26_32x4d", torch.float64), ("seresnext26d_32x4d", torch.float32)):
        plain = timm.create_model(name, num_classes=5).eval()
        stage = plain.layer1
        stage[0].downsample = nn.Sequential(stage[0].downsample, WiderOutput())
        ours = copy.deepcopy(stage[:1])
        assert gc_cuda.accelerate(ours).tails == ["0"]
        y = x.mean(1, keepdim=True).repeat(1, stage[0].conv1.in_channels, 1, 1)
        assert ours(y).dtype == stage[0](y).dtype == dtype
        torch.testing.assert_close(ours(y), stage[0](y))


class WiderOutput(nn.Module):
    def forward(self, x):
        return x.double()


def hook(module):
    module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("name", "path", "change", "reason"),
    [
        ("seresnet18", "layer1.0", lambda b: setattr(b, "act2", nn.SiLU()), "activation SiLU"),
        ("seresnet18", "layer1.0", lambda b: hook(b.drop_path), "drop_path has a hook"),
        (
            "seresnet18",
            "layer1.0",
            lambda b: setattr(b, "drop_path", nn.Dropout(0.1)),
            "drop_path is a Dropout",
        ),
        ("tresnet_m", "body.layer1.0", lambda b: hook(b.conv2), "conv2 has a hook"),
        (
            "tresnet_m",
            "body.layer1.0",
            lambda b: setattr(b.conv2, "aa", nn.Identity()),
            "conv2 has anti-aliasing",
        ),
        (
            "tresnet_m",
            "body.layer1.0",
            lambda b: setattr(b.conv2.bn, "act", nn.ReLU()),
            "conv2.bn.act is a ReLU",
        ),
    ],
)
def test_left_alone(random, name, path, change, reason):
    """In the report, and when it comes later."""
    options = {} if name == "tresnet_m" else {"drop_path_rate": 0.1}
    plain = awake(timm.create_model(name, num_classes=5, **options))
    if name == "seresnet18":
        plain.layer1[0].drop_path = DropPath(0.1)
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    for model in (plain, ours):
        change(model.get_submodule(path))
    x = random(*SIZE)
    with Spy() as spy:
        actual = training_step(ours.train(), x)
    assert_same(actual, training_step(plain.train(), x), RELATIVE)
    assert len(operations_in(spy)) == 2 * (MODELS[name] - 1)
    assert gc_cuda.accelerate(plain).tails_left_alone == {path: reason}


def test_a_relu_before_the_block_leaves_no_tail():
    report = gc_cuda.accelerate(timm.create_model("legacy_seresnet18"))
    assert len(report.accelerated) == 8 and not report.tails and not report.tails_left_alone


def test_in_a_graph(random):
    torch.compiler.reset()
    plain = awake(timm.create_model("seresnet18", num_classes=5, drop_path_rate=0.3)).eval()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours)
    compiled, x = torch.compile(ours, backend="aot_eager", fullgraph=True), random(*SIZE)
    for training in (False, True):
        for model in (plain, ours):
            model.layer2[1].drop_path.train(training)
        found = []
        for model in (plain, compiled):
            torch.manual_seed(3)
            found.append(model(x))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    torch.compiler.reset()
