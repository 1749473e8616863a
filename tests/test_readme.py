"""The README's Python runs as it stands, and the files that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
FILES = sorted(
    set(re.findall(r"(?<![\w/.])(?:\./)?((?:csrc|tests|bench|gc_cuda|\.ci)/[\w./-]*|compile\.sh)", README))
)


def test_the_readme_has_what_is_tested_here():
    assert len(EXAMPLES) >= 4
    assert {"compile.sh", "bench/gpu.sh", "csrc/kernels/"} <= set(FILES)


@pytest.mark.parametrize("source", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(source, capsys):
    exec(compile(source, "README.md", "exec"), {})
    printed = "".join(f"# {line}\n" for line in capsys.readouterr().out.splitlines())
    assert printed in source, "what an example prints stands in a comment below it"


@pytest.mark.parametrize("name", FILES)
def test_file_exists(name):
    assert (ROOT / name).exists()
