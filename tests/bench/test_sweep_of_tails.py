"""The sweep over timm's models finds tails by what is computed, not by what accelerate serves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gc_cuda

pytest.importorskip("timm", reason="timm is not installed")

from timm.layers import SEModule


class Residual(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv, self.before, self.after = nn.Conv2d(8, 8, 1), before, after
        self.se = SEModule(8, rd_channels=4)

    def forward(self, x):
        return self.after(self.se(self.before(self.conv(x))) + x)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (nn.BatchNorm2d(8), nn.ReLU(), "batch_norm -> block -> addition -> relu"),
        (nn.BatchNorm2d(8), nn.ReLU(inplace=True), "batch_norm -> block -> addition -> relu"),
        (nn.BatchNorm2d(8), nn.SiLU(), "batch_norm -> block -> addition"),
        (nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), nn.ReLU(), "relu -> block"),
        (nn.Identity(), nn.ReLU(), "conv2d -> block"),
    ],
)
def test_patterns(bench, before, after, words):
    sweep = bench("timm_tails")
    with torch.device("meta"):
        net = Residual(before, after).to("meta").eval()
        recorder, uses = sweep.uses_of(net, torch.empty(1, 8, 4, 4))
    assert {name: sweep.pattern(recorder, use) for name, use in uses.items()} == {"se": words}
    assert gc_cuda.accelerate(net).tails == []
