"""What several test files share: when a missing tool skips a test, and when it fails it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import psutil
import pytest

from elasticd.testing.claims import sweep
from elasticd.testing.hosts import why_not_namespaces

#: Whether the test's own part passed, for fixtures that judge it afterwards.
PASSED = pytest.StashKey[bool]()
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


def pytest_configure() -> None:
    """Programs that tests start hear Ctrl-C as usual, even where a shell started the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


def need(why_not: str) -> None:
    """Skips with the reason; in CI, where .ci/run installs everything, it fails instead."""
    if why_not and IN_CI:
        pytest.fail(f"CI must be able to run this: {why_not}")
    if why_not:
        pytest.skip(why_not)


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0, what: str = "") -> None:
    """Polls until the condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what or condition}"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether it runs: what is dead and not yet buried does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def open_to_all(folder: Path) -> None:
    """pytest's folders are the user's own: other users may read in here from now on."""
    above = folder.relative_to(Path(tempfile.gettempdir()).resolve()).parents
    for each in (folder, *(Path(tempfile.gettempdir(), part) for part in list(above)[:-1])):
        each.chmod(0o755)


@pytest.fixture
def in_plain_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sessions of this very process are worlds of one, and leave no group behind."""
    import torch.distributed as dist

    for name in [name for name in os.environ if name.startswith(("ELASTICD_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def namespaces() -> None:
    """For tests whose nodes are network namespaces."""
    need(why_not_namespaces())


@pytest.fixture(scope="session", autouse=True)
def _leave_nothing() -> Iterator[None]:
    """What killed test runs left behind is removed before and after."""
    if os.geteuid() == 0:
        sweep()
    yield
    if os.geteuid() == 0:
        sweep()
