"""Finding the toolkit, CUDA or not, the architectures, and the words where it cannot be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from gc_cuda import _toolkit
from gc_cuda._toolkit import ToolkitError


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
