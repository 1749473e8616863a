"""What a block's kernels move between the GPU and its memory, as Nsight Compute counts it.

Run by itself it makes one call of one peer between cudaProfilerStart and -Stop, for `ncu --profile-from-start
off` to watch; `measured` runs it like that. ncu empties the caches before each kernel, so that what one
kernel leaves there for the next counts as read once more, and what a kernel has written may be counted after
its end or not at all.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from typing import Any

import torch
from cases import Case, make
from peers import peers

METRICS = {"dram__bytes_read.sum": "read_bytes", "dram__bytes_write.sum": "written_bytes"}
TIMEOUT = 60.0


def parse(text: str) -> dict[str, int]:
    """The sums over all kernels in ncu's CSV, and how many kernels there were; empty without any."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, int] = {}
    kernels = set()
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        name = METRICS.get(row.get("Metric Name") or "")
        if name is None:
            continue
        kernels.add(row["ID"])
        found[name] = found.get(name, 0) + round(float(row["Metric Value"].replace(",", "")))
    return {**found, "kernels": len(kernels)} if found else {}


def reason_in(text: str) -> str:
    """Why ncu says that it cannot."""
    said = [line.strip("= ") for line in text.splitlines() if "==ERROR==" in line]
    said = [line.removeprefix("ERROR").strip("= ") for line in said]
    return said[0] if said else (text.strip().splitlines() or ["it said nothing"])[-1]


def measured(case: Case, peer: str) -> tuple[dict[str, int], str]:
    """Bytes of one call, or why there are none."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return {}, "there is no ncu on the PATH"
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--print-units", "base"]
    command += ["--metrics", ",".join(METRICS), "--csv", sys.executable, __file__, peer, json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, f"ncu did not finish: {type(error).__name__}"
    found = parse(done.stdout)
    return found, "" if found else f"ncu counted nothing: {reason_in(done.stdout + done.stderr)}"


def case_of(fields: list[Any]) -> Case:
    """From the command line's JSON."""
    case = Case(*fields)
    return case._replace(size=tuple(case.size))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("peer")
    parser.add_argument("case", type=json.loads, help="the fields of cases.Case as a JSON list")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/traffic.py needs a CUDA device, and none is visible", file=sys.stderr)
        return 1
    calls, missing = peers(make(case_of(options.case), "cuda"), compiled=options.peer == "torch.compile")
    if options.peer not in calls:
        print(missing.get(options.peer, f"no such peer: {options.peer}"), file=sys.stderr)
        return 1
    call = calls[options.peer]
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
