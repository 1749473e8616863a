"""Whether the binary is that of the package: its version, sources, torch and folder; importing anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from paths import ROOT

import gc_cuda
from gc_cuda import _extension, _sources


def copy_package(target: Path, sitecustomize: str = "") -> None:
    """The package's Python files alone, as in a checkout in which nothing was built.

    An editable install would be found besides: sitecustomize takes its finder away.
    """
    keep = '[finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]'
    (target / "sitecustomize.py").write_text(f"import sys\n\nsys.meta_path[:] = {keep}\n{sitecustomize}")
    for source in (ROOT / "gc_cuda").rglob("*.py"):
        copy = target / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())


def copy_checkout(target: Path) -> None:
    """The same with the sources of the extension."""
    copy_package(target)
    for name in ("setup.py", "csrc/ops/schema.cpp", "csrc/cpu/plan.h"):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())


def pretend_binary(folder: Path, **facts: str) -> None:
    """A gc_cuda._C with the real one's operators that says of itself what fits, but for the facts given."""
    config = {"version": gc_cuda.__version__, "sources": "", "torch": torch.__version__}
    config |= {"cuda": "", "arch_list": "", "compiler": "none", **facts}
    (folder / "gc_cuda" / "_C.py").write_text(
        f"import torch\n\ntorch.ops.load_library({gc_cuda._C.__file__!r})\n\n\n"
        f"def build_config():\n    return {config}\n"
    )


def run_python(
    folder: Path, *arguments: str, path: tuple[Path, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, *path)))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )


