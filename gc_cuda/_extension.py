"""The compiled module gc_cuda._C: loaded once, with a helpful word where it cannot be.

To load it registers the operators torch.ops.gc_cuda, once in a process. The import of this file never fails:
a machine without the compiled part still has ``gc_cuda.reference`` and the report of ``python -m gc_cuda``.

A binary that is not this package's own could compute something else than the package says, so it is not used:
one of another folder, version or torch, and in a checkout one that was built of other sources.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from typing import Any, NamedTuple

import torch

from gc_cuda import _sources
from gc_cuda._toolkit import version_tuple

_VERSION: str = sys.modules["gc_cuda"].__version__  # which imports this module, and has set it before
_PACKAGE = os.path.realpath(os.path.dirname(__file__))
_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # of the checkout, if it is one
_IS_CHECKOUT = _sources.is_checkout(_ROOT)
_BUILD = f"run ./compile.sh in {_ROOT}" if _IS_CHECKOUT else "run ./compile.sh in the source folder"


class ExtensionError(ImportError):
    """gc_cuda._C is missing or does not fit; the message says what to run."""


_module: Any = None


def compiled_module() -> Any:
    """The module gc_cuda._C, after :func:`require` has found that it fits."""
    global _module
    if _module is None:
        _module = importlib.import_module("gc_cuda._C")
    return _module


class _Loaded(NamedTuple):
    """A binary that this process has loaded: it stays, whatever becomes of the file and of sys.modules."""

    path: str
    changed: int  # when, in ns
    size: int


def _load() -> tuple[dict[str, str] | None, str, Exception | None]:
    """The build configuration, or else what is wrong and the exception that says so."""
    spec = importlib.util.find_spec("gc_cuda._C")
    if spec is None or spec.origin is None:
        return None, _not_built(_built_elsewhere()), None
    folder = os.path.realpath(os.path.dirname(spec.origin))
    if folder != _PACKAGE:  # an editable install of another clone lends its own
        return None, _not_built(folder), None
    binary = os.path.realpath(spec.origin)
    problem = _needs_restart(binary)
    if problem:
        return None, problem, None
    here = f"torch {torch.__version__}"
    try:
        config: dict[str, str] = importlib.import_module("gc_cuda._C").build_config()
    except (ImportError, OSError) as error:
        return (
            None,
            f"gc_cuda._C is built but does not load beside {here}: {error}. An undefined symbol means that "
            f"it was built for another torch: {_BUILD} again",
            error,
        )
    _remember(binary)
    return (None, problem, None) if (problem := _misfit(config, here)) else (config, "", None)


def _misfit(config: dict[str, str], here: str) -> str:
    """In what the binary differs from this package, or ""."""
    if config["version"] != _VERSION:
        return (
            f"gc_cuda._C is of version {config['version']}, and the package in {_PACKAGE} of version "
            f"{_VERSION}: {_BUILD} again"
        )
    if version_tuple(config["torch"]) != version_tuple(torch.__version__):
        return f"gc_cuda._C was built for torch {config['torch']}, and here is {here}: {_BUILD} again"
    if _IS_CHECKOUT and config.get("sources") != _sources.fingerprint(_ROOT):
        return (
            f"gc_cuda._C was built of other sources than those in {_ROOT} (setup.py and csrc/ were changed "
            f"after it was, as by a pull; a changed comment counts): {_BUILD} again, which compiles what has "
            "changed"
        )
    return ""


def _needs_restart(binary: str) -> str:
    """Why this process cannot load the binary: it has another one, which cannot be unloaded. Or ""."""
    loaded = torch.ops.gc_cuda.__dict__.get("_loaded")
    if loaded is None:
        if not hasattr(torch.ops.gc_cuda, "global_context"):
            return ""
        return f"the operators of gc_cuda were registered by something else than {binary}: restart Python"
    if loaded.path != binary:
        return (
            f"this process has loaded {loaded.path} before, and gc_cuda, imported anew, is now that in "
            f"{_PACKAGE}: restart Python"
        )
    if loaded != _state(binary):
        return f"{binary} was built again after this process had loaded it: restart Python"
    return ""


def _state(binary: str) -> _Loaded:
    stat = os.stat(binary)
    return _Loaded(binary, stat.st_mtime_ns, stat.st_size)


def _remember(binary: str) -> None:
    # The operators' namespace lives as long as the process; a module can be removed from sys.modules.
    torch.ops.gc_cuda.__dict__.setdefault("_loaded", _state(binary))


def _not_built(elsewhere: str) -> str:
    found = sorted(map(os.path.basename, glob.glob(os.path.join(glob.escape(_PACKAGE), "_C.*.so"))))
    for_another_python = f" for this Python, only {', '.join(found)}" if found else ""
    leave = (
        f". The gc_cuda in {elsewhere} is built, and its binary serves no other copy: to use that one, start "
        f"Python where {os.path.dirname(_PACKAGE)} is not on sys.path, as in another folder"
    )
    return f"gc_cuda._C is not built in {_PACKAGE}{for_another_python}: {_BUILD}{leave if elsewhere else ''}"


def _built_elsewhere() -> str:
    """The folder of another gc_cuda that Python could find, if it is built; else ""."""
    on_the_path: list[tuple[Any, list[str] | None]] = [(PathFinder, [entry]) for entry in sys.path]
    of_installers = [(finder, None) for finder in sys.meta_path if finder is not PathFinder]
    for finder, path in on_the_path + of_installers:
        try:
            spec = finder.find_spec("gc_cuda", path)
        except Exception:  # of somebody else's finder; this is only for a better word
            continue
        if spec is not None and spec.origin is not None:
            folder = os.path.realpath(os.path.dirname(spec.origin))
            if folder != _PACKAGE and _has_binary(folder):
                return folder
    return ""


def _has_binary(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, f"_C{suffix}")) for suffix in EXTENSION_SUFFIXES)


_config, _problem, _cause = _load()
_cuda_problem = _problem
if not _problem and not _config["cuda"]:  # type: ignore[index]
    _cuda_problem = (
        "CUDA tensors need the CUDA kernels, and gc_cuda was built for the CPU only: run "
        "FORCE_CUDA=1 ./compile.sh in the source folder, which builds them or says what is missing"
    )


def require() -> None:
    """Raises ExtensionError, saying what to run, unless the operators are there."""
    if _problem:
        raise ExtensionError(_problem) from _cause


def require_cuda() -> None:
    """Raises ExtensionError, saying what to run, unless the operators are there for CUDA tensors."""
    if _cuda_problem:
        raise ExtensionError(_cuda_problem) from _cause


def problem() -> str:
    """What keeps the operators from working and what to do about it; "" if nothing does."""
    return _problem


def build_config() -> dict[str, str] | None:
    """How gc_cuda._C was built (version, sources, torch, cuda, arch_list, compiler), or None if it cannot be
    used.
    """
    return None if _config is None else dict(_config)


def has_cuda() -> bool:
    """Whether the operators were built for CUDA tensors."""
    return _config is not None and bool(_config["cuda"])
