"""bench/blocks.py and bench/models.py run, and reproduce the published numbers of parameters."""

from __future__ import annotations

import json
import sys

import pytest


def test_blocks(bench, tmp_path, capsys):
    blocks = bench("blocks")
    file = tmp_path / "blocks.json"
    options = ["--device", "cpu", "--stages", "c3", "--shrink", "16", "--seconds", "0.001", "--rounds", "1"]
    assert blocks.main([*options, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "GC r16: +2.522 M parameters (published: +2.522 M)" in printed
    assert "GC r4: +10.001 M parameters (published: +10.001 M)" in printed
    found = {row["block"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(found) == ["NL", "SNL", "SE r16", "GC r16", "GC r4"]
    pixels, c = 6 * 10, 512
    x_mib = pixels * c * 4 / 2**20
    assert found["GC r16"]["gigaflops"] == pytest.approx((4 * c * pixels + 4 * c * 32) / 1e9)
    for name in ("SNL", "SE r16", "GC r16", "GC r4"):
        assert x_mib <= found[name]["kept_mib"] <= 1.2 * x_mib
    assert found["NL"]["gigaflops"] > 100 * found["GC r16"]["gigaflops"]


def test_models(bench, capsys):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    models = bench("models")
    options = ["--device", "cpu", "--batch", "1", "--size", "64", "--seconds", "0.001", "--rounds", "1"]
    assert models.main([*options, "--models", "mobilenet_v3_large", "r16"]) == 0
    lines = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines() if "→" in line]
    assert lines == [
        [f"| torchvision {name}", blocks, direction]
        for name, blocks in (("resnet50 + GC r16", "13"), ("mobilenet_v3_large", "8"))
        for direction in ("forward", "training")
    ]


def test_models_without_a_framework(bench, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert bench("models").main(["--device", "cpu", "--models", "gcresnet50t"]) == 1
    assert "left out" in capsys.readouterr().out
