"""The README's Python runs as it stands, and the files that it names exist."""

from __future__ import annotations

import contextlib
import re
import sys

import pytest
from paths import ROOT

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
FOLDERS = r"(?:csrc|tests|bench|examples|gc_cuda|\.ci)"
FILES = sorted(set(re.findall(rf"(?<![\w/.])(?:\./)?({FOLDERS}/[\w./-]*|compile\.sh)", README)))


def test_the_readme_has_what_is_tested_here():
    assert len(EXAMPLES) >= 4
    assert {"compile.sh", "bench/gpu.sh", "csrc/cuda/"} <= set(FILES)


@contextlib.contextmanager
def registry_kept():
    """An example replaces mmcv's block for the whole process."""
    try:
        import mmcv.cnn
        from mmengine.registry import MODELS
    except ImportError:
        yield
        return
    try:
        sys.modules.pop("gc_cuda.integrations.mmcv", None)
        yield
    finally:
        MODELS.register_module(name="ContextBlock", force=True, module=mmcv.cnn.ContextBlock)


@pytest.mark.parametrize("source", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(source, capsys):
    for framework in re.findall(r"^(?:import|from) (timm|torchvision|mmcv)\b", source, re.MULTILINE):
        pytest.importorskip(framework, reason=f"{framework} is not installed")
    with registry_kept():
        exec(compile(source, "README.md", "exec"), {})
    printed = "".join(f"# {line}\n" for line in capsys.readouterr().out.splitlines())
    assert printed in source, "what an example prints stands in a comment below it"


@pytest.mark.parametrize("name", FILES)
def test_file_exists(name):
    assert (ROOT / name).exists()
