"""The resident memory that one training step of a variant of a model takes at its peak, in bytes; Linux only.

It is beyond what lies there before the step: the model, its gradients, and whatever the process has loaded or
compiled. Blocks from 1 MiB on are mapped one by one and go back when they are freed, so that nothing which an
earlier step has left counts as there already. bench/models.py --peak runs this for each variant.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import models
from cases import LAYOUTS

M_MMAP_THRESHOLD = -3
MAPPED_FROM = 2**20


def resident(what: str) -> int:
    """VmRSS, or VmHWM: its peak since `forget_peak`."""
    found = re.search(rf"^{what}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(call: Callable[[], object]) -> int:
    """Beyond what is there before; the call has run already."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, choices=models.MODELS)
    parser.add_argument("--variant", required=True, choices=models.EVERY)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--size", type=models.size_of, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    options.device = "cpu"
    options.recompute, options.tails = options.variant == models.RECOMPUTED, False
    if not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM):
        sys.exit("bench/peak.py needs glibc's mallopt")
    made, _, x = models.prepared(options.model, options)
    chosen = {options.variant: made[options.variant].train()}
    del made
    model = (models.compiled(chosen) if options.compile else chosen)[options.variant]

    def step() -> None:
        model(x).sum().backward()

    step()  # the gradients, which stay, and what is compiled
    step()
    print(peak_of(step))
    return 0


if __name__ == "__main__":
    sys.exit(main())
