"""bench/blocks.py, models.py and peak.py run, and reproduce the published numbers of parameters."""

from __future__ import annotations

import json
import sys

import pytest
import torch


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
    assert models.main([*options, "--models", "mobilenet_v3_large", "r16", "--kept"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [line.split(" | ")[:3] for line in printed if "→" in line]
    assert lines == [
        [f"| torchvision {name}", blocks, direction]
        for name, blocks in (("resnet50 + GC r16", "13"), ("mobilenet_v3_large", "8"))
        for direction in ("forward", "training")
    ]
    resnet, mobilenet = (line.strip("| ").split(" | ")[2:] for line in printed if models.KEPT in line)
    as_it_is, block_only, tails, plain = map(float, resnet)
    assert block_only == as_it_is > tails >= plain
    assert mobilenet[1] == "–"  # no bottlenecks, no tails


def test_tails_are_held_to_the_model_without_blocks(bench):
    models = bench("models")
    ms = {models.PLAIN: 12.0, models.BLOCK: 11.0, models.FUSED: 10.1, models.BARE: 10.0}
    for direction, line in (("training", 1.0), ("training, torch.compile", 1.02)):
        row = models.Row("a model", direction, 13, ms)
        assert row.line == line
        assert ("MISSED" in models.line(row)) == (line < 1.01)
    del ms[models.BLOCK]
    assert models.Row("no tails", "training", 13, ms).line is None
    assert "| 12.00 | – | 10.10 | 10.00 |" in models.line(models.Row("no tails", "training", 13, ms))


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("800x1344", (800, 1344))])
def test_sizes(bench, text, size):
    models = bench("models")
    assert models.sides(models.size_of(text)) == size
    assert models.sides(224) == (224, 224)


def test_the_peak_is_that_of_the_call(bench):
    peak = bench("peak")
    elements = 16 * 2**20

    def call():
        both = torch.ones(elements), torch.ones(elements)
        del both
        torch.ones(elements)

    call()
    try:
        found = peak.peak_of(call)
    except OSError as error:
        pytest.skip(f"the peak cannot be set back here: {error}")
    assert found == pytest.approx(2 * 4 * elements, rel=0.1)


def test_models_without_a_framework(bench, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert bench("models").main(["--device", "cpu", "--models", "gcresnet50t"]) == 1
    assert "left out" in capsys.readouterr().out
