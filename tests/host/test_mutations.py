"""Every barrier, fence and wait of the kernels is necessary: without it, drivers of the race build fail.

The sites are those of csrc/cuda/kernels/sites.h. With --drop-site a driver does what GC_DROP_SITE does,
without compiling: the harness's barrier(), fence() or wait_for_launch_before() returns at once for that site.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import hostbuild
import pytest
from hostbuild import Driver

Drivers = Callable[[str, str], Driver]

# One seed is enough: see runtime/race.h.
ONE_SCHEDULE = ("--schedule", "random:2", "--first")
REPORTS = ("data race", "uninitialised", "deadlock", "divergent barrier", "early start", "in flight", "got")


def sites() -> list[str]:
    """The names of the enum Site, by number."""
    text = (hostbuild.ROOT / "csrc" / "cuda" / "kernels" / "sites.h").read_text()
    body = re.search(r"enum Site\b[^{]*\{(.*?)\}", re.sub(r"//.*", "", text), re.DOTALL)
    assert body is not None, "sites.h has no enum Site"
    names = [name.strip() for name in body[1].split(",") if name.strip()]
    assert names[-1] == "kSiteCount"
    assert not any("=" in name for name in names), "sites are numbered from 0 on"
    return names[:-1]


SITES = sites()
# Those of one family of kernels each: a chain of launches has no sites of its own.
KERNEL_DRIVERS = [name for name in hostbuild.drivers() if name in hostbuild.launch_files()]
with_race_drivers = [pytest.mark.needs_driver(name, "race") for name in KERNEL_DRIVERS]


@pytest.fixture(scope="module")
def reached(driver: Drivers, pool: ThreadPoolExecutor) -> dict[str, set[int]]:
    """Which sites each driver comes to when nothing is dropped."""
    runs = {name: pool.submit(driver(name, "race"), "--schedule", "ascending:0") for name in KERNEL_DRIVERS}
    found = {}
    for name, run in runs.items():
        code, output = run.result()
        assert code == 0, output
        last = re.search(r"; sites(.*)$", output)
        assert last is not None, output
        found[name] = set(map(int, last[1].split()))
    return found


@pytest.fixture(scope="module")
def runs(
    driver: Drivers,
    pool: ThreadPoolExecutor,
    reached: dict[str, set[int]],
    selected: Callable[[str], list[dict[str, Any]]],
) -> dict[str, dict[str, Future[tuple[int, str]]]]:
    """For each selected site, what the drivers that come to it say without it."""

    def without(number: int) -> dict[str, Future[tuple[int, str]]]:
        arguments = ("--drop-site", str(number), *ONE_SCHEDULE)
        users = [name for name in KERNEL_DRIVERS if number in reached[name]]
        return {name: pool.submit(driver(name, "race"), *arguments) for name in users}

    sites = [one["site"] for one in selected("test_drop")]
    return {site: without(SITES.index(site)) for site in sites}


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """What found each dropped site; printed as a table at the end."""
    table: dict[str, str] = {}
    yield table
    width = max(map(len, SITES))
    lines = [f"{site:{width}}  {table.get(site, 'not found, or not run')}" for site in SITES]
    request.config.stash[hostbuild.TABLES].append(
        "What found each dropped barrier and fence\n" + "\n".join(lines)
    )


class TestEverySiteIsNecessary:
    pytestmark = with_race_drivers

    @pytest.mark.parametrize("site", SITES)
    def test_drop(
        self, runs: dict[str, dict[str, Future[tuple[int, str]]]], findings: dict[str, str], site: str
    ) -> None:
        assert runs[site], f"no driver comes to {site}"
        silent = []
        for name, run in runs[site].items():
            code, output = run.result()
            report = re.search(r"^FAIL (\S+), schedule \S+ (.*)$", output, re.MULTILINE)
            if code == 1 and report is not None:
                assert any(word in report[2] for word in REPORTS), report[0]
                findings.setdefault(site, f"{name}: {report[1]} {report[2][:110]}")
            else:
                silent.append(name)
        assert site in findings, f"dropping {site} goes unnoticed: it is redundant, or no case needs it"
        # Each kernel that has the site needs it.
        assert not silent, f"dropping {site} is noticed, but not by {silent}"
