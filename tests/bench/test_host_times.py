"""bench/host_times.py: what calls take the host, against what they are held to; the step of bench/gpu.sh."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from evaluate import missing_gpu
from paths import BENCH

NO_GPU = missing_gpu()


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


CALLS = {
    "x + 1",
    "forward",
    "eager forward",
    "identity",
    "forward with gradients",
    "eager forward with gradients",
    "identity step",
    "step",
    "eager step",
}


@pytest.fixture
def one_thread(threads):
    threads(1)


@pytest.mark.usefixtures("one_thread")
def test_host_times_on_a_cpu(bench, tmp_path, capsys):
    file = tmp_path / "times.json"
    assert bench("host_times").main(["--device", "cpu", "--samples", "2", "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["device"]
    assert content["torch"] == torch.__version__
    assert {name: set(us) for name, us in content["us"].items()} == {"1x64x7x7": CALLS}
    us = content["us"]["1x64x7x7"]
    assert all(0.1 < time < 1e5 for time in us.values())
    assert us["x + 1"] < us["identity"] < us["identity step"]
    rows = {cells_of(line)[1]: cells_of(line) for line in capsys.readouterr().out.splitlines() if "|" in line}
    for call, base, goal in (
        ("forward", "x + 1", "4"),
        ("forward with gradients", "identity", "2.6"),
        ("step", "identity step", "2"),
    ):
        assert rows[call][3] == base
        assert float(rows[call][4]) == pytest.approx(us[call] / us[base], abs=0.006)
        assert rows[call][5] == goal
    assert rows["eager step"][3:] == ["", "", ""]


@pytest.mark.usefixtures("one_thread")
def test_host_times_calls_what_it_names(bench):
    """Without gradients there are none, a step leaves none behind, and the block is ours or the reference."""
    host_times = bench("host_times")
    calls = host_times.calls_on("cpu", 1 / 4, (1, 16, 5, 7))
    assert set(calls) == CALLS
    with torch.no_grad():
        ours, eager = calls["forward"](), calls["eager forward"]()
    assert not ours.requires_grad
    assert not eager.requires_grad
    torch.testing.assert_close(calls["x + 1"]() - 1, calls["identity"]())
    for name in ("identity", "forward with gradients", "eager forward with gradients"):
        assert calls[name]().requires_grad

    block = torch.nn.Linear(3, 3)
    x, seen = torch.randn(2, 3, requires_grad=True), []
    x.register_post_accumulate_grad_hook(lambda tensor: seen.append(tensor.grad.clone()))
    host_times.step_of(block, x, list(block.parameters()))()
    assert len(seen) == 1
    assert {tensor.grad for tensor in (x, *block.parameters())} == {None}


@pytest.mark.usefixtures("one_thread")
def test_each_call_runs_its_own_block(bench, monkeypatch):
    host_times = bench("host_times")
    ran = []
    blocks = {
        "ours": host_times.gc_cuda.ContextBlock,
        "eager": host_times.gc_cuda.reference.ContextBlock,
    }
    for whose, kind in blocks.items():

        def forward(block, x, whose=whose, right=kind.forward):
            ran.append(whose)
            return right(block, x)

        monkeypatch.setattr(kind, "forward", forward)
    for name, call in host_times.calls_on("cpu", 1 / 4, (1, 16, 5, 7)).items():
        ran.clear()
        call()
        neither = name in ("x + 1", "identity", "identity step")
        expected = [] if neither else ["eager" if "eager" in name else "ours"]
        assert ran == expected, name


def test_host_times_leave_the_wait_out(bench, monkeypatch):
    host_times = bench("host_times")
    now, log = [0.0], []

    def takes(what, seconds):
        log.append(what)
        now[0] += seconds

    monkeypatch.setattr(host_times.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: takes("w", 1.0))
    assert host_times.host_us(lambda: takes("a", 25e-6), "cuda", 4) == pytest.approx(25)
    rows = "".join(log).strip("w").split("w")
    assert rows == ["a" * host_times.CALLS] * 6
    assert (log[0], log[-1]) == ("w", "w")


def test_host_times_are_compared_on_one_device_alone(bench, tmp_path, capsys):
    times = {"1x64x7x7": {"x + 1": 2.0, "forward": 12.0}}
    files = {
        "before": {"device": "A", "torch": "2", "us": times},
        "after": {
            "device": "A",
            "torch": "2",
            "us": {"1x64x7x7": {"forward": 6.0, "step": 5.0}, "c5": {"step": 1}},
        },
        "another": {"device": "B", "torch": "2", "us": times},
    }
    paths = {name: tmp_path / name for name in files}
    for name, content in files.items():
        paths[name].write_text(json.dumps(content))
    main = bench("host_times").main
    assert main(["--compare", str(paths["before"]), str(paths["after"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cells_of(line) for line in lines[2:]] == [["1x64x7x7", "forward", "12.00", "6.00", "0.50"]]
    assert main(["--compare", str(paths["before"]), str(paths["another"])]) == 2
    assert "not the same device: A and B" in capsys.readouterr().err
    assert main(["--compare", str(paths["before"]), str(tmp_path / "none")]) == 2


# --- bench/gpu.sh ---

PYTHON = """#!/usr/bin/env bash
if [[ $1 == - ]]; then
  cat > /dev/null
  echo Invented-GPU
else
  echo "${PYTHONPATH%%:*} $*" >> "$CALLS"
fi
"""


@pytest.mark.parametrize("before", ["", "/before"])
def test_the_step_of_the_gpu_script(tmp_path, before):
    """One run alone; two of each checkout in turn, and their comparison, where another is named."""
    python, log, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"PYTHON": str(python), "CALLS": str(log), "BEFORE": before}
    done = subprocess.run(
        ["bash", str(BENCH / "gpu.sh"), str(out), "host"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"==> host (about {80 if before else 20} s on an H100)" in done.stdout
    root = str(BENCH.parent)
    runs = [line.split() for line in log.read_text().splitlines()]
    assert {Path(run[1]).name for run in runs} == {"host_times.py"}
    files = [(run[0], Path(run[-1]).name) for run in runs]
    if before:
        once = [(before, "host-before.json"), (root, "host.json")]
        assert files == [*once, *once, (root, "host.json")]
        assert "--compare" in runs[-1]
    else:
        assert files == [(root, "host.json")]


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU != "", reason=NO_GPU)
def test_host_times_on_a_gpu(bench, tmp_path):
    file = tmp_path / "times.json"
    assert bench("host_times").main(["--device", "cuda", "--samples", "3", "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["device"] == torch.cuda.get_device_name()
    assert {name: set(us) for name, us in content["us"].items()} == {"1x64x7x7": CALLS, "c5": CALLS}
    assert all(0.5 < us < 1e5 for times in content["us"].values() for us in times.values())
