"""What test_openmmlab.py runs in a process of its own: mmdetection's published configs with its own backbone,
and mmsegmentation's own head, on mmcv-lite.

Both import the compiled operators of the full mmcv by name, which mmcv-lite lacks. Nothing here calls one:
they are stood in for, so that the imports succeed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path

import torch
from inserted import POSITIONS, check_by_hand
from small_steps import assert_same_steps, steps
from torch import nn

import gc_cuda


class AbsentOperators(types.ModuleType):
    """A module in which every name is there and none works."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {}) if name[0].isupper() else None
        setattr(self, name, value)
        return value


class OperatorsFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds mmcv.ops and whatever is asked for in it."""

    def find_spec(self, fullname, path, target=None):
        if not (fullname + ".").startswith("mmcv.ops."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return AbsentOperators(spec.name)

    def exec_module(self, module):
        pass


def randomised(model):
    """With blocks that are more than the identity."""
    torch.manual_seed(0)
    for block in blocks_of(model).values():
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def blocks_of(model):
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "ContextBlock"}


def results(model, x):
    """The outputs, and the gradients of all parameters."""
    model.zero_grad()
    outs = model(x)
    outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
    sum(out.square().mean() for out in outs).backward()
    return [*(out.detach() for out in outs), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(actual, expected):
    assert len(actual) == len(expected) > 1
    largest = max(float(tensor.abs().max()) for tensor in expected)  # the mask's bias has a gradient of 0
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12 * largest)


def published_backbones():
    """The backbones of configs/gcnet with blocks in them, but for those with deformable convolutions, which
    only the full mmcv has; without the ImageNet weights, which would be downloaded.
    """
    import mmdet
    from mmengine.config import Config

    found = {}
    for path in sorted((Path(mmdet.__file__).parent / ".mim" / "configs" / "gcnet").glob("*.py")):
        backbone = Config.fromfile(path).model.backbone
        if backbone.get("plugins") and not backbone.get("dcn"):
            backbone.pop("init_cfg", None)
            found[path.name] = backbone
    return found


def detection():
    """The configs build our block where they built mmcv's; a checkpoint of theirs loads strictly; new blocks
    are the identity after the backbone's init; `accelerate` serves what is built already. Same results.
    """
    import mmdet.models.backbones  # noqa: F401  registers them
    from mmdet.registry import MODELS

    backbones = published_backbones()
    assert len(backbones) >= 8, list(backbones)
    theirs = {name: randomised(MODELS.build(config)) for name, config in backbones.items()}
    for name, model in theirs.items():
        modules = {type(block).__module__ for block in blocks_of(model).values()}
        assert modules == {"mmcv.cnn.bricks.context_block"}, name
    integration = importlib.import_module("gc_cuda.integrations.mmcv")  # what custom_imports of a config does
    for name, config in backbones.items():
        ours = MODELS.build(config)
        blocks = blocks_of(ours)
        assert blocks.keys() == blocks_of(theirs[name]).keys(), name
        assert all(path.endswith(".context_block") for path in blocks), name
        assert all(type(block) is integration.ContextBlock for block in blocks.values()), name
        if name == min(backbones, key=lambda key: "r50" not in key):
            ours.init_weights()
            for block in blocks.values():
                x = torch.randn(1, block.in_channels, 5, 6)
                assert torch.equal(block(x), x), "a new block is the identity"
        ours.load_state_dict(theirs[name].state_dict(), strict=True)
        if "r50" in name:
            x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
            plain = theirs[name]
            for model in (plain, ours):
                model.double().train(False)  # mmdetection's returns nothing
            expected = results(plain, x)
            assert_same(results(ours, x), expected)
            report = gc_cuda.accelerate(plain)
            assert len(report.accelerated) == len(blocks) and not report.left_alone
            assert len(report.tails) == len(blocks), report.tails_left_alone
            assert_same(results(plain, x), expected)
        print(f"{name}: {len(blocks)} blocks")


def tails():
    """ResNet and ResNeXt of two stages, training, with norm_eval, with with_cp: three steps as eager's."""
    from mmdet.models.backbones import Res2Net, ResNet, ResNeXt

    plugin = {
        "cfg": {"type": "ContextBlock", "ratio": 1 / 4},
        "stages": (False, True),
        "position": "after_conv3",
    }
    sizes = {
        "num_stages": 2,
        "strides": (1, 2),
        "dilations": (1, 1),
        "out_indices": (1,),
        "plugins": [plugin],
    }
    x = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    for kind, options in (
        (ResNet, {"norm_eval": False}),
        (ResNet, {"norm_eval": True, "style": "caffe"}),
        (ResNet, {"norm_eval": False, "with_cp": True}),
        (ResNeXt, {"norm_eval": False, "groups": 32, "base_width": 4}),
    ):
        plain = Single(randomised(kind(depth=50, **sizes, **options)).double()).train()
        ours = copy.deepcopy(plain)
        report = gc_cuda.accelerate(ours)
        assert report.tails == [f"inner.layer2.{i}" for i in range(4)], str(report)
        assert [entry.kind for entry in report.entries if entry.part == "tail"] == [
            f"mmdet.models.backbones.{kind.__name__.lower()}.Bottleneck"
        ] * 4
        assert len(report.accelerated) == 4
        assert_same_steps(steps(ours, x), steps(plain, x), 1e-7)
        tracked = int(ours.inner.layer2[3].bn3.num_batches_tracked)
        assert tracked == (0 if options["norm_eval"] else 6 if "with_cp" in options else 3)
        twin = copy.deepcopy(ours)
        gc_cuda.restore(ours)
        assert [type(module) for module in ours.modules()] == [type(module) for module in plain.modules()]
        assert type(twin.inner.layer2[0]).__name__ == "AcceleratedBottleneck"
        print(f"{kind.__name__}, {options}")
    other = Res2Net(depth=50, scales=4, base_width=26, **sizes)
    reasons = set(gc_cuda.accelerate(other).tails_left_alone.values())
    assert reasons == {"Bottle2neck overrides forward of Bottleneck"}, reasons


