"""The compiled module gc_cuda._C: loaded once, with a helpful word where it cannot be.

Loading it registers the operators torch.ops.gc_cuda. Importing this module never fails: a machine without the
compiled part still has ``gc_cuda.reference`` and the report of ``python -m gc_cuda``.
"""

from __future__ import annotations

import importlib

import torch

from gc_cuda._toolkit import version_tuple


class ExtensionError(ImportError):
    """gc_cuda._C is missing or does not fit; the message says what to run."""


def _load() -> tuple[dict[str, str] | None, str, Exception | None]:
    """The build configuration, or else what is wrong and the exception behind it."""
    here = f"torch {torch.__version__}"
    try:
        config: dict[str, str] = importlib.import_module("gc_cuda._C").build_config()
    except ModuleNotFoundError as error:
        return None, "gc_cuda._C is not built: run ./compile.sh in the source folder", error
    except (ImportError, OSError) as error:
        return (
            None,
            f"gc_cuda._C is built but does not load beside {here}: {error}. An undefined symbol means that "
            "it was built for another torch: run ./compile.sh in the source folder again",
            error,
        )
    if version_tuple(config["torch"]) != version_tuple(torch.__version__):
        problem = (
            f"gc_cuda._C was built for torch {config['torch']}, and here is {here}: run ./compile.sh again"
        )
        return None, problem, None
    return config, "", None


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
    """How gc_cuda._C was built (version, torch, cuda, arch_list, compiler), or None if it cannot be used."""
    return None if _config is None else dict(_config)


def has_cuda() -> bool:
    """Whether the operators were built for CUDA tensors."""
    return _config is not None and bool(_config["cuda"])
