"""convert_state_dict renames and reshapes the parameters of blocks, anywhere in a model, and nothing else."""

from __future__ import annotations

import re

import pytest
import torch

import gc_cuda

OURS = gc_cuda.ContextBlock(8, 1 / 2, "att", ("channel_add", "channel_mul")).state_dict()
TIMM = [
    "conv_attn.weight",
    "conv_attn.bias",
    *(
        f"{mlp}.{layer}.{kind}"
        for mlp in ("mlp_add", "mlp_scale")
        for layer in ("fc1", "norm", "fc2")
        for kind in ("weight", "bias")
    ),
]


def test_to_timm_and_back():
    theirs = gc_cuda.convert_state_dict(OURS, source="mmcv", target="timm")
    assert list(theirs) == TIMM
    assert theirs["mlp_add.norm.weight"].shape == (4,)
    back = gc_cuda.convert_state_dict(theirs, source="timm", target="gcnet")
    assert list(back) == list(OURS)
    for name, tensor in OURS.items():
        assert torch.equal(back[name], tensor)
        assert back[name].data_ptr() == tensor.data_ptr(), "nothing is copied"


def test_a_whole_model():
    """Other parameters keep their names, and blocks what comes before them."""
    model = {"stem.conv_mask_like.weight": torch.ones(1), "head.0.weight": torch.ones(2)}
    model |= {f"layer2.0.se.{name}": tensor for name, tensor in OURS.items()}
    converted = gc_cuda.convert_state_dict(model, source="gc_cuda", target="timm")
    assert list(converted) == [*list(model)[:2], *(f"layer2.0.se.{name}" for name in TIMM)]


def test_the_same_names_on_both_sides():
    assert list(gc_cuda.convert_state_dict(OURS, "gcnet", "mmcv")) == list(OURS)


def test_refusals():
    with pytest.raises(
        ValueError, match=re.escape("source must be one of ('gc_cuda', 'mmcv', 'gcnet', 'timm'), got 'keras'")
    ):
        gc_cuda.convert_state_dict(OURS, "keras")
    with pytest.raises(ValueError, match="target must be one of"):
        gc_cuda.convert_state_dict(OURS, "mmcv", "keras")
    with pytest.raises(ValueError, match=r"by the names of timm, such as conv_attn\.weight; got 14 others"):
        gc_cuda.convert_state_dict(OURS, "timm")
