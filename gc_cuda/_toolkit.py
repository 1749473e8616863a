"""Which CUDA toolkit is here, whether to build for CUDA, and for which architectures.

Standard library only: setup.py reads this file by its path before the package can be imported, and
``python -m gc_cuda`` reports what it finds. What torch knows comes in as arguments.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

Capability = tuple[int, int]

# An architecture, the CUDA version that brought it and the one that dropped it. Cards between two entries
# (8.7, 10.3, 12.1) run the code of the lower one with the same first number.
_ARCHITECTURES: tuple[tuple[str, Capability, Capability | None], ...] = (
    ("7.0", (9, 0), (13, 0)),
    ("7.5", (10, 0), None),
    ("8.0", (11, 0), None),
    ("8.6", (11, 1), None),
    ("8.9", (11, 8), None),
    ("9.0", (11, 8), None),
    ("10.0", (12, 8), None),
    ("12.0", (12, 8), None),
)


class Toolkit(NamedTuple):
    """A CUDA toolkit: a folder with bin/nvcc."""

    home: str
    version: str  # "13.0"
    found_by: str  # how it was found, for people


class Decision(NamedTuple):
    """What to build, and why."""

    toolkit: Toolkit | None  # None: build for the CPU only
    arch_list: str  # as in TORCH_CUDA_ARCH_LIST; "" for the CPU only
    reason: str
    surprising: bool  # CUDA could have been expected and is not built

    def describe(self) -> str:
        """One line that says what is built and why."""
        what = "CPU only" if self.toolkit is None else f"CPU and CUDA for {self.arch_list}"
        return f"{what} ({self.reason})"


class ToolkitError(RuntimeError):
    """No usable CUDA toolkit; the message says what was looked for and what to do."""


class UnservedError(ToolkitError):
    """None of the visible GPUs can be built for with this toolkit; the message says what serves each."""


def version_tuple(text: str) -> Capability:
    """The first two numbers of a version: "12.8.1" and "12.8" give (12, 8)."""
    major, minor, *_ = [*re.findall(r"\d+", text), "0", "0"]
    return int(major), int(minor)


def _output(*command: str) -> str:
    """All that a command prints; ToolkitError if it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolkitError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise ToolkitError(f"{' '.join(command)} failed: {done.stdout.strip()[-300:]}")
    return done.stdout


def _toolkit_at(home: str, found_by: str) -> Toolkit:
    nvcc = Path(home, "bin", "nvcc")
    if not nvcc.exists():
        raise ToolkitError(f"{found_by} leads to {home}, which has no bin/nvcc")
    release = re.search(r"release (\d+\.\d+)", _output(str(nvcc), "--version"))
    if release is None:
        raise ToolkitError(f"{nvcc} --version names no release")
    return Toolkit(home, release.group(1), found_by)