def inserted_and_built(kind, stages, positions, **options):
    """A backbone with blocks from insert, and one with the plugins of a config: they have the same names."""
    ours, plugins = kind(**options), []
    for i, position in enumerate(positions):
        names = gc_cuda.insert(ours, stages, position=position, postfix=i or "")
        assert names[0] == f"layer2.0.context_block{i or ''}"
        cfg = {"type": "ContextBlock", "ratio": 1 / 16, "postfix": i or ""}
        has_it = tuple(f"layer{i + 1}" in stages for i in range(options.get("num_stages", 4)))
        plugins.append({"cfg": cfg, "stages": has_it, "position": position})
    theirs = kind(plugins=plugins, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return ours, theirs


def insertion():
    """What insert makes is what a config makes: names, strict loads both ways, results; and by hand."""
    from mmdet.models.backbones import RegNet, Res2Net, ResNet, ResNeXt

    sizes = {"num_stages": 2, "strides": (1, 2), "dilations": (1, 1), "out_indices": (1,), "norm_eval": False}
    x = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    for kind, options in (
        (ResNet, {"depth": 50}),
        (ResNet, {"depth": 50, "style": "caffe", "with_cp": True}),
        (ResNeXt, {"depth": 50, "groups": 32, "base_width": 4}),
        (ResNeXt, {"depth": 50, "groups": 2, "base_width": 64}),  # twice as wide
        (RegNet, {"arch": "regnetx_400mf"}),
    ):
        for positions in (*((one,) for one in POSITIONS), POSITIONS[1:]):
            with torch.device("meta"):
                whole = inserted_and_built(kind, ("layer2", "layer3", "layer4"), positions, **options)
            shapes = [[tensor.shape for tensor in one.state_dict().values()] for one in whole]
            assert shapes[0] == shapes[1]
            if kind is RegNet:
                continue
            ours, theirs = inserted_and_built(kind, ("layer2",), positions, **options, **sizes)
            ours.load_state_dict(randomised(theirs).state_dict(), strict=True)
            theirs.load_state_dict(ours.state_dict(), strict=True)
            assert {type(block) for block in blocks_of(ours).values()} == {gc_cuda.ContextBlock}
            models = [Single(model).double().train() for model in (ours, theirs)]
            assert_same_steps(*(steps(model, x, 1) for model in models), 1e-7)
            bottleneck = ours.layer2[0]
            bottleneck.with_cp = False  # which moves the statistics twice
            names = {one: f"context_block{i or ''}" for i, one in enumerate(positions)}
            check_by_hand(bottleneck, names, torch.randn(2, bottleneck.conv1.in_channels, 6, 5).double())
            print(f"{kind.__name__}, {options}, {positions}")
    ours = ResNet(depth=50)
    gc_cuda.insert(ours)
    ours.init_weights()
    for block in blocks_of(ours).values():
        assert not block.channel_add_conv[3].weight.any(), "the identity, although the backbone filled it"
    for other, message in (
        (Res2Net(depth=50, scales=4, base_width=26), "layer2.0 is a Bottle2neck with a forward of its own"),
        (ResNet(depth=18), "a BasicBlock has no place for a block: take a ResNet of 50 layers or more"),
    ):
        try:
            gc_cuda.insert(other)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"not refused: {message}")


