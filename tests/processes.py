"""Programs of the tests that run as several processes of torch.distributed on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

SECONDS = 180  # they take about 6 s


def run_processes(program: Path, *arguments: str, count: int = 2) -> str:
    """What they printed; all have to succeed. Those that do not end are stopped, with all they started."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(program)]
    started = subprocess.Popen(
        [sys.executable, *command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, error = started.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGTERM)  # it ends its processes
        try:
            _, error = started.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            error = ""
        raise AssertionError(f"{program.name} did not end in {SECONDS} s\n{error[-4000:]}") from None
    assert started.returncode == 0, error[-4000:]
    return out
