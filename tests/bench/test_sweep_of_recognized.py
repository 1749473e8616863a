"""The sweep finds blocks by the functions that run, without gc_cuda, and its page counts them."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, channels, pool="mean", act=nn.ReLU):
        super().__init__()
        self.pool, self.fc, self.act = pool, nn.Conv2d(channels, channels, 1), act()

    def forward(self, x):
        if self.pool == "mean":
            pooled = x.mean((2, 3), keepdim=True)
        elif self.pool == "max":
            pooled = nn.functional.adaptive_max_pool2d(x, 1)
        elif self.pool == "channels":
            pooled = x.mean(1, keepdim=True).expand_as(x)
        else:
            pooled = x
        return x * self.act(self.fc(pooled)).expand_as(x)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(8, 8, 1), inner

    def forward(self, x):
        return x + self.inner(self.conv(x))


@pytest.mark.parametrize(
    ("pool", "found"), [("mean", ["0.inner"]), ("max", ["0.inner"]), ("channels", []), ("none", [])]
)
def test_blocks(bench, pool, found):
    finder = bench("attention_blocks").Finder()
    with torch.device("meta"):
        net = nn.Sequential(Residual(Attention(8, pool)), nn.ReLU())
        assert list(finder.blocks_of(net, (8, 5, 6))) == found


def test_what_is_judged_once_is_known_by_its_structure(bench):
    blocks = bench("attention_blocks")
    finder = blocks.Finder()
    with torch.device("meta"):
        finder.blocks_of(nn.Sequential(Residual(Attention(8))), (8, 5, 6))
        wider, other = nn.Sequential(Attention(16)), nn.Sequential(Attention(16, "none"))
        assert list(finder.known_blocks_of(wider)) == ["0"]
        assert list(finder.known_blocks_of(other)) == []
    assert blocks.key_of(Attention(8)) == blocks.key_of(Attention(16))
    assert blocks.key_of(Attention(8)) != blocks.key_of(Attention(8, act=nn.SiLU))


def test_a_model_that_fails_shows_what_it_had_run(bench):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.se = Attention(8)

        def forward(self, x):
            raise NotImplementedError(str(self.se(x).shape))

    finder = bench("attention_blocks").Finder()
    with torch.device("meta"):
        net = Failing()
        with pytest.raises(NotImplementedError):
            finder.blocks_of(net, (8, 5, 6))
        assert list(finder.known_blocks_of(net)) == ["se"]


def found(family, *blocks):
    keys = "kind", "done", "said", "count"
    return {
        "family": family,
        "parameters": 1,
        "blocks": [dict(zip(keys, one)) for one in blocks],
        "error": "",
    }


def test_page(bench):
    page = bench("recognized_page")
    compared = {"model": "a", "pixels": 64, "evaluation": [0.0, 2e-15], "training": [1e-15, 3e-8]}
    times = {"model": "a", "direction": "inference", "served": 3, "pixels": 64, "batch": 4, "threads": 1}
    content = {
        "versions": {"timm": "1", "torchvision": "2", "torch": "3", "cpu": "some"},
        "models": {
            "a": found("net", ("SE", page.FUSED, "x * s", 2), ("SE", page.NAMED, "no map", 1)),
            "b": found("net", ("SE", page.FUSED, "x * s", 4), ("SE", page.LEFT, "maximum", 1)),
            "c": found("other"),
        },
        "compared": {f"net/SE/{page.FUSED}": compared},
        "times": [
            times | {"own ms": own, "ratio": ratio, "quartiles": [1, 1.1], "pairs": 9}
            for own, ratio in ((5.0, 1.01), (5.0, 1.04), (1.0, 2.0))
        ],
    }
    text = list(page.page(content))
    row = "| net | SE | one operation | `x * s` | 2 | 6 | a, 64² | 0, 2e-15 | 1e-15, 3e-8 |"
    assert row in text
    assert (
        "Of 3 architectures 2 have blocks, 1 have all of them served: 6 one operation, 1 left alone." in text
    )
    assert [line.split(" | ")[-1] for line in text if line.startswith("| a | inference")] == [
        *("yes |", "no |", "not judged |")
    ]
