"""Settings of the whole test run; they stand here because they must be in force before anything is imported."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# No test needs the network: the model ships with the repository.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

RAY = Path(__file__).parent / "cluster"
PACKAGE = re.compile(r"(\S+) is not installed \(Debian's package (\S+)\)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker has all tests that share a running service; of the others each file stays together."""
    for item in items:
        together = "ray" if RAY in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(together))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were left out because a program is not installed, and how to have it."""
    reasons = (report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    absent = Counter(found.groups() for reason in reasons if (found := PACKAGE.search(reason)))
    for (program, package), count in absent.items():
        terminalreporter.write_line(
            f"{count} tests were not run: they need {program} (apt-get install {package})", yellow=True, bold=True
        )
