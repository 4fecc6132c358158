"""Settings of the whole test run; they stand here because they must be in force before anything is imported."""

from __future__ import annotations

import os
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray would run services at nice 15: a test that computes beside them would leave them three percent of the processors.
os.environ.setdefault("RAY_worker_niceness", "0")
# No test needs the network: the model ships with the repository.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Examples share the processors with whatever else runs; how long one takes says nothing.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).parent.parent
CLUSTER = "tests/cluster/"
SERVICE = re.compile(r"\b(?:service: str|http: httpx\.Client|client: openai\.OpenAI)\b")
"""How a test or fixture asks for the running service of tests/cluster/conftest.py."""
PACKAGE = re.compile(r"(\S+) is not installed \(Debian's package (\S+)\)")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker has all files that share the running service; of the others each file stays together."""
    from xdist.scheduler import LoadScopeScheduling

    class ByService(LoadScopeScheduling):  # "loadgroup" of xdist 3.8 does not group with pytest 9.2
        def _split_scope(self, nodeid: str) -> str:
            return CLUSTER if shares_the_service(nodeid) else nodeid.partition("::")[0]

    return ByService(config, log)


def shares_the_service(nodeid: str) -> bool:
    """Whether a test's file asks for the running service of tests/cluster/conftest.py."""
    file = nodeid.partition("::")[0]
    return file.startswith(CLUSTER) and _asks_for_the_service(file)


@cache
def _asks_for_the_service(file: str) -> bool:
    return SERVICE.search((ROOT / file).read_text(encoding="utf-8")) is not None


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """No bytes in a test's name: compressed ones hold the time, and workers would collect different names."""
    return argname if isinstance(val, bytes) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were left out because a program is not installed, and how to have it."""
    reasons = (report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    absent = Counter(found.groups() for reason in reasons if (found := PACKAGE.search(reason)))
    for (program, package), count in absent.items():
        terminalreporter.write_line(
            f"{count} tests were not run: they need {program} (apt-get install {package})", yellow=True, bold=True
        )
