"""Builds gc_cuda._C against the torch of this environment.

`./compile.sh` runs it; so do `python setup.py build_ext --inplace` and `pip install --no-build-isolation .`.
What the package is called and needs stands in pyproject.toml.

Environment: FORCE_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST (see gc_cuda/_toolkit.py) and MAX_JOBS.
"""

import functools
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build import build

os.chdir(Path(__file__).resolve().parent)
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

try:
    import torch
except ImportError as error:
    sys.exit(
        f"gc_cuda: cannot build, as torch cannot be imported ({error}). The extension is compiled against "
        "the torch of your environment: install torch >= 2.4, ninja and setuptools there and then "
        "`pip install --no-build-isolation .`, or run ./compile.sh"
    )


def load_by_path(name):
    """A module of gc_cuda/ by its path: importing the package would need what is not built yet."""
    spec = importlib.util.spec_from_file_location(f"gc_cuda_{name}", f"gc_cuda/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolkit = load_by_path("_toolkit")
VERSION = re.search(r'^__version__ = "(.+)"$', Path("gc_cuda/__init__.py").read_text(), re.MULTILINE).group(1)

if toolkit.version_tuple(torch.__version__) < (2, 4):
    sys.exit(f"gc_cuda: needs torch >= 2.4, got {torch.__version__}")
try:
    decision = toolkit.decide(
        torch.version.cuda, [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    )
except toolkit.ToolkitError as error:
    sys.exit(f"gc_cuda: {error}")
if decision.toolkit is not None:
    # Both before torch's builder is imported: it would guess the first from the PATH, which a wrapper script
    # leads astray, and crashes without the second where no GPU is visible.
    os.environ["CUDA_HOME"] = decision.toolkit.home
    os.environ["TORCH_CUDA_ARCH_LIST"] = decision.arch_list

from torch.utils import cpp_extension  # noqa: E402
from torch.utils.cpp_extension import (  # noqa: E402
    BuildExtension,
    CppExtension,
    CUDAExtension,
    include_paths,
    is_ninja_available,
)

if not is_ninja_available():
    # Without it torch's builder would follow neither headers nor flags, and keep a library out of date.
    sys.exit("gc_cuda: needs ninja to build: pip install ninja")

# One folder for each torch and kind of build: nothing stale is taken over, and going back rebuilds nothing.
BUILD_BASE = Path("build", f"torch-{torch.__version__}-" + ("cuda" if decision.toolkit else "cpu"))
GENERATED = BUILD_BASE / "generated"


def write_build_facts():
    """What the binary says about itself, as a header: one file is compiled again when it changes, not all."""
    facts = {
        "GC_VERSION": VERSION,
        "GC_SOURCES": load_by_path("_sources").fingerprint("."),
        "GC_BUILD_TORCH": torch.__version__,
        "GC_CUDA_VERSION": decision.toolkit.version if decision.toolkit else "",
        "GC_ARCH_LIST": decision.arch_list,
    }
    text = "".join(f'#define {name} "{value}"\n' for name, value in facts.items())
    header = GENERATED / "build_facts.h"
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)


def cpp_library():
    """The C++ library that torch has loaded into this process, as what to link with.

    Some compilers link their own into every library. The two then share what they export: an error message
    with a number in it ended early, or in a segmentation fault.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[5] for line in maps if "/libstdc++.so" in line)
    return sorted({path for path in paths if Path(path).exists()})[:1]


# One file holds the CPU's kernels for one instruction set, and gets these flags besides those of all files.
FILE_FLAGS = {}
if platform.machine() == "x86_64":  # Windows calls it AMD64, and its compiler has other flags
    avx2 = "-mavx2 -mfma -mf16c"
    avx512 = f"{avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
    FILE_FLAGS = {
        f"capability_{name.lower()}.o": f"{flags} -DCPU_CAPABILITY={name} -DCPU_CAPABILITY_{name}"
        for name, flags in {"AVX2": avx2, "AVX512": avx512}.items()
    }


def with_file_flags(write_ninja_file):
    """Adds FILE_FLAGS to torch's build.ninja, which gives all C++ files one list of flags."""

    @functools.wraps(write_ninja_file)
    def write(path, *args, **kwargs):
        write_ninja_file(path, *args, **kwargs)
        text = Path(path).read_text()
        for name, flags in FILE_FLAGS.items():
            rule = rf"\g<0>\n  post_cflags = $post_cflags {flags}"
            text, found = re.subn(rf"^build .*/{name}: compile .*$", rule, text, flags=re.MULTILINE)
            if found != 1:
                sys.exit(f"gc_cuda: torch {torch.__version__} writes a build.ninja without a rule for {name}")
        Path(path).write_text(text)

    return write


cpp_extension._write_ninja_file = with_file_flags(cpp_extension._write_ninja_file)


def extension():
    """gc_cuda._C, with the CUDA sources or without."""
    # Without those warnings that g++ 12 gives by the hundred for its own AVX-512 intrinsics.
    cxx = ["-O3", "-g0", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    for folder in include_paths():
        cxx += ["-isystem", folder]  # no warnings from torch's headers
    link = cpp_library()
    if "parallel backend: OpenMP" in torch.__config__.parallel_info() and sys.platform != "darwin":
        # Without it at::parallel_for, a template in torch's headers, compiles to a plain loop.
        cxx.append("-fopenmp")
        link.append("-fopenmp")
    # Launch plans need neither CUDA nor torch: every build can print them.
    sources = [
        path
        for folder in ("ops", "python", "cpu", "cuda/plan")
        for path in Path("csrc", folder).glob("*.cpp")
    ]
    kind, flags = CppExtension, {"cxx": cxx}
    if decision.toolkit is not None:
        for pattern in ("*.cpp", "launch/*.cpp", "launch/*.cu"):
            sources += Path("csrc/cuda").glob(pattern)
        # No -std and no -gencode: torch adds its own, and the latter would switch TORCH_CUDA_ARCH_LIST off.
        kind, flags["nvcc"] = CUDAExtension, ["-O3", "-Xfatbin", "-compress-all"]
    return kind(
        "gc_cuda._C",
        sorted(map(str, sources)),
        include_dirs=[str(Path("csrc").resolve()), str(GENERATED.resolve())],
        extra_compile_args=flags,
        extra_link_args=link,
    )


class Build(build):
    """Keeps the builds for different torches apart."""

    def initialize_options(self):
        super().initialize_options()
        self.build_base = str(BUILD_BASE)


class BuildExt(BuildExtension):
    """Keeps the objects; those of an editable install would go to a folder that setuptools deletes."""

    def initialize_options(self):
        super().initialize_options()
        self.build_temp = str(BUILD_BASE / f"objects-{sys.implementation.cache_tag}")

    def run(self):
        tail = (
            ""
            if not decision.surprising
            else ". A CUDA build was to be expected: FORCE_CUDA=1 makes this an error"
        )
        print(f"gc_cuda {VERSION}: building for {decision.describe()}{tail}", file=sys.stderr, flush=True)
        write_build_facts()
        super().run()

    def build_extension(self, ext):
        """Links the files that have flags of their own last.

        Of an inline function that several files hold, the linker takes the first: never the one that needs a
        newer processor than the rest of the library does.
        """
        compile_all = self.compiler.compile

        def compile_in_order(*args, **kwargs):
            objects = compile_all(*args, **kwargs)
            return sorted(objects, key=lambda path: Path(path).name in FILE_FLAGS)

        self.compiler.compile = compile_in_order
        super().build_extension(ext)


# The licence is given here because old and new setuptools agree on no form of it in pyproject.toml.
setup(license="Apache-2.0", ext_modules=[extension()], cmdclass={"build": Build, "build_ext": BuildExt})
