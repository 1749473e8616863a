"""mmdetection's configs/gcnet, mmsegmentation's GCHead and mmcv 1.x, as published, in their own process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import TESTS

WORKER = Path(__file__).with_name("openmmlab_worker.py")


def run(part, *folders):
    """With modules of these folders before others."""
    path = os.pathsep.join([*folders, str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(WORKER), part],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "something was compared"


@pytest.mark.parametrize(
    ("part", "package"),
    [("detection", "mmdet"), ("tails", "mmdet"), ("insertion", "mmdet"), ("segmentation", "mmseg")],
)
def test_published_models(part, package):
    lacking = [name for name in ("mmcv", "mmengine", package) if importlib.util.find_spec(name) is None]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} not installed")
    run(part)


def test_the_first_generation_of_mmcv():
    """It cannot be in one environment with the second: GC_CUDA_MMCV1 names a folder that holds it, made with
    setuptools < 80 by

        MMCV_WITH_OPS=0 pip install --no-deps --no-build-isolation --target FOLDER mmcv==1.7.2
    """
    folder = os.environ.get("GC_CUDA_MMCV1")
    if not folder:
        pytest.skip("GC_CUDA_MMCV1 names no folder with mmcv 1.x")
    run("first generation", folder)