def problem_of(folder: Path, *, path: tuple[Path, ...] = ()) -> str:
    """What the gc_cuda of the folder says when an operator is called; "" if that succeeds up to there."""
    program = """
import gc_cuda
try:
    gc_cuda._extension.require()
except ImportError as error:
    print(error, end="")
assert gc_cuda.reference.average_pool.__doc__
"""
    done = run_python(folder, "-c", program, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_unbuilt_package_imports_reports_and_says_what_to_run(tmp_path: Path) -> None:
    copy_package(tmp_path)
    done = run_python(tmp_path, "-m", "gc_cuda")
    assert done.returncode == 1
    words = f"gc_cuda._C is not built in {tmp_path}/gc_cuda: run ./compile.sh in the source folder"
    assert f"not ready: {words}\n" in done.stdout
    done = run_python(tmp_path, "-c", "import torch, gc_cuda; gc_cuda.average_pool(torch.ones(1, 1, 1, 1))")
    assert done.stderr.splitlines()[-1].endswith(words)


def test_a_binary_for_another_python_is_named(tmp_path: Path) -> None:
    copy_checkout(tmp_path)
    (tmp_path / "gc_cuda" / "_C.cpython-27-nowhere.so").touch()
    assert problem_of(tmp_path) == (
        f"gc_cuda._C is not built in {tmp_path}/gc_cuda for this Python, only _C.cpython-27-nowhere.so: "
        f"run ./compile.sh in {tmp_path}"
    )


def test_an_unbuilt_clone_before_a_built_one_names_both(tmp_path: Path) -> None:
    clone, built, unbuilt = tmp_path / "clone", tmp_path / "built", tmp_path / "unbuilt"
    for folder in (clone, built, unbuilt):
        folder.mkdir()
        copy_checkout(folder)
    (built / "gc_cuda" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    message = problem_of(clone, path=(unbuilt, built))
    assert message.startswith(
        f"gc_cuda._C is not built in {clone}/gc_cuda: run ./compile.sh in {clone}. The gc_cuda in "
        f"{built}/gc_cuda is built"
    )
    assert f"where {clone} is not on sys.path" in message
    assert str(unbuilt) not in message


# As the finder of an editable install does, which stands behind sys.path and knows the package's children.
EDITABLE = """
from importlib.machinery import PathFinder


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        folder = {folder!r} if name == "gc_cuda" else {folder!r} + "/gc_cuda"
        return PathFinder.find_spec(name, [folder]) if name.split(".")[0] == "gc_cuda" else None


sys.meta_path.append(Finder)
"""


def test_the_binary_of_another_clone_is_not_taken(tmp_path: Path) -> None:
    clone, other = tmp_path / "clone", tmp_path / "other"
    for folder in (clone, other):
        folder.mkdir()
        copy_package(folder, EDITABLE.format(folder=str(other)))
    pretend_binary(other)
    assert problem_of(other) == ""
    message = problem_of(clone)
    assert f"not built in {clone}/gc_cuda" in message
    assert f"The gc_cuda in {other}/gc_cuda is built, and its binary serves no other copy" in message


def test_extension_that_does_not_load_says_why(tmp_path: Path) -> None:
    copy_package(tmp_path)
    suffix = ".so" if sys.platform != "win32" else ".pyd"
    (tmp_path / "gc_cuda" / f"_C{suffix}").write_bytes(b"not a library")
    done = run_python(tmp_path, "-m", "gc_cuda")
    assert done.returncode == 1
    assert "does not load beside torch" in done.stdout
    assert "./compile.sh" in done.stdout


def test_extension_for_another_torch_is_refused(tmp_path: Path) -> None:
    copy_package(tmp_path)
    pretend_binary(tmp_path, torch="1.13.1+cpu")
    message = problem_of(tmp_path)
    assert "was built for torch 1.13.1+cpu" in message
    assert "./compile.sh" in message


def test_extension_of_another_version_is_refused(tmp_path: Path) -> None:
    """After a pull without a rebuild, with the real binary."""
    copy_package(tmp_path)
    init = tmp_path / "gc_cuda" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{gc_cuda.__version__}"', '"9.0.0"'))
    assert gc_cuda._C.__file__ is not None
    shutil.copy(gc_cuda._C.__file__, tmp_path / "gc_cuda")
    done = run_python(tmp_path, "-m", "gc_cuda")
    assert done.returncode == 1
    words = (
        f"not ready: gc_cuda._C is of version {gc_cuda.__version__}, and the package in {tmp_path}/gc_cuda "
    )
    assert words + "of version 9.0.0: run ./compile.sh" in done.stdout


def test_extension_of_other_sources_is_refused_in_a_checkout(tmp_path: Path) -> None:
    copy_checkout(tmp_path)
    pretend_binary(tmp_path, sources=_sources.fingerprint(str(tmp_path)))
    assert problem_of(tmp_path) == ""
    with (tmp_path / "csrc" / "ops" / "schema.cpp").open("a") as file:
        file.write("// a comment\n")
    message = problem_of(tmp_path)
    assert f"gc_cuda._C was built of other sources than those in {tmp_path}" in message
    assert f"run ./compile.sh in {tmp_path} again" in message


def test_an_installed_package_has_no_sources_to_compare(tmp_path: Path) -> None:
    copy_package(tmp_path)
    pretend_binary(tmp_path, sources="those of a wheel")
    assert problem_of(tmp_path) == ""


def test_the_binary_of_this_checkout_is_of_its_sources() -> None:
    config = _extension.build_config()
    assert config is not None
    assert len(config["sources"]) == 16
    if Path(gc_cuda.__file__).parents[1] == ROOT:
        assert config["sources"] == _sources.fingerprint(str(ROOT))


def test_the_fingerprint_is_of_names_and_contents_and_of_nothing_else(tmp_path: Path) -> None:
    copy_checkout(tmp_path)
    before = _sources.fingerprint(str(tmp_path))
    ops, plan = tmp_path / "csrc" / "ops" / "schema.cpp", tmp_path / "csrc" / "cpu" / "plan.h"

    ops.write_bytes(ops.read_bytes().replace(b"\n", b"\r\n"))  # as git checks out on Windows
    for left in (".ops.cpp.swp", "ops.cpp~", ".#ops.cpp", "ops.o"):
        (ops.parent / left).write_text("an editor's, or a compiler's")
    (tmp_path / "README.md").touch()
    os.utime(plan, (0, 0))
    assert _sources.fingerprint(str(tmp_path)) == before

    for changed in (
        "setup.py",
        "csrc/ops/schema.cpp",
        "csrc/cpu/plan.h",
        "csrc/cpu/new.h",
        "csrc/new/new.cu",
    ):
        path = tmp_path / changed
        path.parent.mkdir(exist_ok=True)
        was = path.read_bytes() if path.exists() else None
        path.write_bytes((was or b"") + b"// a comment\n")
        assert _sources.fingerprint(str(tmp_path)) != before, changed
        if was is None:
            path.unlink()
        else:
            path.write_bytes(was)

    plan.rename(plan.with_name("plans.h"))
    assert _sources.fingerprint(str(tmp_path)) != before
    plan.with_name("plans.h").rename(plan)
    assert _sources.fingerprint(str(tmp_path)) == before
    text = plan.read_text()
    plan.write_text(text[:-1])
    ops.write_text(text[-1] + ops.read_text())  # the same bytes after one another
    assert _sources.fingerprint(str(tmp_path)) != before


# Importing anew in one process, as notebooks do

FORGET = """
def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == "gc_cuda"]:
        del sys.modules[name]
"""

IMPORTS_ANEW = {
    "everything": "forget()\nimport gc_cuda",
    "all but the binary": "binary = sys.modules['gc_cuda._C']\nforget()\n"
    "sys.modules['gc_cuda._C'] = binary\nimport gc_cuda",
    "the package alone": "del sys.modules['gc_cuda']\nimport gc_cuda",
    "reload": "importlib.reload(gc_cuda)",
    "reload of every module": "for name in sorted(sys.modules):\n"
    "    if name.split('.')[0] == 'gc_cuda' and name != 'gc_cuda.__main__':\n"
    "        importlib.reload(sys.modules[name])",
    "twice": "forget()\nimport gc_cuda\nforget()\nimport gc_cuda",
}


@pytest.mark.parametrize("how", IMPORTS_ANEW)
def test_importing_anew(how: str) -> None:
    program = f"""
import importlib, sys, torch, gc_cuda
{FORGET}
x = torch.randn(2, 8, 5, 3, requires_grad=True)
kept = gc_cuda.ContextBlock(8, 1 / 2)
{IMPORTS_ANEW[how]}
from torch.utils.flop_counter import FlopCounterMode

block = gc_cuda.ContextBlock(8, 1 / 2)
block.load_state_dict(kept.state_dict())
for module in (kept, block):
    assert torch.equal(module(x), x)
    module(x).sum().backward()
with FlopCounterMode(display=False) as counter:
    block(x)
assert counter.get_total_flops() == 4 * x.numel() + 4 * 2 * 8 * 4, counter.get_total_flops()
assert block.to("meta")(x.to("meta")).shape == x.shape
assert gc_cuda.blocks.SEBlock(8)(x).shape == x.shape
try:
    gc_cuda.average_pool(x[0])
except ValueError as error:
    print(error)
with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
    assert kept(torch.empty(3, 8, 2, 2)).shape == (3, 8, 2, 2)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error:::gc_cuda", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "x must have shape [N, C, H, W], got [8, 5, 3]\n"


def test_another_binary_in_one_process_wants_a_restart(tmp_path: Path) -> None:
    """Both would register the same operators, which ends the process."""
    one, other = tmp_path / "one", tmp_path / "other"
    assert gc_cuda._C.__file__ is not None
    for folder in (one, other):
        folder.mkdir()
        copy_package(folder)
        shutil.copy(gc_cuda._C.__file__, folder / "gc_cuda")
    program = f"""
import os, sys, torch, gc_cuda
{FORGET}
def problem_of(folder):
    forget()
    sys.path[0] = folder
    import gc_cuda
    print(gc_cuda._extension.problem() or "fine")

one, other = {str(one)!r}, {str(other)!r}
binary = gc_cuda._C.__file__
for folder in (one, other, one):
    problem_of(folder)
os.utime(binary)  # as built again
problem_of(one)
"""
    done = run_python(one, "-c", program)
    assert done.returncode == 0, done.stderr
    binary = one / "gc_cuda" / Path(gc_cuda._C.__file__).name
    assert done.stdout.splitlines() == [
        "fine",
        f"this process has loaded {binary} before, and gc_cuda, imported anew, is now that in "
        f"{other}/gc_cuda: restart Python",
        "fine",
        f"{binary} was built again after this process had loaded it: restart Python",
    ]


def test_operators_of_somebody_else_want_a_restart() -> None:
    program = """
import torch
library = torch.library.Library("gc_cuda", "DEF")
library.define("global_context(Tensor x) -> Tensor")
import gc_cuda
print(gc_cuda._extension.problem())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "were registered by something else than" in done.stdout
    assert "restart Python" in done.stdout


def test_messages_of_the_binary_are_whole() -> None:
    """With a C++ library of its own inside, a binary stopped at the first number, or crashed there."""
    with pytest.raises(RuntimeError, match=r"logits must have 40 elements, got shape \[2, 7\]"):
        torch.ops.gc_cuda.softmax_pool(torch.zeros(2, 3, 4, 5), torch.zeros(2, 7))


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux")
def test_a_compiler_that_links_its_own_cpp_library(tmp_path: Path) -> None:
    """What setup.py links takes torch's; without it this text ends, or the process, at the number."""
    setup = (ROOT / "setup.py").read_text()
    namespace: dict[str, object] = {"Path": Path}
    exec(setup[setup.index("def cpp_library") : setup.index("# One file holds the CPU")], namespace)
    library = namespace["cpp_library"]()  # type: ignore[operator]
    assert len(library) == 1
    source, binary = tmp_path / "text.cpp", tmp_path / "text.so"
    source.write_text("""
        #include <sstream>
        extern "C" int length(long number) {
          std::ostringstream out;
          out << "n is " << number << ".";
          return static_cast<int>(out.str().size());
        }
    """)
    command = ["g++", "-shared", "-fPIC", str(source), *library, "-static-libstdc++", "-o", str(binary)]
    subprocess.run(command, check=True)
    call = f"import torch, ctypes; print(ctypes.CDLL({str(binary)!r}).length(ctypes.c_long(42)))"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert done.stdout.strip() == str(len("n is 42.")), done.stdout + done.stderr
