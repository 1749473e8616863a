"""Programs of the tests that run as several processes of torch.distributed on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_processes(program: Path, *arguments: str, count: int = 2) -> str:
    """What they printed; all have to succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(program)]
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
