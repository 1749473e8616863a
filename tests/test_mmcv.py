"""ContextBlock stands in for mmcv's: same parameters from the same seed, state_dict both ways, same results.

Needs mmcv-lite and mmengine (./compile.sh test installs them); skipped where they are absent.
"""

from __future__ import annotations

import pytest
import torch
from test_blocks import FUSIONS, POOLINGS, randomised, run
from tolerance import assert_close_to_truth

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
