"""Every measured figure in README comes from a committed result file."""

from __future__ import annotations

import importlib
import json
import re

import pytest
from invented_result import gpu_result
from paths import ROOT

README = (ROOT / "README.md").read_text()
SECTION = re.compile(r"<!-- figures: (\S+) -->\n(.*?)<!-- end figures -->", re.DOTALL)
# What a measured figure looks like: milliseconds, speed-ups, rates. 2×512 and 800×1333 are sizes.
FIGURE = re.compile(r"(?<![\d.×])(\d+(?:\.\d+)?)\s?(?:ms\b|µs\b|us\b|GB/s|TB/s|×(?!\d))")
LINKED = re.compile(r"\]\((bench/results/[\w-]+)\.md\)")


@pytest.fixture
def readme(bench):
    return bench("readme")


def test_generated_sections_are_what_their_results_give(readme):
    """No figure between the comments was written by hand, and none has drifted from its file."""
    sections = list(SECTION.finditer(README))
    assert sections, "README has the place for the figures"
    for section in sections:
        path, body = section[1], section[2]
        if path == readme.NONE:
            assert not body.strip(), "a section that waits for its result has no figures"
            continue
        result = importlib.import_module("samples").read(ROOT / path)
        assert section[0] == readme.section(result, path), f"run: python bench/report.py --readme {path}"
        for name in re.findall(r"\]\(([^)]+)\)", body):
            assert (ROOT / name).exists()


def numbers_in(content: object) -> list[float]:
    """Every number of a result file, and the speed-ups that its ratios to eager stand for."""
    if isinstance(content, dict):
        inverse = [1 / content["of_eager"]] if content.get("of_eager") else []
        return inverse + [number for value in content.values() for number in numbers_in(value)]
    if isinstance(content, list):
        return [number for value in content for number in numbers_in(value)]
    return [float(content)] if isinstance(content, (int, float)) and not isinstance(content, bool) else []


def is_rounded(text: str, numbers: list[float]) -> bool:
    decimals = len(text.partition(".")[2])
    return any(f"{number:.{decimals}f}" == text for number in numbers)


def figures_by_hand() -> list[str]:
    """Outside of the comments and of code: what has a unit, and the cells of tables of times."""
    text = re.sub(r"^```.*?^```", "", SECTION.sub("", README), flags=re.MULTILINE | re.DOTALL)
    found = FIGURE.findall(text)
    titles: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        titles = (titles or cells) if cells else []
        if titles and any("faster" in title for title in titles):
            found += [cell for cell in cells if re.fullmatch(r"\d+\.\d+", cell)]
    return found


def test_figures_by_hand_are_in_a_linked_result():
    pages = sorted(set(LINKED.findall(README)))
    assert all((ROOT / f"{page}.md").exists() for page in pages)
    # A page may have several files of figures, whose names begin with its own; one of checks has none.
    linked = [path for page in pages for path in sorted(ROOT.glob(f"{page}*.json"))]
    with_figures = [page for page in pages if not page.endswith("-checks")]
    assert all(any(path.stem.startswith(page.split("/")[-1]) for path in linked) for page in with_figures)
    numbers = [number for path in linked for number in numbers_in(json.loads(path.read_text()))]
    missing = sorted({figure for figure in figures_by_hand() if not is_rounded(figure, numbers)})
    assert not missing, f"in none of {linked}"


def test_a_figure_that_was_not_measured_is_found():
    assert FIGURE.findall("it takes 8.6 ms, 3.4× less, 12 GB/s; 2×512×100×168 and 800×1333") == [
        "8.6",
        "3.4",
        "12",
    ]
    assert is_rounded("8.6", [8.597])
    assert not is_rounded("8.6", [8.4, 86.0])


def test_the_figures_of_a_result(readme):
    result = gpu_result()
    path = "bench/results/invented-gpu-80gb.json"
    text = readme.replaced("before\n<!-- figures: none -->\n<!-- end figures -->\nafter\n", result, path)
    assert text.startswith(f"before\n<!-- figures: {path} -->\n")
    assert text.endswith("<!-- end figures -->\nafter\n")
    row = r"^\| forward \| c3 2×512×100×168 \| nchw \| 0\.121 → [\d.]+ \| 0\.402 → [\d.]+ \|"
    assert re.search(row, text, re.MULTILINE), "plain stream and CUDA graph"
    assert "(bench/results/invented-gpu-80gb-times-cold.png)" in text
    assert "Invented GPU 80GB" in text
    assert text.count("\n| forward") == 2 * 2 * 3, "both directions and layouts of c3, c4 and c5"
    assert readme.replaced(text, result, path) == text
    assert SECTION.search(text)[0] == readme.section(result, path)


def test_it_must_be_clear_which_section_is_meant(readme):
    two = "<!-- figures: a.json -->\n<!-- end figures -->\n<!-- figures: b.json -->\n<!-- end figures -->\n"
    assert "figures: b.json -->\n\nOne block" in readme.replaced(two, gpu_result(), "b.json")
    with pytest.raises(ValueError, match=r"no section for c\.json, none that waits, and 2 others"):
        readme.replaced(two, gpu_result(), "c.json")
