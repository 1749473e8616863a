"""The example trains, alone and under torchrun; it goes on exactly where it stopped; and its residual blocks,
whose ends are one operation, follow the same loss curve as the plain ones.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from block_cases import Spy
from paths import ROOT

for name in ("sklearn", "tqdm", "matplotlib"):
    pytest.importorskip(name, reason=f"{name} is not installed")

EXAMPLE = ROOT / "examples" / "train_digits.py"


def run(*arguments, processes=1):
    """What it printed, the progress bar aside."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), str(EXAMPLE), "--device", "cpu", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "step/s" in done.stderr, "no progress bar"
    return done.stdout


def test_its_residual_blocks_end_in_one_operation():
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    net = example.DigitsNet()
    with Spy() as spy:
        net(torch.randn(2, 1, 8, 8)).sum().backward()
    ours = [name for name in spy.names() if name.startswith("gc_cuda::")]
    assert (
        ours == ["gc_cuda::bn_context_add_relu_backward"] * 3 + ["gc_cuda::bn_context_add_relu_training"] * 3
    )
    assert [int(residual.norm2.num_batches_tracked) for residual in net.stages] == [1, 1, 1]


def test_the_fused_block_follows_the_same_loss_curve(tmp_path):
    """In float64, where no ReLU has a value so near to 0 that a rounding decides about it; two processes."""
    picture, checkpoint = tmp_path / "curves.png", tmp_path / "run.pt"
    options = [
        "--epochs",
        "2",
        "--dtype",
        "float64",
        "--picture",
        str(picture),
        "--checkpoint",
        str(checkpoint),
    ]
    printed = run("--compare", *options, processes=2)
    assert "fused: 44 steps" in printed and "plain PyTorch: 44 steps" in printed
    fused, plain = (
        torch.load(tmp_path / name, weights_only=True)["losses"] for name in ("run.pt", "run-plain.pt")
    )
    assert fused == pytest.approx(plain, rel=1e-9, abs=1e-9)
    assert fused[-1] < fused[0] / 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_exactly(tmp_path):
    run("--epochs", "2", "--checkpoint", str(tmp_path / "whole.pt"))
    run("--epochs", "2", "--checkpoint", str(tmp_path / "parts.pt"), "--stop-after", "1")
    assert len(torch.load(tmp_path / "parts.pt", weights_only=True)["losses"]) == 22
    run("--epochs", "2", "--checkpoint", str(tmp_path / "parts.pt"))
    whole, parts = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    assert whole["losses"] == parts["losses"] and len(whole["losses"]) == 44
    for name, tensor in whole["net"].items():
        assert torch.equal(tensor, parts["net"][name]), name
