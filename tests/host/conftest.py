"""What the tests of tests/host share: drivers, built when a selected test needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hostbuild
import pytest

_TARGETS: pytest.StashKey[set[tuple[str, str]]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_driver(name, build): uses this build of a driver of tests/host")
    config.stash[hostbuild.TABLES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for table in terminalreporter.config.stash[hostbuild.TABLES]:
        terminalreporter.section("tests/host")
        terminalreporter.write_line(table)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Notes which drivers the selected tests need, so that they are all built at once."""
    marks = [mark for item in session.items for mark in item.iter_markers("needs_driver")]
    targets: set[tuple[str, str]] = {(mark.args[0], mark.args[1]) for mark in marks}
    session.config.stash[_TARGETS] = targets


@pytest.fixture(scope="session")
def driver(pytestconfig: pytest.Config) -> Callable[[str, str], hostbuild.Driver]:
    """A function (name, build) -> Driver. Tests that use it name what they use in needs_driver marks."""
    reason = hostbuild.missing()
    if reason:
        pytest.skip(f"kernels cannot be run on the CPU here: {reason}")
    targets = pytestconfig.stash[_TARGETS]
    programs = hostbuild.build_all(targets)
    return lambda name, build: hostbuild.Driver(programs[name, build])


@pytest.fixture(scope="session")
def pool() -> Iterator[ThreadPoolExecutor]:
    """For programs of tests that await their own: a module begins all that its selected tests will want."""
    with ThreadPoolExecutor(hostbuild.JOBS) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)  # where a run was stopped


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> Callable[[str], list[dict[str, Any]]]:
    """A function: the parameters of the selected tests of the asking module that have this name."""
    module = request.node.path

    def parameters_of(name: str) -> list[dict[str, Any]]:
        items = [item for item in request.session.items if isinstance(item, pytest.Function)]
        own = [item for item in items if item.path == module]
        return [item.callspec.params for item in own if item.originalname == name]

    return parameters_of
