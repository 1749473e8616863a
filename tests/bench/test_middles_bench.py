"""bench/middles.py: a run on small maps, and what it finds is kept."""

from __future__ import annotations

import json

import pytest


def test_a_run(bench, monkeypatch, tmp_path, capsys):
    middles = bench("middles")
    monkeypatch.setattr(middles, "SIZES", {"28x28": (32, 20, 20)})
    path = tmp_path / "result.json"
    arguments = [
        "--acts",
        "relu",
        "silu",
        "--sizes",
        "28x28",
        "--batch",
        "2",
        "--seconds",
        "0",
        "--rounds",
        "1",
    ]
    assert middles.main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["kind"], row["act"]) for row in rows] == [
        (kind, act) for kind in ("SE", "GC att add") for act in ("relu", "silu")
    ]
    for row in rows:
        eager = 1 if row["act"] == "relu" else 2
        assert row["maps"]["as it is"] == pytest.approx(eager, abs=0.1)
        assert row["maps"]["accelerated"] == pytest.approx(eager, abs=0.1)
        assert row["maps"]["recomputed"] == pytest.approx(0, abs=0.1)
    assert "| SE | silu | 2×32×20×20 |" in capsys.readouterr().out
    assert middles.table_of_families({"a": dict.fromkeys((*middles.VARIANTS, middles.BARE), 1.0)}).endswith(
        "1.0 |"
    )
