"""bench/around.py: a run on small maps, and what it finds is kept."""

from __future__ import annotations

import json


def test_a_run(bench, monkeypatch, tmp_path, capsys):
    around = bench("around")
    monkeypatch.setattr(around, "SIZES", {"7x7": (32, 7, 7)})
    path = tmp_path / "result.json"
    arguments = ["--sizes", "7x7", "--batches", "2", "--seconds", "0", "--rounds", "1", "--json", str(path)]
    assert around.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["work"], row["layout"], row["middle"]) for row in rows] == [
        (work, layout, middle)
        for work in around.PASSES
        for layout in around.LAYOUTS
        for middle in around.MIDDLES
    ]
    for row in rows:
        low, high = row["quartiles"]
        assert low <= row["ratio"] <= high
    assert "| training | nchw | 2×32×7×7 | ECA |" in capsys.readouterr().out
