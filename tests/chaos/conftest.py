"""Tells a drill whether its test has passed."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from drill import PASSED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report
