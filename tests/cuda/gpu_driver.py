"""What the tests ask of the CUDA driver itself, through ctypes: torch has no call for it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

KERNEL_NODE = 0  # CU_GRAPH_NODE_TYPE_KERNEL
PER_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD, the handle of each thread's own default stream
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status != 0:
        raise RuntimeError(f"{name} failed with error {status}")


def new_stream() -> int:
    """The handle of a new stream of the current device."""
    handle = ctypes.c_void_p()
    _call("cuStreamCreate", ctypes.byref(handle), ctypes.c_uint(_NON_BLOCKING))
    assert handle.value is not None
    return handle.value


def destroy_stream(handle: int) -> None:
    """Its work is done nevertheless."""
    _call("cuStreamDestroy_v2", ctypes.c_void_p(handle))


def graph_nodes(graph: int) -> list[int]:
    """The kind of each node of a graph."""
    count = ctypes.c_size_t()
    _call("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    _call("cuGraphGetNodes", ctypes.c_void_p(graph), nodes, ctypes.byref(count))
    kinds = []
    for node in nodes:
        kind = ctypes.c_int()
        _call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        kinds.append(kind.value)
    return kinds


def free_bytes() -> int:
    """Of the current device's memory."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def fill_memory(smallest: int = 2**14) -> Callable[[], None]:
    """Takes the device's memory until not even `smallest` bytes are left; returns what gives it back."""
    taken: list[ctypes.c_uint64] = []
    size = 2**32
    while size >= smallest:
        address = ctypes.c_uint64()
        status = _driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size))
        if status == 0:
            taken.append(address)
        elif status == _OUT_OF_MEMORY:
            size //= 2
        else:
            raise RuntimeError(f"cuMemAlloc failed with error {status}")

    def give_back() -> None:
        while taken:
            _call("cuMemFree_v2", taken.pop())

    return give_back
