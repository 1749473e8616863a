"""Two results side by side: what became slower, and whether that is more than the spread of the times."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from peers import OURS
from samples import LIMIT, Sample, samples_of

THRESHOLD = 0.10  # slower than this, and beyond the spread, is a regression


class Change(NamedTuple):
    """One case that both results have."""

    before: Sample
    after: Sample

    @property
    def ratio(self) -> float:
        """Above 1 is slower."""
        return self.after.p50_ms / self.before.p50_ms

    @property
    def beyond_spread(self) -> bool:
        """Slower, and from its 20th to its 80th percentile apart from what was before."""
        return self.after.p50_ms > self.before.p50_ms and self.after.p20_ms > self.before.p80_ms

    def is_regression(self, threshold: float) -> bool:
        """Of ours: what becomes of the others says something about the machine or PyTorch."""
        return self.after.peer == OURS and self.beyond_spread and self.ratio > 1 + threshold


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The cases of both, worst first."""
    of = {s.key: s for s in samples_of(before)}
    found = [Change(of[s.key], s) for s in samples_of(after) if s.key in of]
    return sorted(found, key=lambda change: change.ratio, reverse=True)


def table(found: list[Change], threshold: float = THRESHOLD) -> str:
    """For a terminal."""
    lines = []
    for change in found:
        mark = "REGRESSION" if change.is_regression(threshold) else "slower" if change.beyond_spread else ""
        ms = f"{change.before.p50_ms:10.4f} -> {change.after.p50_ms:10.4f} ms"
        lines.append(f"{change.ratio:6.2f}  {ms}  {mark:10}  {change.after.peer:13}  {change.after.name}")
    return "\n".join(lines)


def summary(
    before: dict[str, Any], after: dict[str, Any], found: list[Change], threshold: float
) -> list[str]:
    """What the table comes to, and what speaks against believing it."""
    lines = []
    for name in ("name", "capability"):
        a, b = before["device"][name], after["device"][name]
        if a != b:
            lines.append(f"NOT THE SAME DEVICE: {a} and {b}")
    if before["allocator"] != after["allocator"] or before["threads"] != after["threads"]:
        lines.append("not the same allocator or number of threads")
    for peer, what in ((LIMIT, "the copy"), (OURS, OURS)):
        ratios = [change.ratio for change in found if change.after.peer == peer]
        if ratios:
            lines.append(
                f"{what}: {statistics.median(ratios):.2f} times the time before, in the median of "
                f"{len(ratios)}"
            )
    hosts = [
        change.after.host_us / change.before.host_us
        for change in found
        if change.after.peer == OURS and change.before.host_us and change.after.host_us
    ]
    if hosts:
        lines.append(
            f"the host of {OURS}: {statistics.median(hosts):.2f} times, in the median of {len(hosts)}"
        )
    regressions = sum(change.is_regression(threshold) for change in found)
    lines.append(
        f"{len(found)} cases in both; {regressions} regressions beyond {threshold:.0%} and the spread"
    )
    return lines
