"""Nobody is told to install a package by a name of ours: none was published, and anyone could take it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import ROOT

FOLDERS = (".ci", "bench", "csrc", "docs", "examples", "gc_cuda", "tests")
TEXTS = sorted(
    path
    for pattern in ("*.md", "*.sh", "*.toml", "*.txt", "setup.py", *(f"{folder}/**/*" for folder in FOLDERS))
    for path in ROOT.glob(pattern)
    if path != Path(__file__)
    and path.suffix in (".md", ".py", ".sh", ".toml", ".txt", ".h", ".cpp", ".cu", "")
    if path.is_file()
)

OURS = r"gc[-_.]?cuda"
EXTRA = rf"\b{OURS}\[\s*[\w,\s-]+\s*\]"  # gc_cuda[timm]
INSTALLER = r"(?:pip3?|uv(?:\s+pip)?|pipx|poetry|pdm|conda|mamba)\s+(?:install|add)"
COMMAND = rf"{INSTALLER}(?:[ \t]+[^\s`]+)*?[ \t]+[\"']?{OURS}(?![\w/.-])"  # pip install … gc_cuda
UNPUBLISHED = re.compile(f"{EXTRA}|{COMMAND}", re.IGNORECASE)


@pytest.mark.parametrize(
    "words",
    [
        "(`pip install gc_cuda[timm]`)",
        "With torchvision (`gc_cuda[torchvision]`)",
        "(pip install 'gc_cuda[mmcv]')",
        "pip install gc_cuda",
        "pip3 install -U --quiet gc-cuda and then",
        "uv pip install 'gc_cuda'",
        "uv add gc_cuda>=0.1",
        "gc_cuda[bench, test]",
    ],
)
def test_such_words_are_found(words):
    assert UNPUBLISHED.search(words)


@pytest.mark.parametrize(
    "words",
    [
        "pip install --no-build-isolation .",
        "pip install --no-build-isolation '.[timm]' torch==2.13.0",
        "pip install timm torch==2.13.0",
        "`pip install ninja`, and gc_cuda is built",
        "pip install --force-reinstall dist/gc_cuda-0.1.0-cp311.whl",
        "pip install /somewhere/gc_cuda",
        "package-data = { gc_cuda = [",
    ],
)
def test_other_words_are_not(words):
    assert not UNPUBLISHED.search(words)


def test_no_text_of_ours_has_them():
    assert {"README.md", "setup.py", "compile.sh", "mmcv.py"} <= {path.name for path in TEXTS}
    assert {".h", ".cpp", ".cu"} <= {path.suffix for path in TEXTS}
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in TEXTS
        for match in UNPUBLISHED.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found
