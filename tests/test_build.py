"""What gets built: finding the toolkit, CUDA or not, the architectures, and the words where it cannot be."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import gc_cuda
from gc_cuda import _extension, _sources, _toolkit
from gc_cuda._toolkit import ToolkitError

ROOT = Path(__file__).resolve().parents[1]


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def make_toolkit(home: Path, version: str = "13.0") -> Path:
    """A folder whose bin/nvcc answers as the real one does."""
    write_program(
        home / "bin" / "nvcc",
        f"""case $1 in
          --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
          --dryrun) printf '#$ _HERE_={home}/bin\\n#$ TOP={home}/bin/..\\n#$ PATH=/x\\n' >&2 ;;
          *) exit 1 ;;
        esac""",
    )
    return home


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    return make_toolkit(tmp_path / "cuda-13.0")


def decide(
    torch_cuda: str | None,
    environ: dict[str, str],
    capabilities: tuple[tuple[int, int], ...] = (),
) -> _toolkit.Decision:
    return _toolkit.decide(torch_cuda, capabilities, environ, default_home="/nowhere")


# Finding the toolkit


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_environment_names_the_toolkit(toolkit: Path, variable: str) -> None:
    found = _toolkit.find_toolkit({variable: str(toolkit), "PATH": ""}, "/nowhere")
    assert found == (str(toolkit), "13.0", variable)


def test_wrapper_on_the_path_leads_to_the_toolkit_itself(toolkit: Path, tmp_path: Path) -> None:
    wrapper = write_program(tmp_path / "local" / "bin" / "nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    found = _toolkit.find_toolkit({"PATH": f"{wrapper.parent}:{os.defpath}"}, "/nowhere")
    assert found.home == str(toolkit)
    assert str(wrapper) in found.found_by


def test_home_is_without_dots_and_links(toolkit: Path, tmp_path: Path) -> None:
    link = tmp_path / "cuda"
    link.symlink_to(toolkit)
    assert _toolkit.find_toolkit({"PATH": ""}, str(link)).home == str(toolkit)
    assert _toolkit.find_toolkit({"CUDA_HOME": f"{toolkit}/bin/..", "PATH": ""}).home == str(toolkit)


def test_cuda_home_comes_before_the_path(toolkit: Path, tmp_path: Path) -> None:
    other = make_toolkit(tmp_path / "cuda-12.4", "12.4")
    found = _toolkit.find_toolkit({"CUDA_HOME": str(other), "PATH": f"{toolkit}/bin:{os.defpath}"})
    assert found.version == "12.4"


@pytest.mark.parametrize(
    ("script", "words"),
    [("exit 3", "failed"), ("echo nothing", "TOP"), ("echo '#$ TOP=/not/there'", "no bin/nvcc")],
    ids=["fails", "says nothing", "leads nowhere"],
)
def test_useless_nvcc_is_named(tmp_path: Path, script: str, words: str) -> None:
    nvcc = write_program(tmp_path / "bin" / "nvcc", script)
    with pytest.raises(ToolkitError, match=words) as caught:
        _toolkit.find_toolkit({"PATH": str(nvcc.parent)}, "/nowhere")
    assert str(nvcc) in str(caught.value)


def test_nothing_found_says_where_it_looked() -> None:
    with pytest.raises(ToolkitError, match=r"CUDA_HOME.*PATH.*/nowhere"):
        _toolkit.find_toolkit({"PATH": ""}, "/nowhere")


# CUDA or not


def test_cuda_is_built_when_torch_and_toolkit_are_there(toolkit: Path) -> None:
    decision = decide("13.0", {"CUDA_HOME": str(toolkit), "PATH": ""})
    assert decision.toolkit is not None
    assert not decision.surprising
    line = decision.describe()
    for word in ("CUDA", "13.0", str(toolkit), "CUDA_HOME", "12.0+PTX", "no GPU is visible"):
        assert word in line


def test_torch_without_cuda_gives_a_cpu_build(toolkit: Path) -> None:
    decision = decide(None, {"CUDA_HOME": str(toolkit), "PATH": ""})
    assert decision.toolkit is None
    assert not decision.surprising
    assert decision.describe() == "CPU only (torch was made without CUDA)"


def test_missing_toolkit_gives_a_cpu_build_but_not_silently() -> None:
    decision = decide("13.0", {"PATH": ""})
    assert decision.toolkit is None
    assert decision.surprising
    assert "torch has CUDA 13.0" in decision.reason
    assert "no nvcc" in decision.reason


def test_force_cuda_0_refuses(toolkit: Path) -> None:
    decision = decide("13.0", {"FORCE_CUDA": "0", "CUDA_HOME": str(toolkit), "PATH": ""})
    assert (decision.toolkit, decision.arch_list, decision.reason) == (None, "", "FORCE_CUDA=0")


def test_force_cuda_1_builds(toolkit: Path) -> None:
    decision = decide("13.0", {"FORCE_CUDA": "1", "CUDA_HOME": str(toolkit), "PATH": ""})
    assert decision.toolkit is not None


def test_force_cuda_1_without_cuda_in_torch_is_an_error(toolkit: Path) -> None:
    with pytest.raises(ToolkitError, match=r"torch here was made without CUDA.*install"):
        decide(None, {"FORCE_CUDA": "1", "CUDA_HOME": str(toolkit), "PATH": ""})


def test_force_cuda_1_without_toolkit_is_an_error() -> None:
    with pytest.raises(
        ToolkitError, match=r"no usable CUDA toolkit.*Install the CUDA 13\.0 toolkit.*CUDA_HOME"
    ):
        decide("13.0", {"FORCE_CUDA": "1", "PATH": ""})


def test_force_cuda_must_be_0_or_1() -> None:
    with pytest.raises(ToolkitError, match="FORCE_CUDA must be 0, 1 or unset, got 'yes'"):
        decide("13.0", {"FORCE_CUDA": "yes"})


def test_toolkit_of_another_generation_is_refused_and_of_another_minor_taken(tmp_path: Path) -> None:
    old = {"CUDA_HOME": str(make_toolkit(tmp_path / "old", "12.8")), "PATH": ""}
    with pytest.raises(ToolkitError, match=r"is CUDA 12\.8, but torch was made with CUDA 13\.0"):
        decide("13.0", {**old, "FORCE_CUDA": "1"})
    assert decide("13.0", old).surprising
    assert decide("12.4", old).toolkit is not None


# Architectures


def test_default_architectures_of_cuda_13() -> None:
    assert _toolkit.default_arch_list("13.0", "13.0") == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


@pytest.mark.parametrize("version", ["11.8", "12.1", "12.4", "12.6", "12.8", "12.9"])
def test_default_architectures_have_volta_up_to_cuda_12(version: str) -> None:
    names = _toolkit.default_arch_list(version, version).split(";")
    assert names[0] == "7.0"
    assert [name.endswith("+PTX") for name in names] == [False] * (len(names) - 1) + [True]
    assert ("12.0+PTX" in names) == (version in ("12.8", "12.9"))


def test_default_architectures_are_ones_that_torch_knows() -> None:
    """torch 2.6 was made with CUDA 12.4 and calls sm_100 unknown, whatever the toolkit can do."""
    assert _toolkit.default_arch_list("12.8", "12.4").endswith(";9.0+PTX")


def test_default_architectures_pass_torchs_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    if _toolkit.version_tuple(torch.__version__) < (2, 9):
        pytest.skip("CUDA 13 is newer than this torch")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", _toolkit.default_arch_list("13.0", "13.0"))
    flags = _get_cuda_arch_flags([])
    assert "-gencode=arch=compute_75,code=sm_75" in flags
    assert "-gencode=arch=compute_120,code=compute_120" in flags


def test_ancient_toolkit_is_an_error() -> None:
    with pytest.raises(ToolkitError, match="too old"):
        _toolkit.default_arch_list("8.0", "8.0")


def test_arch_list_of_the_environment_is_respected(toolkit: Path) -> None:
    environ = {"CUDA_HOME": str(toolkit), "PATH": "", "TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}
    decision = decide("13.0", environ, ((12, 0),))
    assert decision.arch_list == "8.0;9.0+PTX"
    assert "TORCH_CUDA_ARCH_LIST" in decision.reason


def test_visible_gpus_choose_the_architectures(toolkit: Path) -> None:
    decision = decide("13.0", {"CUDA_HOME": str(toolkit), "PATH": ""}, ((9, 0), (8, 6), (9, 0)))
    assert decision.arch_list == "8.6;9.0+PTX"
    assert "visible GPUs" in decision.reason


CARDS = ((6, 0), (6, 1), (7, 0), (7, 2), (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0))
CARDS += ((10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0))

# For each toolkit, what each of CARDS gets if it is alone; None: nothing.
SERVED = {
    "11.8": "- - 7.0 7.0 7.5 8.0 8.6 8.6 8.9 9.0 9.0 9.0 9.0 9.0 9.0 9.0",
    "12.4": "- - 7.0 7.0 7.5 8.0 8.6 8.6 8.9 9.0 9.0 9.0 9.0 9.0 9.0 9.0",
    "12.8": "- - 7.0 7.0 7.5 8.0 8.6 8.6 8.9 9.0 10.0 10.0 10.0 12.0 12.0 12.0",
    "13.0": "- - - - 7.5 8.0 8.6 8.6 8.9 9.0 10.0 10.0 10.0 12.0 12.0 12.0",
}
EACH = [
    pytest.param(version, card, None if name == "-" else f"{name}+PTX", id=f"{version}-{card[0]}.{card[1]}")
    for version, names in SERVED.items()
    for card, name in zip(CARDS, names.split(), strict=True)
]


@pytest.mark.parametrize(("version", "card", "expected"), EACH)
def test_each_gpu_gets_what_serves_it_or_words(
    version: str, card: tuple[int, int], expected: str | None
) -> None:
    sentences = _toolkit.unserved([card], version, version)
    if expected is not None:
        assert _toolkit.device_arch_list([card], version, version) == expected
        assert _toolkit.covers(expected, card)
        assert sentences == []
        return
    with pytest.raises(
        _toolkit.UnservedError, match=f"CUDA {version} cannot serve the visible GPUs"
    ) as caught:
        _toolkit.device_arch_list([card], version, version)
    (sentence,) = sentences
    assert sentence in str(caught.value)
    words = ("7.0, the oldest",) if card < (7, 0) else ("dropped by CUDA 13", "CUDA 12 toolkit", "torch 2.10")
    for word in (f"compute capability {card[0]}.{card[1]}", *words):
        assert word in sentence


@pytest.mark.parametrize(
    ("cards", "version", "expected", "left_out"),
    [
        ([(7, 0), (9, 0)], "13.0", "9.0+PTX", ["7.0 was dropped"]),
        ([(9, 0), (7, 0), (6, 0), (7, 0)], "13.0", "9.0+PTX", ["6.0 is below", "7.0 was dropped"]),
        ([(6, 0), (7, 0)], "12.8", "7.0+PTX", ["6.0 is below"]),
        ([(8, 9), (8, 6), (8, 0)], "13.0", "8.0;8.6;8.9+PTX", []),
        ([(8, 7), (8, 6)], "12.8", "8.6+PTX", []),  # one code for both
        ([(11, 0), (12, 0)], "13.0", "10.0+PTX;12.0+PTX", []),  # the first runs PTX of a generation before
        ([(12, 0), (8, 0)], "12.4", "8.0;9.0+PTX", []),
        ([(12, 0), (9, 0)], "11.8", "9.0+PTX", []),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_gpus_side_by_side(
    cards: list[tuple[int, int]], version: str, expected: str, left_out: list[str]
) -> None:
    assert _toolkit.device_arch_list(cards, version, version) == expected
    sentences = _toolkit.unserved(cards, version, version)
    assert len(sentences) == len(left_out)
    for sentence, words in zip(sentences, left_out):
        assert f"compute capability {words}" in sentence
    for card in cards:
        old = any(f"compute capability {card[0]}.{card[1]} " in sentence for sentence in sentences)
        assert _toolkit.covers(expected, card) is not old


@pytest.mark.parametrize(("toolkit_version", "torch_cuda"), [("12.8", "12.4"), ("12.4", "12.8")])
def test_gpus_get_what_both_toolkit_and_torch_know(toolkit_version: str, torch_cuda: str) -> None:
    assert _toolkit.device_arch_list([(12, 0)], toolkit_version, torch_cuda) == "9.0+PTX"


def test_a_gpu_that_is_left_out_is_named_in_the_decision(toolkit: Path) -> None:
    decision = decide("13.0", {"CUDA_HOME": str(toolkit), "PATH": ""}, ((7, 0), (9, 0)))
    assert decision.toolkit is not None
    assert decision.arch_list == "9.0+PTX"
    assert "left out: compute capability 7.0" in decision.describe()
    assert "left out" not in decide("13.0", {"CUDA_HOME": str(toolkit), "PATH": ""}, ((9, 0),)).describe()


@pytest.mark.parametrize("card", [(6, 0), (7, 0)], ids=str)
def test_gpus_that_nothing_serves_give_a_cpu_build_but_not_silently(
    toolkit: Path, card: tuple[int, int]
) -> None:
    environ = {"CUDA_HOME": str(toolkit), "PATH": ""}
    decision = decide("13.0", environ, (card,))
    assert decision.toolkit is None
    assert decision.surprising
    assert f"compute capability {card[0]}.{card[1]}" in decision.reason
    with pytest.raises(
        ToolkitError, match=r"FORCE_CUDA=1, but .*cannot serve.*TORCH_CUDA_ARCH_LIST"
    ) as caught:
        decide("13.0", {**environ, "FORCE_CUDA": "1"}, (card,))
    assert "no usable CUDA toolkit" not in str(caught.value)
    chosen = decide("13.0", {**environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}, (card,))
    assert chosen.arch_list == "9.0"


def test_report_says_what_serves_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    from gc_cuda.__main__ import _gpu_verdict

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    config = {"cuda": "13.0", "arch_list": "9.0+PTX"}
    verdict = _gpu_verdict(config, [("V100", (7, 0)), ("H100", (9, 0))])
    assert "no kernel image for V100: compute capability 7.0 was dropped by CUDA 13" in verdict
    verdict = _gpu_verdict(config, [("A100", (8, 0))])
    assert "no kernel image for A100: run ./compile.sh with TORCH_CUDA_ARCH_LIST unset" in verdict


@pytest.mark.parametrize(
    ("arch_list", "capability", "expected"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),  # machine code runs on later cards of its generation
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("7.5;9.0+PTX", (8, 0), False),
        ("7.5+PTX;9.0", (8, 0), True),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (12, 0), False),  # what ends in "a" is for one architecture alone
        ("8.0 9.0", (9, 0), True),
        ("Hopper", (8, 0), True),  # a family's name: nothing is known against it
    ],
)
def test_covers(arch_list: str, capability: tuple[int, int], expected: bool) -> None:
    assert _toolkit.covers(arch_list, capability) is expected


# The package and the report


def test_versions_agree() -> None:
    config = _extension.build_config()
    assert config is not None
    source = (ROOT / "gc_cuda" / "__init__.py").read_text()
    assert f'__version__ = "{config["version"]}"' in source
    assert config["torch"] == torch.__version__


def test_report_says_that_it_is_ready() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gc_cuda"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in (
        "gc_cuda:",
        "python:",
        f"torch:          {torch.__version__}",
        "devices:",
        "ready on the CPU",
    ):
        assert word in done.stdout


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
    for name in ("setup.py", "csrc/ops.cpp", "csrc/cpu/plan.h"):
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
    with (tmp_path / "csrc" / "ops.cpp").open("a") as file:
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
    ops, plan = tmp_path / "csrc" / "ops.cpp", tmp_path / "csrc" / "cpu" / "plan.h"

    ops.write_bytes(ops.read_bytes().replace(b"\n", b"\r\n"))  # as git checks out on Windows
    for left in (".ops.cpp.swp", "ops.cpp~", ".#ops.cpp", "ops.o"):
        (ops.parent / left).write_text("an editor's, or a compiler's")
    (tmp_path / "README.md").touch()
    os.utime(plan, (0, 0))
    assert _sources.fingerprint(str(tmp_path)) == before

    for changed in ("setup.py", "csrc/ops.cpp", "csrc/cpu/plan.h", "csrc/cpu/new.h", "csrc/new/new.cu"):
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


def test_build_says_what_is_wrong_with_force_cuda() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    environ = {**os.environ, "FORCE_CUDA": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "FORCE_CUDA=1, but the torch here was made without CUDA" in done.stderr


def test_unknown_verb_prints_the_usage() -> None:
    done = subprocess.run([ROOT / "compile.sh", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "./compile.sh test" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_gpu_script_without_gpu_says_so(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), str(tmp_path / "out")],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()
