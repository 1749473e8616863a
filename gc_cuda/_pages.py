"""Memory that stays with the process, for work on the CPU."""

from __future__ import annotations

import ctypes
import warnings

import torch

# What glibc's <malloc.h> calls M_TRIM_THRESHOLD and M_MMAP_MAX.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_PROBE_BYTES = 40 * 2**20  # beyond 32 MiB, the highest threshold from which glibc maps a block on its own


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo: ten ints, which wrap around."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def keep_pages() -> bool:
    """Makes the C library keep the memory that tensors on the CPU free, and use it for the next ones.

    By default glibc gives every block beyond 32 MiB back to the system when it is freed, and a long free end
    of its heap too. The next tensor of that size lies on fresh pages, which the system has to find and clear:
    at c3 of a detector (1x512x100x168, float32) that costs more than the arithmetic, in eager PyTorch and
    here. After this call glibc takes all blocks from its heap (``M_MMAP_MAX`` is 0) and never shortens it
    (``M_TRIM_THRESHOLD`` is off).

    It is for the whole process, for PyTorch and every other library, from the next allocation on, and cannot
    be taken back: call it once, at the start. What it costs is memory: the process stays as large as it was
    at its largest, holes between blocks included, and so does each process forked from it. Blocks made before
    the call, and those of other threads than the first, which have heaps of their own, may still be given
    back. ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647`` in the environment does the same without a
    call.

    Returns:
        Whether it took effect, which is tried with a tensor of 40 MiB that is never written to. Where it did
        not (macOS, Windows, musl; jemalloc, tcmalloc and others in place of glibc's allocator), a warning
        says why.
    """
    try:
        # By its name, not through the process: another allocator may have put its own functions before these.
        libc = ctypes.CDLL("libc.so.6")
        mallopt, mallinfo = libc.mallopt, libc.mallinfo
    except (OSError, AttributeError):
        return _no_effect("this system's C library is not glibc")
    mallinfo.restype = _Mallinfo
    if not (mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1)):
        return _no_effect("glibc refused the settings")
    before = mallinfo().uordblks
    probe = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device="cpu")
    in_heap = (mallinfo().uordblks - before) % 2**32
    del probe
    if not _PROBE_BYTES // 2 <= in_heap < 2**31:  # other threads allocate too
        return _no_effect("tensors do not lie in glibc's heap: another allocator serves them")
    return True


def _no_effect(reason: str) -> bool:
    warnings.warn(f"gc_cuda.keep_pages() has no effect: {reason}", RuntimeWarning, stacklevel=3)
    return False