class Single(nn.Module):
    """The last of a backbone's outputs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[-1]


def segmentation():
    """The head of mmsegmentation's GCNet, which asks no registry."""
    from mmseg.models.decode_heads import GCHead

    for fusion in (("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")):
        head = GCHead(
            in_channels=32,
            channels=16,
            num_classes=5,
            ratio=1 / 4,
            pooling_type="att",
            fusion_types=fusion,
            norm_cfg={"type": "BN"},
        )
        randomised(head).double().eval()
        x = [torch.randn(2, 32, 17, 19, dtype=torch.float64)]
        expected = results(head, x)
        assert len(gc_cuda.accelerate(head).accelerated) == 1
        assert_same(results(head, x), expected)
        print(f"GCHead, {fusion}")


def first_generation():
    """mmcv 1.x: its registry of plugins, its blocks accelerated, and their checkpoints."""
    sys.modules["torchvision"] = types.ModuleType("torchvision")  # imported for its URLs of checkpoints alone
    sys.modules["torchvision"].__version__ = "0"
    import mmcv
    from mmcv.cnn import build_plugin_layer

    assert mmcv.__version__.startswith("1."), mmcv.__version__
    for fusion in (("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")):
        for pooling in ("att", "avg"):
            config = {"type": "ContextBlock", "ratio": 1 / 4, "pooling_type": pooling, "fusion_types": fusion}
            sys.modules.pop("gc_cuda.integrations.mmcv", None)
            name, theirs = build_plugin_layer(config, in_channels=16)
            original = type(theirs)
            assert name == "context_block" and original.__module__ == "mmcv.cnn.bricks.context_block"
            randomised(theirs).double()
            x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
            expected = results(theirs, x)
            assert len(gc_cuda.accelerate(theirs).accelerated) == 1
            assert_same(results(theirs, x), expected)

            integration = importlib.import_module("gc_cuda.integrations.mmcv")
            name, ours = build_plugin_layer(config, in_channels=16)
            assert name == "context_block" and type(ours) is integration.ContextBlock
            ours.double().load_state_dict(theirs.state_dict(), strict=True)
            assert_same(results(ours, x), expected)
            mmcv.cnn.PLUGIN_LAYERS.register_module(force=True, module=original)
            print(f"mmcv {mmcv.__version__}, {pooling}, {fusion}")


PARTS = {
    "detection": detection,
    "tails": tails,
    "insertion": insertion,
    "segmentation": segmentation,
    "first generation": first_generation,
}

if __name__ == "__main__":
    sys.meta_path.insert(0, OperatorsFinder())
    PARTS[sys.argv[1]]()
