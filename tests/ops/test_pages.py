"""Pages of large outputs: when huge ones are asked for, and that keep_pages() keeps what tensors free.

Each case runs in a process of its own, since what it looks at is the process's. A library loaded before the C
library stands in for pages that come slowly, are refused, and for another allocator.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gc_cuda

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages"
)
HUGE = 2 * 2**20
C3 = (1, 512, 100, 168)  # 34 MB of float32: glibc maps it anew for every tensor

# What a page costs before it is there: FAST, SLOW (2 ms of processor time) or REFUSED.
MADVISE = r"""
#include <errno.h>
#include <time.h>
#include <stddef.h>

int asked = 0;

static long now(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * 1000000000L + t.tv_nsec;
}

int madvise(void* begin, size_t bytes, int advice) {
  if (advice != 14) return 0; /* MADV_HUGEPAGE */
  ++asked;
#ifdef SLOW
  for (long start = now(); now() - start < 2000000L;) {}
#endif
#ifdef REFUSED
  errno = EINVAL;
  return -1;
#endif
  return 0;
}
"""

# Blocks beyond 32 MiB lie elsewhere than in glibc's heap, as jemalloc's do.
ALLOCATOR = r"""
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/mman.h>

extern void __libc_free(void*);
extern void* __libc_memalign(size_t, size_t);

static void* block;
static size_t block_bytes;

int posix_memalign(void** out, size_t alignment, size_t bytes) {
  if (bytes >= 32u << 20 && !block) {
    block_bytes = bytes;
    block = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *out = block;
  } else {
    *out = __libc_memalign(alignment, bytes);
  }
  return *out ? 0 : 12;
}

void free(void* data) {
  if (data && data == block) {
    munmap(block, block_bytes);
    block = 0;
  } else {
    __libc_free(data);
  }
}
"""


def run(script: str, preload: Path | None = None, **variables: str) -> list[str]:
    """The words that the script prints, in an environment without settings of the allocator."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment.pop("GLIBC_TUNABLES", None)
    environment.update(variables, PYTHONPATH=str(Path(gc_cuda.__file__).parents[1]))
    if preload:
        environment["LD_PRELOAD"] = str(preload)
    start = "import torch, gc_cuda\ntorch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", start + script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def library(folder: Path, source: str, *flags: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    path = folder / "stand_in.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(path), *flags],
        input=source,
        text=True,
        check=True,
    )
    return path


ASKED = f"""
import ctypes
asked = ctypes.c_int.in_dll(ctypes.CDLL(None), "asked")
x, term = torch.randn{C3}, torch.randn(1, 512)
asked.value = 0
out = gc_cuda.broadcast_add(x, term)
begin = -(-out.data_ptr() // {HUGE})
end = (out.data_ptr() + out.nbytes) // {HUGE}
print(asked.value, end - begin, torch.equal(out, x + term[..., None, None]))
"""


@glibc
@pytest.mark.parametrize("cost", ["FAST", "SLOW", "REFUSED"])
def test_the_first_slow_page_ends_the_asking(tmp_path, cost):
    """Every huge page of an output is asked for while they come quickly, and only one that does not."""
    asked, pages, same = run(ASKED, library(tmp_path, MADVISE, f"-D{cost}"))
    assert int(pages) >= 15
    assert int(asked) == (int(pages) if cost == "FAST" else 1)
    assert same == "True"


FLAGGED = f"""
import re
def flagged():
    found, span = [], None
    for line in open("/proc/self/smaps"):
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            span = [int(edge, 16) for edge in head.groups()]
        elif line.startswith("VmFlags:") and " hg" in line:
            found.append(span)
    return found
torch.randn{C3}.add(1)  # PyTorch itself asks for none
assert not flagged(), flagged()
small = gc_cuda.broadcast_add(torch.randn(1, 64, 100, 160), torch.randn(1, 64))  # 4.1 MB: below 4 MiB
assert not flagged(), flagged()
out = gc_cuda.broadcast_add(torch.randn{C3}, torch.randn(1, 512))
begin = -(-out.data_ptr() // {HUGE}) * {HUGE}
end = (out.data_ptr() + out.nbytes) // {HUGE} * {HUGE}
print(begin, end, *(edge for span in flagged() for edge in span))
"""


@glibc
@huge_pages
def test_only_whole_huge_pages_of_the_output_are_asked_for():
    """The memory beside the output keeps its own kind of pages: its neighbours are not ours."""
    begin, end, *flagged = map(int, run(FLAGGED))
    assert flagged and flagged[0] == begin, "the first huge page, whatever it costs"
    assert max(flagged) <= end


KEPT = f"""
import resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def of_ten_clones():
    x = torch.randn{C3}
    x.clone()
    before = faults()
    for _ in range(10):
        x.clone()
    return faults() - before
block = gc_cuda.ContextBlock(512, 1 / 16)
def of_ten_steps():
    x = torch.randn{C3}.requires_grad_()
    block(x).sum().backward()
    before = faults()
    for _ in range(10):
        x.grad = None
        block(x).sum().backward()
    return faults() - before
def least(count):  # the first time that so much is in use, the heap has to grow
    return min(count() for _ in range(3))
print(least(of_ten_clones), {{call}}, least(of_ten_clones), least(of_ten_steps))
"""


@glibc
def test_keep_pages_keeps_what_tensors_free():
    """Ten clones of c3 fault in their 84,000 pages (huge ones: 160) by default, and none once kept."""
    before, took_effect, clones, steps = run(KEPT.format(call="gc_cuda.keep_pages()"))
    assert took_effect == "True"
    assert int(before) >= 160
    assert int(clones) < 50 and int(steps) < 50


@glibc
def test_keep_pages_does_what_the_environment_does():
    """The setting that its docstring gives for those who cannot call."""
    environment = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
    *_, clones, steps = run(KEPT.format(call="None"), **environment)
    assert int(clones) < 50 and int(steps) < 50


RESIDENT = f"""
import resource
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
print(gc_cuda.keep_pages(), gc_cuda.keep_pages())
before = resident()
tensors = [torch.ones{C3} for _ in range(3)]
del tensors
print(resident() - before)
"""


@glibc
def test_what_is_kept_stays_resident():
    """What it costs, as its docstring says: memory stays with the process. A second call does no harm."""
    first, second, grown = run(RESIDENT)
    assert (first, second) == ("True", "True")
    assert int(grown) > 2.5 * 4 * torch.Size(C3).numel()


WITHOUT_EFFECT = """
import ctypes, warnings
{first}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(gc_cuda.keep_pages())
(warning,) = caught
assert warning.filename == "<string>", warning.filename
print(warning.category.__name__, warning.message)
"""


@glibc
def test_another_allocator_is_noticed(tmp_path):
    """It looks at where PyTorch's tensors lie: glibc takes the settings even where it serves none of them."""
    result, *words = run(WITHOUT_EFFECT.format(first=""), library(tmp_path, ALLOCATOR))
    assert result == "False"
    assert words[0] == "RuntimeWarning" and "another allocator" in " ".join(words)


@pytest.mark.parametrize(
    "first",
    [
        "def absent(name, *rest): raise OSError(name)\nctypes.CDLL = absent",
        "ctypes.CDLL = lambda *rest: object()",  # a libc.so.6 without these functions
    ],
    ids=["absent", "without mallopt"],
)
def test_without_glibc_it_says_so(first):
    result, *words = run(WITHOUT_EFFECT.format(first=first))
    assert result == "False"
    assert words[0] == "RuntimeWarning" and "not glibc" in " ".join(words)
