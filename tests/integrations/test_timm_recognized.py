"""timm's blocks that are recognized by what they compute: a model of each family, in float64.

GC_CUDA_SWEEP='*' looks at every architecture of timm and torchvision, and compares the smallest model of each
family and class, as bench/recognized.py does for its page; another pattern takes the models that match.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys

import pytest
from block_cases import Spy
from paths import BENCH
from small_steps import assert_same_steps, steps
from whole_models import FLOAT32_CONSTANT, FLOAT64, awake, check_accelerated

import gc_cuda
from gc_cuda.recognition import plan

timm = pytest.importorskip("timm", reason="timm is not installed")

from timm.layers import create_attn  # noqa: E402

SWEEP = os.environ.get("GC_CUDA_SWEEP", "")

# timm's name of a model, its blocks, those of them that are one operation, and the bound
MODELS = {
    "rexnet_100": (13, 0, FLOAT64),  # batch norm between the layers
    "ese_vovnet19b_dw": (4, 0, FLOAT32_CONSTANT),  # one layer
    "hgnet_tiny": (5, 0, FLOAT64),  # one layer
    "rdnet_tiny": (15, 0, FLOAT32_CONSTANT),  # one layer
    "ecaresnet26t": (8, 0, FLOAT64),  # a convolution over channels
    "gcvit_xxtiny": (11, 0, FLOAT64),  # GELU, and no bias
    "cs3sedarknet_l": (21, 21, FLOAT64),
    "ghostnetv2_100": (7, 7, FLOAT32_CONSTANT),
}


@pytest.fixture(autouse=True)
def small_maps_gain(monkeypatch):
    for layout in ("NCHW", "CHANNELS_LAST"):
        monkeypatch.setattr(plan, f"LEAST_{layout}_BYTES", 0)


def model_of(name, **options):
    if name.startswith("gcvit"):
        options["img_size"] = 64  # its windows are made for one size
    return timm.create_model(name, num_classes=5, **options)


def operations_in(net, x):
    with Spy() as spy:
        net(x)
    names = spy.names()
    return names.count("gc_cuda::global_context_kept"), names.count("gc_cuda::pixel_sum")


@pytest.mark.parametrize("name", MODELS)
def test_models(random, name):
    blocks, whole, relative = MODELS[name]
    net, x = model_of(name).eval(), random(2, 3, 64, 64)
    report = check_accelerated(net, x, blocks, relative)
    assert all(entry.formula.startswith("x * ") for entry in report.entries if entry.part == "block")
    gc_cuda.accelerate(net, tails=False)
    fused, around = operations_in(net, x)
    assert fused == whole and around == blocks - whole


@pytest.mark.parametrize("name", ["rexnet_100", "ecaresnet26t"])
def test_training(random, name):
    """With batch statistics, in the blocks too, and running averages; a training step of eager's."""
    plain = awake(model_of(name, drop_rate=0)).train()
    ours = copy.deepcopy(plain)
    gc_cuda.accelerate(ours, tails=False)
    x = random(4, 3, 64, 64)
    assert_same_steps(steps(ours, x, 1), steps(plain, x, 1), 1e-7)


# timm's name of a layer, what has to be in the reason why it is left alone, or none
LAYERS = {
    "se": "",
    "ese": "",
    "eca": "",
    "ceca": "",  # its channels wrap around
    "ecam": "",
    "gca": "",
    "gc": "",
    "cbam": "max",
    "lcbam": "max",
    "sk": None,  # another kind of thing, which is not in the report
    "splat": None,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(random, name):
    why_not = LAYERS[name]
    block = create_attn(name, 32).double().eval()
    twin, x = copy.deepcopy(block), random(2, 32, 8, 8)
    report = gc_cuda.accelerate(block)
    if why_not == "":
        assert report.accelerated == [""], str(report)
    elif why_not is None:
        assert not report.accelerated
    else:
        assert not report.accelerated and report.left_alone
        assert any(why_not in reason for reason in report.left_alone.values()), str(report)
    assert_same_steps(steps(block, x, 1), steps(twin, x, 1), FLOAT32_CONSTANT)


def of_each_family():
    """The smallest model with blocks of each of timm's families, by the sweep's committed table."""
    compared = json.loads((BENCH / "results/timm-recognized.json").read_text())["compared"]
    return sorted({found["model"] for found in compared.values() if "error" not in found})


@pytest.fixture(scope="module")
def recognized():
    """bench/recognized.py, and its neighbours gone again."""
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("recognized")
    sys.path.remove(str(BENCH))
    for path in BENCH.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("name", of_each_family())
def test_a_model_of_each_family(recognized, name):
    """In float64, in both modes: all blocks served, outputs, gradients, and the same bits once restored."""
    if name.startswith("torchvision"):
        pytest.importorskip("torchvision", reason="torchvision is not installed")
    found = recognized.compare(name)
    assert found["served"] > 0 and found["restored"]
    assert max(found["evaluation"]) < 1e-6 and max(found["training"]) < 1e-5, found


@pytest.mark.skipif(not SWEEP, reason="GC_CUDA_SWEEP is not set: half an hour")
def test_every_architecture(monkeypatch, tmp_path):
    """No block is missing in a report, none is left alone, and all numbers are equal."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    monkeypatch.syspath_prepend(str(BENCH))
    recognized = importlib.import_module("recognized")
    file = tmp_path / "found.json"
    for command in ("look", "compare"):
        recognized.main([command, "--only", SWEEP, "--file", str(file)])
    content = json.loads(file.read_text())
    for path in BENCH.glob("*.py"):
        sys.modules.pop(path.stem, None)
    assert content["models"]
    for name, found in content["models"].items():
        done = {blocks["done"] for blocks in found["blocks"]}
        assert done <= {"one operation", "around its middle"}, f"{name}: {found}"
    for key, found in content["compared"].items():
        assert found["restored"], key
        assert max(found["evaluation"]) < 1e-6 and max(found["training"]) < 1e-5, f"{key}: {found}"