def find_toolkit(environ: Mapping[str, str] = os.environ, default: str = "/usr/local/cuda") -> Toolkit:
    """The CUDA toolkit to build with: CUDA_HOME, CUDA_PATH, the nvcc on the PATH, or the usual folder.

    The nvcc on the PATH may be a wrapper script, a compiler cache or a symbolic link outside the toolkit, so
    its folder says nothing; what it prints as TOP does.

    Raises:
        ToolkitError: none was found, or the one named by the environment is not one.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            return _toolkit_at(os.path.realpath(environ[variable]), variable)
    nvcc = shutil.which("nvcc", path=environ.get("PATH", os.defpath))
    if nvcc is not None:
        top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "none.cu"), re.MULTILINE)
        if top is None:
            raise ToolkitError(f"{nvcc} --dryrun does not say where its toolkit is (no TOP): set CUDA_HOME")
        return _toolkit_at(os.path.realpath(top.group(1).strip()), f"{nvcc} on the PATH")
    if os.path.exists(default):
        return _toolkit_at(os.path.realpath(default), default)
    raise ToolkitError(
        f"neither CUDA_HOME nor CUDA_PATH is set, no nvcc is on the PATH, and there is no {default}"
    )


def _buildable(toolkit_version: str, torch_cuda: str) -> list[str]:
    """Every architecture that the toolkit can build and torch's builder knows, oldest first.

    torch takes names it knows only, and it knows those of the CUDA version it was made with.
    """
    toolkit, torch = version_tuple(toolkit_version), version_tuple(torch_cuda)
    names = [
        name
        for name, added, dropped in _ARCHITECTURES
        if added <= min(toolkit, torch) and (dropped is None or toolkit < dropped)
    ]
    if not names:
        raise ToolkitError(f"CUDA {toolkit_version} is too old: no architecture from sm_70 on can be built")
    return names


def default_arch_list(toolkit_version: str, torch_cuda: str) -> str:
    """Every architecture that can be built, with PTX for newer cards."""
    return ";".join(_buildable(toolkit_version, torch_cuda)) + "+PTX"


def unserved(capabilities: Sequence[Capability], toolkit_version: str, torch_cuda: str) -> list[str]:
    """A sentence for each kind of GPU at hand that is too old for the toolkit or for the kernels."""
    oldest = version_tuple(_buildable(toolkit_version, torch_cuda)[0])
    sentences = []
    for capability in sorted({one for one in capabilities if one < oldest}):
        name = f"compute capability {capability[0]}.{capability[1]}"
        # The architectures that serve it, were it not for the toolkit: none, or those that were dropped.
        dropped = [last for own, _, last in _ARCHITECTURES if last and version_tuple(own) <= capability]
        if dropped:
            major = dropped[-1][0]
            sentences.append(
                f"{name} was dropped by CUDA {major} and needs a CUDA {major - 1} toolkit and a torch made "
                f"with CUDA {major - 1} (on PyPI torch 2.10 or older)"
            )
        else:
            sentences.append(f"{name} is below {_ARCHITECTURES[0][0]}, the oldest that the kernels support")
    return sentences


def device_arch_list(capabilities: Sequence[Capability], toolkit_version: str, torch_cuda: str) -> str:
    """The architectures to build for the GPUs at hand; those that are too old are left out (see unserved).

    A card gets the machine code of the newest architecture up to its own with the same first number, or,
    where the toolkit is older than its generation, the PTX of the newest before it. The newest of the list
    comes with PTX in any case.

    Raises:
        UnservedError: all of the GPUs are too old.
    """
    buildable = [version_tuple(name) for name in _buildable(toolkit_version, torch_cuda)]
    chosen: dict[Capability, bool] = {}  # architecture: with PTX
    for capability in capabilities:
        if capability < buildable[0]:
            continue
        newest = max(one for one in buildable if one <= capability)
        chosen[newest] = chosen.get(newest, False) or newest[0] != capability[0]
    if not chosen:
        raise UnservedError(
            f"CUDA {toolkit_version} cannot serve the visible GPUs: "
            + "; ".join(unserved(capabilities, toolkit_version, torch_cuda))
        )
    chosen[max(chosen)] = True
    return ";".join(
        f"{major}.{minor}" + ("+PTX" if ptx else "") for (major, minor), ptx in sorted(chosen.items())
    )


def covers(arch_list: str, capability: Capability) -> bool:
    """Whether code for arch_list runs on a device: machine code of its generation or PTX, no newer."""
    for name in arch_list.replace(" ", ";").split(";"):
        number = name.split("+")[0]
        if not number[:1].isdigit():
            return True  # a family's name ("Hopper"): it was chosen by hand, nothing is known against it
        built = version_tuple(number)
        if number.endswith("a"):  # built for this one architecture
            if built == capability:
                return True
        elif built <= capability and (built[0] == capability[0] or name.endswith("+PTX")):
            return True
    return False


def decide(
    torch_cuda: str | None,
    capabilities: Sequence[Capability] = (),
    environ: Mapping[str, str] = os.environ,
    default_home: str = "/usr/local/cuda",
) -> Decision:
    """Decides between a CPU-only and a CUDA build.

    Args:
        torch_cuda: the CUDA version torch was made with (``torch.version.cuda``); None without CUDA.
        capabilities: the compute capabilities of the visible GPUs.
        environ: FORCE_CUDA (1 demands CUDA, 0 refuses it), TORCH_CUDA_ARCH_LIST, CUDA_HOME, CUDA_PATH, PATH.
        default_home: where a toolkit is looked for last.

    Raises:
        ToolkitError: FORCE_CUDA=1 cannot be met, or FORCE_CUDA is neither 0 nor 1.
    """
    force = environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        raise ToolkitError(f"FORCE_CUDA must be 0, 1 or unset, got {force!r}")
    if force == "0":
        return Decision(None, "", "FORCE_CUDA=0", surprising=False)
    if torch_cuda is None:
        if force == "1":
            raise ToolkitError(
                "FORCE_CUDA=1, but the torch here was made without CUDA: install one with CUDA "
                "(`pip install torch===2.13.0` on Linux takes it from PyPI) or unset FORCE_CUDA"
            )
        return Decision(None, "", "torch was made without CUDA", surprising=False)
    try:
        toolkit = find_toolkit(environ, default_home)
        wanted, have = version_tuple(torch_cuda), version_tuple(toolkit.version)
        if wanted[0] != have[0]:
            raise ToolkitError(
                f"the toolkit at {toolkit.home} is CUDA {toolkit.version}, but torch was made with CUDA "
                f"{torch_cuda}, and the first number must be the same"
            )
        left_out: list[str] = []
        arch_list = environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
        if arch_list and arch_list != "native":
            chosen_by = "TORCH_CUDA_ARCH_LIST"
        elif capabilities:
            chosen_by = "the visible GPUs"
            arch_list = device_arch_list(capabilities, toolkit.version, torch_cuda)
            left_out = unserved(capabilities, toolkit.version, torch_cuda)
        else:
            chosen_by = "the default, as no GPU is visible"
            arch_list = default_arch_list(toolkit.version, torch_cuda)
    except ToolkitError as error:
        if force == "1" and isinstance(error, UnservedError):
            raise UnservedError(
                f"FORCE_CUDA=1, but {error}. To build for other GPUs than these, name their architectures in "
                "TORCH_CUDA_ARCH_LIST"
            ) from error
        if force == "1":
            raise ToolkitError(
                f"FORCE_CUDA=1, but there is no usable CUDA toolkit: {error}. Install the CUDA {torch_cuda} "
                "toolkit or set CUDA_HOME to the folder that holds its bin/nvcc"
            ) from error
        return Decision(None, "", f"torch has CUDA {torch_cuda}, but {error}", surprising=True)
    reason = (
        f"torch has CUDA {torch_cuda}; toolkit {toolkit.version} at {toolkit.home}, found by "
        f"{toolkit.found_by}; architectures from {chosen_by}"
        + "".join(f"; left out: {sentence}" for sentence in left_out)
    )
    return Decision(toolkit, arch_list, reason, surprising=False)


def describe_rebuild(torch_cuda: str | None, capabilities: Sequence[Capability]) -> str:
    """What a build would give here and now, in one line."""
    try:
        return decide(torch_cuda, capabilities).describe()
    except ToolkitError as error:
        return f"an error: {error}"
