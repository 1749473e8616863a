"""bench/latency.py checks before it times: a right run returns 0 and leaves its files, a wrong one 1."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import gc_cuda

BENCH = Path(__file__).parents[1] / "bench"
ARGUMENTS = ["--quick", "--stages", "16x9x14", "--seconds", "0.01", "--device", "cpu", "--no-compile"]


@pytest.fixture
def latency(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("latency")
    for name in ("latency", "report"):
        sys.modules.pop(name, None)


def test_a_run_leaves_a_table_and_files(latency, tmp_path, capsys):
    assert latency.main([*ARGUMENTS, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "n/a: 16x9x14 nchw, torch.compile: switched off by --no-compile" in printed

    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert [(row["layout"], row["peer"]) for row in content["rows"]] == [
        ("nchw", "gc_cuda"),
        ("nchw", "eager"),
        ("channels_last", "gc_cuda"),
        ("channels_last", "eager"),
    ]
    for row in content["rows"]:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        moved = 3 * 16 * 9 * 14 * 4  # read, read, write
        assert row["gigabytes_per_second"] == pytest.approx(moved / (row["p50_ms"] * 1e-3) / 1e9)
        assert f"{row['p50_ms']:.3f}" in printed
    assert "| 16x9x14 1x16x9x14 | nchw | gc_cuda |" in path.with_suffix(".md").read_text()


def test_a_wrong_result_fails_the_run_and_is_not_timed(latency, tmp_path, capsys, monkeypatch):
    right = gc_cuda.ContextBlock.forward
    monkeypatch.setattr(gc_cuda.ContextBlock, "forward", lambda block, x: right(block, x) * (1 + 1e-5))
    assert latency.main([*ARGUMENTS, "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "WRONG 16x9x14 nchw: the output of gc_cuda is off by" in printed.err
    (path,) = tmp_path.glob("*.json")
    assert {row["peer"] for row in json.loads(path.read_text())["rows"]} == {"eager"}


def test_a_nan_is_wrong(latency):
    assert not latency.is_right(float("nan"), 1.0)


def test_without_a_compiler_the_rest_is_timed(latency, tmp_path, capsys, monkeypatch):
    def unavailable(*arguments, **options):
        raise RuntimeError("no C++ compiler found\nand a long story")

    monkeypatch.setattr("torch.compile", unavailable)
    arguments = [argument for argument in ARGUMENTS if argument != "--no-compile"]
    assert latency.main([*arguments, "--output", str(tmp_path)]) == 0
    reason = "n/a: 16x9x14 nchw, torch.compile: does not run here: no C++ compiler found"
    assert reason in capsys.readouterr().out


def test_picture(latency, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert latency.main([*ARGUMENTS, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.png")
    from matplotlib import image

    pixels = image.imread(path)
    height, width = pixels.shape[:2]
    assert width > 600
    assert height > 400
    assert len({tuple(pixel) for pixel in pixels[:: height // 40, :: width // 60].reshape(-1, 4)}) > 3
