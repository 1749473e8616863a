"""What a result depends on: the device, its clocks, the versions, and how busy the machine is."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from tables import cpu_name

import gc_cuda

ROOT = Path(__file__).parents[1]
# Of nvidia-smi: what it is asked for, and the name that it gets. Nothing is ever set.
QUERIES = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.max.mem": "max_memory_mhz",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}
UNKNOWN_CACHE = 64 * 2**20  # where the size of the last-level cache cannot be read


def slug(name: str) -> str:
    """The stem of a device's files: NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def output_of(*command: str, timeout: float = 20) -> str | None:
    """What a command prints; None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=timeout, cwd=ROOT, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """Of this source; ends in -dirty where it was changed (but for results and prose)."""
    described = output_of("git", "describe", "--always", "--abbrev=12")
    if described is None:
        return None
    changed = output_of(
        "git", "status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!*.md"
    )
    return described + "-dirty" * bool(changed)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse_numbers(line: str) -> list[float | None]:
    """The fields of one line of nvidia-smi's CSV; [N/A] is None."""
    return [float(field) if re.fullmatch(r"[\d.]+", field) else None for field in line.split(", ")]


def gpu_clocks() -> dict[str, float | None]:
    """Empty where nvidia-smi does not answer."""
    found = output_of("nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader,nounits")
    numbers = parse_numbers(found.splitlines()[0]) if found else []
    return dict(zip(QUERIES.values(), numbers)) if len(numbers) == len(QUERIES) else {}


def cpu_clocks() -> dict[str, float | None]:
    try:
        found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = []
    return {"highest_core_mhz": max(map(float, found))} if found else {}


def cache_bytes(device: str) -> int:
    """Of the last-level cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [UNKNOWN_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]])
    return max(sizes[1:], default=UNKNOWN_CACHE)


def device_of(device: str) -> dict[str, Any]:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {
            "kind": "cuda",
            "name": properties.name,
            "slug": slug(properties.name),
            "memory_bytes": properties.total_memory,
            "cache_bytes": cache_bytes(device),
            "capability": f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs",
            "clocks": gpu_clocks(),
        }
    return {
        "kind": "cpu",
        "name": cpu_name(),
        "slug": slug(cpu_name()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cache_bytes": cache_bytes(device),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "clocks": cpu_clocks(),
    }


def versions(device: str, stated_commit: str | None) -> dict[str, str | None]:
    driver = None
    if device == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gc_cuda": gc_cuda.__version__,
        "commit": stated_commit or commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver.splitlines()[0] if driver else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "timm": version_of("timm"),
        "torchvision": version_of("torchvision"),
    }


def allocator(device: str, reused: bool) -> str:
    """Where outputs get their memory: what decides, on a CPU, about maps above 32 MiB."""
    if device == "cuda":
        return "caching"
    return "reused pages" if reused else "fresh pages"


def describe(device: str, reused: bool, stated_commit: str | None = None) -> dict[str, Any]:
    """The head of a result; the stated commit is for a copy of the source of which git knows less."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device_of(device),
        "versions": versions(device, stated_commit),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "allocator": allocator(device, reused),
        "tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32 and device == "cuda",
            "products": torch.backends.cuda.matmul.allow_tf32 and device == "cuda",
        },
    }
