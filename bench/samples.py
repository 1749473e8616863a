"""The result file of bench/report.py: its samples, and how they are found, grouped and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cases import DIRECTIONS, LAYOUTS, STAGES, Case, ratio_text
from peers import OURS

SCHEMA = 1  # of the file; raise it when a field changes its meaning
LIMIT = "copy"  # the peer that copies as many bytes as a block must move
CLONE = "clone of x"
WARM, COLD = "warm", "cold"
STREAM, GRAPH = "stream", "graph"


class Sample(NamedTuple):
    """One peer in one case, cache state and way of launching."""

    direction: str
    fusion: str
    ratio: float
    dtype: str
    stage: str
    shape: list[int]
    layout: str
    peer: str
    cache: str
    launch: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    passes: int
    bytes: int  # of the formula, whatever a peer moves
    host_us: float | None = None  # until a call returns; on a GPU, in results since it is measured

    @property
    def case(self) -> tuple[Any, ...]:
        """What peers, cache states and ways of launching have in common."""
        return (*self[:5], tuple(self.shape), self.layout)

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self.case, self.peer, self.cache, self.launch)

    @property
    def entry(self) -> dict[str, Any]:
        """As it stands in a file: without the host's time where there is none."""
        return {
            name: value for name, value in self._asdict().items() if name != "host_us" or value is not None
        }

    @property
    def setting(self) -> tuple[str, float, str]:
        return self.fusion, self.ratio, self.dtype

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def map(self) -> str:
        return f"{self.stage} {'×'.join(map(str, self.shape))}"

    @property
    def mib(self) -> float:
        """Of x."""
        return self.bytes / self.passes / 2**20

    @property
    def name(self) -> str:
        """Of all that `key` tells apart but the peer."""
        what = f"{self.map} {self.layout}, {self.direction}, {setting_text(self.setting)}"
        return f"{what}, {self.cache}, {self.launch}"


def setting_text(setting: tuple[str, float, str]) -> str:
    fusion, ratio, dtype = setting
    return f"{dtype}, ratio {ratio_text(ratio)}, {fusion}"


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80, by linear interpolation between the values themselves."""
    values = sorted(values)

    def at(share: float) -> float:
        position = share * (len(values) - 1)
        low = math.floor(position)
        high = min(low + 1, len(values) - 1)
        return values[low] + (position - low) * (values[high] - values[low])

    return {"p20_ms": at(0.2), "p50_ms": at(0.5), "p80_ms": at(0.8)}


def sample(
    case: Case, peer: str, cache: str, launch: str, times: list[float], host_us: float | None = None
) -> Sample:
    """Of one series of times."""
    return Sample(
        case.direction,
        case.fusion,
        case.ratio,
        case.dtype,
        case.stage,
        list(case.shape),
        case.layout,
        peer,
        cache,
        launch,
        **quantiles(times),
        rounds=len(times),
        passes=case.passes,
        bytes=case.bytes_moved,
        host_us=host_us,
    )


def samples_of(result: dict[str, Any]) -> list[Sample]:
    return [Sample(**entry) for entry in result["samples"]]


class Comparison(NamedTuple):
    """The peers of one case under one cache state and way of launching."""

    peers: dict[str, Sample]

    @property
    def any(self) -> Sample:
        """For what all of them share."""
        return next(iter(self.peers.values()))

    def ms(self, peer: str) -> float | None:
        return self.peers[peer].p50_ms if peer in self.peers else None

    def host_us(self, peer: str) -> float | None:
        return self.peers[peer].host_us if peer in self.peers else None

    def ratio(self, above: str, below: str) -> float | None:
        """Of medians."""
        a, b = self.ms(above), self.ms(below)
        return a / b if a is not None and b else None

    def faster(self, than: str) -> float | None:
        """How many times ours is faster."""
        return self.ratio(than, OURS)

    def share(self, peer: str) -> float | None:
        """Of the limit: 1 is the time of a copy of as many bytes."""
        return self.ratio(LIMIT, peer)


def comparisons(samples: Iterable[Sample], **wanted: Any) -> list[Comparison]:
    """Side by side what was timed side by side; `wanted` names fields and the value that they must have."""
    found: dict[tuple[Any, ...], dict[str, Sample]] = {}
    for one in samples:
        if all(getattr(one, name) == value for name, value in wanted.items()):
            found.setdefault((*one.case, one.cache, one.launch), {})[one.peer] = one
    return [Comparison(peers) for peers in found.values()]


def with_host(samples: Iterable[Sample]) -> bool:
    """Whether the host was timed: not on a CPU, and not in results from before it was."""
    return any(one.host_us is not None for one in samples)


def headline(samples: list[Sample]) -> list[Sample]:
    """Of the setting, and for each map of the batch, that were measured first."""
    kept = [s for s in samples if s.setting == samples[0].setting]
    batch: dict[str, int] = {}
    for s in kept:
        batch.setdefault(s.stage, s.batch)
    orders = [list(DIRECTIONS), list(STAGES), list(LAYOUTS)]

    def place(s: Sample) -> list[int]:
        names = s.direction, s.stage, s.layout
        return [order.index(n) if n in order else len(order) for order, n in zip(orders, names)]

    return sorted((s for s in kept if s.batch == batch[s.stage]), key=place)


def read(path: Path) -> dict[str, Any]:
    """A result of this schema.

    Raises:
        ValueError: for a file of another kind.
    """
    content = json.loads(path.read_text())
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path} has schema {found}; bench/report.py reads {SCHEMA}")
    return content


def is_result(path: Path) -> bool:
    try:
        read(path)
    except (OSError, ValueError):
        return False
    return True


def write(path: Path, result: dict[str, Any]) -> None:
    """One line for each sample, so that a difference between two files can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, value in result.items():
        if isinstance(value, list) and value:
            body = ",\n  ".join(json.dumps(_rounded(entry), ensure_ascii=False) for entry in value)
            parts.append(f" {json.dumps(name)}: [\n  {body}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(_rounded(value), ensure_ascii=False)}")
    unfinished = path.with_suffix(".part")  # a run that is killed leaves the last whole file
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    unfinished.replace(path)


def _rounded(value: Any) -> Any:
    """Times to six digits: there is no more in them."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value
