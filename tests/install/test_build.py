"""What was built: versions, the report, the words of setup.py, compile.sh and bench/gpu.sh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT, TESTS

from gc_cuda import _extension


def test_versions_agree() -> None:
    config = _extension.build_config()
    assert config is not None
    source = (ROOT / "gc_cuda" / "__init__.py").read_text()
    assert f'__version__ = "{config["version"]}"' in source
    assert config["torch"] == torch.__version__


def test_report_says_that_it_is_ready() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gc_cuda"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in (
        "gc_cuda:",
        "python:",
        f"torch:          {torch.__version__}",
        "devices:",
        "ready on the CPU",
    ):
        assert word in done.stdout


def test_build_says_what_is_wrong_with_force_cuda() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    environ = {**os.environ, "FORCE_CUDA": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "FORCE_CUDA=1, but the torch here was made without CUDA" in done.stderr


def test_unknown_verb_prints_the_usage() -> None:
    done = subprocess.run([ROOT / "compile.sh", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "./compile.sh test" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_gpu_script_without_gpu_says_so(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), str(tmp_path / "out")],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_folders_of_the_tests_mirror_those_of_the_package() -> None:
    folders = {path.parent.name for path in (ROOT / "gc_cuda").glob("*/*.py")}
    assert "blocks" in folders
    assert folders <= {path.parent.name for path in TESTS.glob("*/test_*.py")}
