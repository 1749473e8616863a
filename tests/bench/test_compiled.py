"""bench/compiled.py: which variant is held to PyTorch's, what is marked, and a run on small maps."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def compiled(bench):
    return bench("compiled")


def test_what_is_served(compiled):
    served = {(case.kind.name, case.place): case.served for case in compiled.CASES}
    assert {variant for (_, place), variant in served.items() if place == "end"} == {"tail"}
    of_middles = {kind: variant for (kind, place), variant in served.items() if place != "end"}
    assert {kind for kind, variant in of_middles.items() if variant == "operator"} == {
        *("GC att add", "GC att mul", "GC att both")
    }


def test_what_is_missed(compiled):
    maps = {"PyTorch": 1.0, "operator": 2.0}
    times = {"PyTorch": 1.0, "operator": 1.1}
    row = compiled.Row("GC att add", "relu", "operator", maps, {"training": times, "forward": times})
    assert row.missed == ["keeps more", "slower training", "slower forward"]
    assert row._replace(served="PyTorch").missed == []
    assert row._replace(maps={}).missed == ["slower training", "slower forward"]
    assert "slower forward |" in compiled.table([row], ["training", "forward"])


def test_of_several_runs_the_quietest_counts(compiled):
    maps, few, many = {"PyTorch": 1.0, "operator": 1.0}, {"PyTorch": 1.0}, {"PyTorch": 9.0}
    rows = [
        compiled.Row("SE", "silu", "PyTorch", maps, {"training": one, "forward": other})
        for one, other in ((few, many), (many, few))
    ]
    assert compiled.quietest(rows) == [rows[0]._replace(ms={"training": few, "forward": few})]


def test_a_run(compiled, monkeypatch, tmp_path, capsys):
    """Eager stands for the compiler: it takes no time to compile, and keeps x for both."""
    monkeypatch.setattr(compiled, "SIZES", dict.fromkeys(compiled.SIZES, (32, 4, 4)))
    compile_by = compiled.torch.compile
    monkeypatch.setattr(compiled.torch, "compile", lambda model, **_: compile_by(model, backend="eager"))
    path = tmp_path / "result.json"
    arguments = [
        "--kinds",
        "SE",
        "--places",
        "end",
        "silu",
        "--seconds",
        "0",
        "--rounds",
        "1",
        "--batch",
        "2",
    ]
    assert compiled.main([*arguments, "--json", str(path)]) == 0
    first, second = json.loads(path.read_text())["rows"]
    assert list(first["maps"]) == ["PyTorch", "operator", "tail"] and list(first["ms"]) == [
        "training",
        "forward",
    ]
    assert first["maps"]["tail"] < first["maps"]["PyTorch"]
    assert list(second["maps"]) == ["PyTorch", "operator"]
    printed = capsys.readouterr().out
    assert compiled.main(["--table-of", str(path)]) == 0
    assert capsys.readouterr().out == printed
