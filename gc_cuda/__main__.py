"""``python -m gc_cuda``: the environment report, for people and for bug reports. Exit code 1 if not ready."""

from __future__ import annotations

import os
import platform
import sys

import torch

import gc_cuda
from gc_cuda import _extension, _toolkit


def _toolkit_line() -> str:
    try:
        toolkit = _toolkit.find_toolkit()
    except _toolkit.ToolkitError as error:
        return f"none: {error}"
    return f"{toolkit.version} at {toolkit.home} (found by {toolkit.found_by})"


def _extension_line(config: dict[str, str] | None) -> str:
    if config is None:
        return "not usable"
    cuda = f"CPU and CUDA {config['cuda']}" if config["cuda"] else "CPU only"
    return (
        f"{cuda}; version {config['version']} of sources {config['sources']}, built for torch "
        f"{config['torch']} by {config['compiler']}"
    )


def _devices() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of every visible GPU."""
    return [
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]


def _gpu_verdict(config: dict[str, str], devices: list[tuple[str, tuple[int, int]]]) -> str:
    """What can be done with the GPUs, and what to do if that is less than it could be."""
    if not config["cuda"]:
        if devices or torch.version.cuda:
            decision = _toolkit.describe_rebuild(
                torch.version.cuda, [capability for _, capability in devices]
            )
            return f"ready on the CPU only. Building again would give: {decision}"
        return "ready on the CPU"
    if not devices:
        return "ready on the CPU (built for CUDA, but no GPU is visible)"
    lacking = [one for one in devices if not _toolkit.covers(config["arch_list"], one[1])]
    if lacking:
        torch_cuda = torch.version.cuda or config["cuda"]
        too_old = _toolkit.unserved([capability for _, capability in lacking], config["cuda"], torch_cuda)
        advice = "; ".join(too_old) or "run ./compile.sh with TORCH_CUDA_ARCH_LIST unset"
        names = ", ".join(name for name, _ in lacking)
        return f"ready on the CPU, but there is no kernel image for {names}: {advice}"
    return f"ready on the CPU and {len(devices)} GPU{'s' if len(devices) > 1 else ''}"


def report() -> tuple[str, bool]:
    """The report, and whether the operators can be used."""
    config = _extension.build_config()
    devices = _devices()
    ready = config is not None
    verdict = f"not ready: {_extension.problem()}" if config is None else _gpu_verdict(config, devices)
    lines = {
        "gc_cuda": f"{gc_cuda.__version__} in {os.path.dirname(os.path.abspath(gc_cuda.__file__))}",
        "python": f"{platform.python_version()} at {sys.executable}, {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "toolkit": _toolkit_line(),
        "built": _extension_line(config),
        "architectures": (config and config["arch_list"]) or "none",
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "devices": "; ".join(f"{name} (sm_{major}{minor})" for name, (major, minor) in devices) or "none",
        "state": verdict,
    }
    return "\n".join(f"{name + ':':16}{value}" for name, value in lines.items()), ready


if __name__ == "__main__":
    text, ready = report()
    print(text)
    sys.exit(0 if ready else 1)
